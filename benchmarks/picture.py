# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture from the committed records.

    python benchmarks/picture.py [docs/overview.png]

Tests hold the README's numbers against what it reads here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

sys.path[0] = str(Path(__file__).parents[1])

from vllm_oscar.tools.bench.shapes import SHAPES  # noqa: E402
from vllm_oscar.tools.plan import Load, ModelShape, plan  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SERVED = ("auto", "fp8", "oscar")
METHODS = ("fp8", "int4", "oscar_4bit", "oscar_large", "oscar", "oscar_small", "oscar_paper")
# Bytes of a token and KV head at head size 128; the records are of a model with head size 64.
BYTES = {"fp8": 256, "int4": 136, "oscar_4bit": 138, "oscar_large": 106, "oscar": 90, "oscar_small": 78,
         "oscar_paper": 98}  # fmt: skip


def divergence(model: str, length: int) -> dict[str, float]:
    """KL to exact attention in nats, mean over documents, by method."""
    found = {}
    for line in (RESULTS / "fidelity" / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        settings = record["settings"]
        if (record["model"], record["measure"], settings.get("length")) == (model, "text", length):
            found[record["method"]] = mean(value["kl"] for value in record["values"])
    return found


def capacity(context: int = 32768, memory: int = 24 << 30) -> dict[str, int]:
    """Tokens that ``memory`` bytes hold, by dtype; what vLLM logs."""
    shape = SHAPES["qwen3-8b"]
    shape = ModelShape(shape["num_hidden_layers"], shape["num_key_value_heads"], shape["head_dim"], itemsize=2)
    return {row.name: row.tokens for row in plan(shape, memory, Load(context))}


def served() -> dict[str, dict]:
    """The records of vLLM on an H100, by dtype; with page format 1."""
    return {record["dtype"]: record for record in json.loads((RESULTS / "vllm-h100.json").read_text())}


def throughput() -> dict[str, dict[str, float]]:
    """Output tokens/s at equal memory on an H100: by what was served, by dtype."""
    record = json.loads((RESULTS / "serving-h100" / "bench.json").read_text())
    found = {"64 x (8k + 512)": {dtype: older["output_tokens_per_s"] for dtype, older in served().items()}}
    for label, kind, fields in (
        ("32 x (32k + 1k)", "points", {"workload": "32k-1k", "concurrency": 32}),
        ("256 x (1k + 2k)", "offline", {"workload": "1k-2k", "requests": 256}),
    ):
        chosen = [row for row in record[kind] if fields.items() <= row.items()]
        found[label] = {row["dtype"]: row["output_tokens_per_s"] for row in chosen}
    return found


def main(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (tokens, speed, loss) = pyplot.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    colors = ["#9aa5b1", "#5b8db8", "#d1495b"]
    held = capacity()
    bars = tokens.bar(["bf16", "fp8", "oscar"], [held[dtype] / 1e3 for dtype in SERVED], color=colors)
    tokens.bar_label(bars, [f"{held[dtype] / 1e3:,.0f}" for dtype in SERVED])
    tokens.set_title("thousand tokens in 24 GiB of KV cache", fontsize=10)
    speeds = throughput()
    for index, (dtype, name) in enumerate(zip(SERVED, ("bf16", "fp8", "oscar"))):
        groups = [group for group, label in enumerate(speeds) if dtype in speeds[label]]
        values = [speeds[label][dtype] / speeds[label]["auto"] for label in speeds if dtype in speeds[label]]
        bars = speed.bar(
            [group + 0.27 * (index - 1) for group in groups], values, 0.25, color=colors[index], label=name
        )
        speed.bar_label(bars, [f"{value:.2f}" if index else "1" for value in values], fontsize=8)
    speed.set_xticks(range(len(speeds)), labels=speeds)
    speed.set_title("output tokens/s, times bf16's; requests x (in + out)", fontsize=10)
    speed.legend(loc="upper left")
    for axes in (tokens, speed):
        axes.spines[["top", "right"]].set_visible(False)
    found = divergence("smollm2-135m", 8192)
    for method in METHODS:
        ours = method.startswith("oscar")
        loss.plot(BYTES[method], found[method], "o", color=colors[2] if ours else colors[1])
        loss.annotate(method, (BYTES[method], found[method]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    loss.set(xlabel="bytes per token and KV head (bf16: 512)", ylabel="divergence, nats", yscale="log", xlim=(60, 300))
    loss.set_title("loss against size, SmolLM2-135M, 8k tokens", fontsize=10)
    loss.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "overview.png"))
