# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture from the committed records.

    python benchmarks/picture.py [docs/overview.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

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


def served() -> dict[str, dict]:
    """The records of vLLM on an H100, by dtype."""
    return {record["dtype"]: record for record in json.loads((RESULTS / "vllm-h100.json").read_text())}


def main(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (tokens, speed, loss) = pyplot.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    records, colors = served(), ["#9aa5b1", "#5b8db8", "#d1495b"]
    panels = (
        (tokens, "kv_tokens", 1e3, "thousand tokens in 24 GiB of KV cache"),
        (speed, "output_tokens_per_s", 1, "output tokens/s, 64 requests of 8k in, 512 out"),
    )
    for axes, field, unit, title in panels:
        values = [records[dtype][field] / unit for dtype in SERVED]
        bars = axes.bar(["bf16", "fp8", "oscar"], values, color=colors)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values])
        axes.set_title(title, fontsize=10)
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
