# SPDX-License-Identifier: Apache-2.0
"""``report.md`` and its plots, from ``bench.json`` alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import median

# Differences up to this part are not called a loss: repeated measurements differ by as much.
TOLERANCE = 0.03
# What is compared with the rivals: name, unit, and whether more is better.
COMPARED = (("output_tokens_per_s", "output tokens/s", True), ("ttft_p50", "TTFT p50", False),
            ("tpot_p50", "TPOT p50", False))  # fmt: skip

Key = tuple[str, str, int]  # dtype, workload, requests in flight


def medians(points: list[dict]) -> dict[Key, dict]:
    """For each point the median of every number over its runs; the other fields of the first run.

    Runs in which every request failed are left out: they measured nothing.
    """
    runs: dict[Key, list[dict]] = {}
    for point in (point for point in points if point["completed"]):
        runs.setdefault((point["dtype"], point["workload"], point["concurrency"]), []).append(point)
    return {
        key: {
            name: median(run[name] for run in group if name in run) if isinstance(value, (int, float)) else value
            for name, value in group[0].items()
        }
        for key, group in runs.items()
    }


def losses(points: dict[Key, dict], dtype: str, rivals: list[str]) -> list[dict]:
    """Where ``dtype`` is behind a rival by more than :data:`TOLERANCE`.

    One dict each: ``workload``, ``concurrency``, ``rival``, ``what``, ``ours``, ``theirs``, ``ratio`` (ours by theirs).
    """
    found = []
    for (name, workload, concurrency), ours in points.items():
        if name != dtype:
            continue
        for rival in rivals:
            theirs = points.get((rival, workload, concurrency))
            for field, what, more_is_better in COMPARED if theirs else ():
                ratio = ours[field] / theirs[field] if theirs[field] else 1.0
                if ratio < 1 - TOLERANCE if more_is_better else ratio > 1 + TOLERANCE:
                    found.append(
                        {"workload": workload, "concurrency": concurrency, "rival": rival, "what": what,
                         "ours": ours[field], "theirs": theirs[field], "ratio": ratio}
                    )  # fmt: skip
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(header: list[str], rows: list[list[str]], left: int) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return ["", *("| " + " | ".join(row) + " |" for row in [header, rule, *rows]), ""]


def _lengths(workload: dict) -> str:
    parts = [f"{workload['shared']:,} shared" if workload["shared"] else "", f"{workload['input']:,} in"]
    return ", ".join([*filter(None, parts), f"{workload['output']:,} out"])


def _is_ours(dtype: str) -> bool:
    return dtype.startswith("oscar")


def _summary(record: dict, points: dict[Key, dict]) -> list[str]:
    """Each workload's best throughput per dtype, and its ratio to the first dtype.

    Only of the concurrencies that all dtypes were measured at: else one that was stopped early would look slow.
    """
    rows = []
    for workload in record["workloads"]:
        found = {
            dtype: {
                users: p["per_device"] for (d, w, users), p in points.items() if (d, w) == (dtype, workload["name"])
            }
            for dtype in record["dtypes"]
        }
        common = set.intersection(
            *(set(measured) for measured in found.values() if measured), set(workload["concurrency"])
        )
        best = [
            max((measured[users] for users in common & measured.keys()), default=None) for measured in found.values()
        ]
        rows.append([f"`{workload['name']}`", *_beside_the_first(best)])
    text = "Most output tokens/s per device over the concurrencies that all were measured at"
    return [f"{text}, and times the first column's:", *_table(["workload", *record["dtypes"]], rows, 1)]


def _beside_the_first(values: list[float | None]) -> list[str]:
    """Cells of a table: each value and how many times the first it is."""
    first = values[0]
    return [
        "-" if value is None else _number(value) + (f" ({value / first:.2f}x)" if first and value != first else "")
        for value in values
    ]


def _losses(record: dict, points: dict[Key, dict]) -> list[str]:
    lines = []
    rivals = [dtype for dtype in record["dtypes"] if not _is_ours(dtype)]
    for dtype in filter(_is_ours, record["dtypes"]):
        lines += [f"## Where `{dtype}` loses", ""]
        found = losses(points, dtype, rivals)
        compared = [key for key in points if key[0] == dtype and any((r, *key[1:]) in points for r in rivals)]
        if not compared:
            lines += ["No point was measured with another dtype beside it.", ""]
        elif not found:
            against = " and ".join(f"`{rival}`" for rival in rivals)
            lines += [
                f"Nowhere, by more than {TOLERANCE:.0%}, among {len(compared)} points measured beside {against}: "
                "not in output tokens/s, median TTFT or median TPOT.", "",
            ]  # fmt: skip
        else:
            where = {(loss["workload"], loss["concurrency"]) for loss in found}
            lines += [f"At {len(where)} of {len(compared)} points, by more than {TOLERANCE:.0%} (times in ms):"]
            rows = [
                [f"`{loss['workload']}`", str(loss["concurrency"]), f"`{loss['rival']}`", loss["what"],
                 _number(loss["ours"]), _number(loss["theirs"]), f"{loss['ratio']:.2f}x"]
                for loss in found
            ]  # fmt: skip
            lines += _table(["workload", "in flight", "behind", "in", f"`{dtype}`", "the other", "ratio"], rows, 4)
    return lines


def _details(record: dict, points: dict[Key, dict], workload: dict) -> list[str]:
    drafts = any("acceptance_percent" in point for point in points.values())
    header = ["in flight", "dtype", "output tok/s per device", "per user", "TTFT p50", "p99", "TPOT p50", "p99",
              "preemptions", "prefix hits", *(["drafts accepted"] if drafts else [])]  # fmt: skip
    rows = []
    for concurrency in workload["concurrency"]:
        for dtype in record["dtypes"]:
            point = points.get((dtype, workload["name"], concurrency))
            if point is None:
                rows.append([str(concurrency), f"`{dtype}`", "not measured", *[""] * (len(header) - 3)])
                continue
            times = [_number(point[name]) for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")]
            failed = f" ({point['failed']:.0f} failed)" if point.get("failed") else ""
            accepted = [f"{point['acceptance_percent']:.0f} %" if "acceptance_percent" in point else "-"]
            rows.append(
                [str(concurrency), f"`{dtype}`", _number(point["per_device"]) + failed, _number(point["per_user"]),
                 *times, f"{point['preemptions']:.0f}", f"{point['prefix_hit_percent']:.0f} %",
                 *(accepted if drafts else [])]
            )  # fmt: skip
    name = workload["name"]
    return [
        f"## {name}", "", f"{workload['about']}; here {_lengths(workload)}. Times in ms.",
        *_table(header, rows, 2), f"![{name}]({name}.png)", "",
    ]  # fmt: skip


def _plot(record: dict, points: dict[Key, dict], workload: dict, path: Path) -> None:
    """Throughput against speed for a user, and the two latencies against requests in flight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (pareto, first, each) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for index, dtype in enumerate(record["dtypes"]):
        found = sorted(
            (p for (d, w, _), p in points.items() if (d, w) == (dtype, workload["name"])),
            key=lambda p: p["concurrency"],
        )
        if not found:
            continue
        style = {"marker": "o", "color": f"C{index}", "label": dtype}
        pareto.plot([p["per_user"] for p in found], [p["per_device"] for p in found], **style)
        for p in found:
            pareto.annotate(str(p["concurrency"]), (p["per_user"], p["per_device"]), fontsize=7, xytext=(3, 3),
                            textcoords="offset points")  # fmt: skip
        users = [p["concurrency"] for p in found]
        first.plot(users, [p["ttft_p50"] for p in found], **style)
        each.plot(users, [p["tpot_p50"] for p in found], **style)
    pareto.set(xlabel="output tokens/s per user", ylabel="output tokens/s per device", title=workload["name"])
    first.set(xlabel="requests in flight", ylabel="TTFT p50, ms", xscale="log", yscale="log")
    each.set(xlabel="requests in flight", ylabel="TPOT p50, ms", xscale="log")
    for axes in (first, each):
        axes.set_xticks(workload["concurrency"], labels=map(str, workload["concurrency"]))
        axes.xaxis.minorticks_off()
    each.set_ylim(bottom=0)
    for axes in (pareto, first, each):
        axes.grid(alpha=0.3)
    pareto.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _offline(record: dict) -> list[str]:
    if not record["offline"]:
        return []
    batches: dict[tuple[str, int], dict[str, float]] = {}
    for found in record["offline"]:
        speeds = batches.setdefault((found["workload"], found["requests"]), {})
        speeds[found["dtype"]] = found["output_tokens_per_s"]
    rows = [
        [f"`{workload}`", str(requests), *_beside_the_first([speeds.get(dtype) for dtype in record["dtypes"]])]
        for (workload, requests), speeds in batches.items()
    ]
    text = "Output tokens/s of `vllm bench throughput`, all requests at once, and times the first column's:"
    return ["## Offline batches", "", text, *_table(["workload", "requests", *record["dtypes"]], rows, 1)]


def _facts(record: dict) -> list[str]:
    """Device, model, memory, versions: one sentence each; versions and commits as recorded at each measurement."""
    stamps = {
        name: sorted({found[name] for found in record["points"] + record["offline"] if found.get(name)})
        for name in ("vllm", "vllm-oscar", "torch", "commit", "date")
    }
    versions = ", ".join(f"{name} {' and '.join(values)}" for name, values in stamps.items() if values)
    weights = " with dummy weights (speed and memory are real, text means nothing)" if record["dummy_weights"] else ""
    scale = "" if record["scale"] == "1" else f" All lengths are scaled by {record['scale']}."
    count = f" {record['devices']} ranks; tokens/s per device are those of all, divided." * (record["devices"] > 1)
    tokens = {p["dtype"]: p["kv_tokens"] for p in record["points"] if p.get("kv_tokens")}
    held = ", ".join(f"`{dtype}` {number:,}" for dtype, number in tokens.items())
    memory = f"{record['kv_memory'] / 2**20:,.0f} MiB of KV cache{' per rank' if record['devices'] > 1 else ''}"
    return [
        f"`{record['model']}`{weights} on {record['device']}.{count} Every dtype has {memory}.{scale}",
        "",
        *([f"Tokens that vLLM says the cache holds: {held}.", ""] if held else []),
        f"Measured with {versions}. Made by `{record['command']}`; vLLM's own commands are at the end.",
        "",
    ]


def write_report(record_path: Path) -> Path:
    """Write ``report.md`` and one plot per workload beside the record; returns the report's path."""
    record = json.loads(record_path.read_text())
    points = medians(record["points"])
    lines = ["# KV-cache dtypes at equal memory", "", *_facts(record)]
    if record["workloads"]:
        lines += _summary(record, points) + _losses(record, points)
    for workload in record["workloads"]:
        lines += _details(record, points, workload)
        _plot(record, points, workload, record_path.with_name(f"{workload['name']}.png"))
    lines += _offline(record)
    lines += ["## vLLM's commands", "", "For each dtype a server and its measurements, one after the other.", ""]
    for commands in record["commands"].values():
        lines += ["```", *map(shlex.join, commands), "```", ""]
    path = record_path.with_name("report.md")
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path
