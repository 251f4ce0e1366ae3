# SPDX-License-Identifier: Apache-2.0
"""The figures, from the records alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402

from .methods import MAIN, PARTS, windows  # noqa: E402
from .records import Records, by_settings  # noqa: E402

_COLOURS = {
    "16 bit": "black", "fp8": "dimgray", "int4": "tab:brown", "TurboQuant": "tab:purple", "KIVI": "tab:orange",
    "QuaRot": "tab:olive", "OScaR (paper)": "tab:red", "OScaR": "tab:blue", "ablation": "lightsteelblue",
    "grid": "lightgray",
}


def write(records: Records, folder: Path) -> list[Path]:
    """All figures that the records allow."""
    models = list(dict.fromkeys(r["model"] for r in records.all))
    figures = {draw.__name__.strip("_"): draw(records, models) for draw in (_pareto, _layers, _recall)}
    figures |= {f"norms-{model}": _norms(records, model) for model in models}
    figures |= {f"heads-{model}": _heads(records, model) for model in models}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=80, bbox_inches="tight")
            plt.close(figure)
    return paths


def _pareto(records: Records, models: list[str]):
    """Bits per element against divergence, with the front of the best: of what quantizes all layers."""
    partial = {method.name for method in windows() if method.layers != "all"}
    measured = [part for model in models for part in by_settings(records.current("text", model=model))]
    panels = [[record for record in part if record["method"] not in partial] for part in measured]
    panels = [part for part in panels if len(part) > 1]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.8), squeeze=False)
    for axis, found in zip(axes[0], panels, strict=True):
        title = f"{found[0]['model']}, {found[0]['settings']['length']:,} tokens"
        points = [(r["bits"], mean(v["kl"] for v in r["values"]), r) for r in found if r["bits"] < 10]
        for bits, kl, record in points:
            named = record["method"] in MAIN
            axis.scatter(bits, kl, s=36 if named else 12, color=_COLOURS[record["family"]], zorder=3 if named else 2)
            if named:
                axis.annotate(record["method"], (bits, kl), xytext=(4, 4), textcoords="offset points", fontsize=7)
        front, best = [], float("inf")
        for bits, kl, _ in sorted(points, key=lambda p: p[:2]):
            if kl < best:
                front.append((bits, kl))
                best = kl
        axis.plot(*zip(*front, strict=True), color="tab:blue", linewidth=0.8, zorder=1)
        axis.set(yscale="log", title=title, xlabel="bits per element, metadata included", ylabel="KL to exact")
        axis.grid(alpha=0.3, which="both")
    return figure


def _layers(records: Records, models: list[str]):
    """Error of the attention output and divergence of its distribution, layer by layer."""
    by_model = {m: [r for r in records.current("layers", model=m) if r["method"] in MAIN] for m in models}
    by_model = {m: found for m, found in by_model.items() if found}
    if not by_model:
        return None
    figure, axes = plt.subplots(2, len(by_model), figsize=(5.5 * len(by_model), 7), squeeze=False)
    for column, (model, found) in enumerate(by_model.items()):
        for record in found:
            documents = record["values"]
            style = "-" if record["family"].startswith("OScaR") else "--"
            for row, what in enumerate(("error", "kl")):
                means = [mean(values) for values in zip(*([v[what] for v in d] for d in documents), strict=True)]
                axes[row][column].plot(means, style, label=f"{record['method']} ({record['bits']:.2f} bit)")
        for row, label in enumerate(("relative error of the output", "KL of the attention distribution")):
            axes[row][column].set(yscale="log", xlabel="layer", ylabel=label, title=model if row == 0 else None)
            axes[row][column].grid(alpha=0.3)
    axes[0][-1].legend(fontsize=6, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def _recall(records: Records, models: list[str]):
    """Heat maps: exact answers over context length and depth, a row per model and task."""
    found = [r for r in records.current("recall") if r["method"] in ("exact", *MAIN)]
    if not found:
        return None
    names = [n for n in ("exact", *MAIN) if any(r["method"] == n for r in found)]
    rows = [(m, t) for m in models for t in dict.fromkeys(r["settings"]["task"] for r in found if r["model"] == m)]
    figure, axes = plt.subplots(
        len(rows), len(names), figsize=(1.5 * len(names), 1.6 * len(rows)), squeeze=False, layout="constrained"
    )
    for i, (model, task) in enumerate(rows):
        for j, name in enumerate(names):
            axis = axes[i][j]
            cells: dict[tuple[int, float], list[float]] = {}
            for record in found:
                if (record["model"], record["settings"]["task"], record["method"]) == (model, task, name):
                    length = record["settings"]["length"]
                    for depth, right in (item for document in record["values"] for item in document.items()):
                        cells.setdefault((length, float(depth)), []).append(right)
            lengths, depths = sorted({k[0] for k in cells}), sorted({k[1] for k in cells})
            grid = [[100 * mean(cells[n, d]) if (n, d) in cells else float("nan") for n in lengths] for d in depths]
            if not grid:
                axis.set_axis_off()
            else:
                image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
                axis.set_xticks(range(len(lengths)), [f"{n // 1024}k" for n in lengths], fontsize=6)
                labels = [f"{d:.0%}" if j == 0 else "" for d in depths]
                axis.set_yticks(range(len(depths)), labels, fontsize=6)
            if i == 0:
                axis.set_title(name, fontsize=7)
        axes[i][0].set_ylabel(f"{model}\n{task}", fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.4, label="exact answers, %")
    return figure


def _heads(records: Records, model: str):
    """What each part of a format costs in each layer and KV head."""
    found = records.current("heads", model=model)
    if not found:
        return None
    figure, axes = plt.subplots(
        len(found), len(PARTS) + 1, figsize=(3.2 * (len(PARTS) + 1), 4.5 * len(found)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, record in zip(axes, found, strict=True):
        values = record["values"]
        layers, heads = (1 + max(v[axis] for v in values) for axis in ("layer", "head"))
        cost = {(v["part"], v["layer"], v["head"]): v["kl"] for v in values}
        top = max(cost.values())
        for axis, part in zip(row, PARTS):
            grid = [[cost[part, layer, head] for head in range(heads)] for layer in range(layers)]
            image = axis.imshow(grid, norm=LogNorm(top / 1e4, top, clip=True), cmap="viridis", aspect="auto")
            axis.set(title=f"{record['method']}: {part}", xlabel="KV head", ylabel="layer", xticks=range(heads))
        figure.colorbar(image, ax=row[len(PARTS) - 1], label="KL, nats")
        left = [0.0] * layers
        for part in PARTS:
            width = [sum(cost[part, layer, head] for head in range(heads)) for layer in range(layers)]
            row[-1].barh(range(layers), width, left=left, label=part)
            left = [a + b for a, b in zip(left, width)]
        row[-1].set(title="sum over heads", xlabel="KL, nats", ylim=(layers - 0.5, -0.5))
        row[-1].legend(fontsize=7)
    figure.suptitle(f"{model}: divergence when one part in one layer and KV head is quantized")
    return figure


def _norms(records: Records, model: str):
    """Token norms of the keys, and what a group of 32 tokens spans per channel, by stage and layer."""
    found = records.current("norms", model=model)
    if not found:
        return None
    layers = found[-1]["values"]
    figure, axes = plt.subplots(len(layers), 2, figsize=(11, 1.7 * len(layers)), squeeze=False, layout="constrained")
    for (left, right), values in zip(axes, layers, strict=True):
        left.plot(values["token"], linewidth=0.5, color="tab:red", label="raw, and rotated")
        typical = sorted(values["token"])[len(values["token"]) // 2]
        left.axhline(typical, linewidth=0.8, color="tab:blue", label="after scaling (times the median)")
        left.set_ylabel(f"layer {values['layer']}\nkey norm", fontsize=7)
        for name, channels in values["channels"].items():
            right.plot(channels, linewidth=0.9, label=name)
        right.set_ylabel("range / rms", fontsize=7)
    for axis, label in zip(axes[-1], ("token", "channel, widest first"), strict=True):
        axis.set_xlabel(label, fontsize=8)
    for axis in axes[0]:
        axis.legend(fontsize=6, ncols=4)
    figure.suptitle(f"{model}: key norms per token, and range of 32-token groups per channel")
    return figure
