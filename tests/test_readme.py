# SPDX-License-Identifier: Apache-2.0
"""The README's numbers are those of the records, its commands and links lead somewhere."""

from __future__ import annotations

import json
import re
import sys
from math import expm1
from pathlib import Path
from statistics import mean

import pytest

from vllm_oscar.core.config import PRESETS
from vllm_oscar.core.format import PageFormat

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
RESULTS = REPO / "benchmarks" / "results"
sys.path.insert(0, str(REPO / "benchmarks"))
import picture  # noqa: E402


def rows() -> dict[str, list[str]]:
    """The table of presets: cells by preset, ``fp8`` and ``int4`` among them."""
    table = README[README.index("## Presets") : README.index("**Loss**")]
    cells = [[cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| " in line]
    found = {row[0].split("`")[-1].split(" ")[0]: row[1:] for row in cells[1:]}
    return found


def test_every_preset_has_a_row_with_its_bytes():
    table = rows()
    assert set(table) == set(PRESETS) | {"fp8", "int4"}
    for name in PRESETS:
        size = PageFormat.preset(name, 128).bytes_per_token
        assert table[name][1] == str(size) == str(picture.BYTES[name])
        assert table[name][2] == f"{512 / size:.1f}"


def test_loss_is_that_of_the_records():
    kl = picture.divergence("smollm2-135m", 8192)
    records = [json.loads(line) for line in (RESULTS / "fidelity" / "records.jsonl").read_text().splitlines()]
    for name, cells in rows().items():
        assert cells[3] == f"{kl[name]:.4f}", name
        (values,) = [
            record["values"]
            for record in records
            if (record["model"], record["method"], record["measure"]) == ("smollm2-135m", name, "text")
            and record["settings"]["length"] == 8192
        ]
        # The perplexity over all documents, against that with exact attention on the same.
        extra = mean(value["loss"] - value["exact_loss"] for value in values)
        assert float(cells[4].removesuffix(" %")) == pytest.approx(100 * expm1(extra), abs=0.06), name


def test_speed_is_that_of_the_records():
    records = json.loads((RESULTS / "kernels-h100.json").read_text())
    case = [r for r in records if (r.get("model"), r.get("batch"), r.get("context")) == ("qwen3-8b", 64, 8192)]
    for name in PRESETS:
        (ratio,) = [r["ratio_to_best_bf16"] for r in case if r.get("preset") == name]
        assert rows()[name][5] == f"{ratio:.1f}"


def test_what_a_user_gains_is_that_of_the_records():
    text = " ".join(README.split())
    served = picture.served()
    ours, bf16, fp8 = (served[dtype] for dtype in ("oscar", "auto", "fp8"))
    step, prefill = ([f"{record[field]:.{digits}f}" for record in (ours, bf16, fp8)]
                     for field, digits in (("step_ms", 1), ("prefill_s", 2)))  # fmt: skip
    assert f"128k took {step[0]} ms, with bf16 {step[1]}, with fp8 {step[2]}" in text
    assert f"32k took {prefill[0]} s, with bf16 {prefill[1]}, with fp8 {prefill[2]}" in text
    faster = [ours["output_tokens_per_s"] / record["output_tokens_per_s"] for record in (bf16, fp8)]
    assert f"64 requests of 8k {faster[0]:.2f} times that of bf16, {faster[1]:.2f} times that of fp8" in text
    long, decoding = (speeds["oscar"] / speeds["auto"] for speeds in list(picture.throughput().values())[1:])
    assert f"{long:.1f} times the output tokens/s of bf16 with 32 requests of 32k" in text
    assert f"{decoding:.1f} times with 256 that decode" in text
    record = json.loads((RESULTS / "serving-h100" / "bench.json").read_text())
    alone = {f"{p['per_user']:.0f}" for p in record["points"] if (p["workload"], p["concurrency"]) == ("8k-1k", 1)}
    assert alone == {"133"} and "one request of 8k decodes 133 tokens/s with either" in text
    capacity = picture.capacity()
    gains = [f"{capacity['oscar'] / capacity[rival]:.1f} times" for rival in ("auto", "fp8")]
    assert f"{gains[0]} the tokens of bf16 and {gains[1]} those of fp8" in text
    assert f"auto: {capacity['auto']:,} tokens, oscar: {capacity['oscar']:,}" in text
    for context, ratio in ((2048, "4.1"), (8192, "5.2")):
        rows = picture.capacity(context)
        assert f"{rows['oscar'] / rows['auto']:.1f}" == ratio and f"{ratio} times" in text


def test_the_picture_can_be_drawn_again(tmp_path):
    picture.main(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))]
)
def test_links_lead_to_files(file):
    text = (REPO / file).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [link for link in links if not ((REPO / file).parent / link).exists()]
    assert not missing


def test_the_readme_has_no_laboratory_prose():
    assert not re.search(r"\bcommit\b|\b[0-9a-f]{7}\b|\b20\d\d-\d\d-\d\d\b", README)
    assert README.count("<!-- support:begin -->") == README.count("<!-- support:end -->") == 1


def test_contributing_is_short():
    assert len((REPO / "CONTRIBUTING.md").read_text().splitlines()) <= 15


def test_the_metrics_and_log_lines_of_the_docs_exist():
    vllm = Path(pytest.importorskip("vllm").__file__).parent
    text = (REPO / "docs" / "operations.md").read_text()
    places = [*(vllm / "v1").rglob("*.py"), *(REPO / "vllm_oscar").rglob("*.py")]
    sources = "\n".join(path.read_text() for path in places)
    metrics = {name.removesuffix("_total") for name in re.findall(r"`(vllm:\w+)`", text)}
    assert len(metrics) > 5 and [name for name in sorted(metrics) if f'"{name}"' not in sources] == []
    lines = text[text.index("## What vLLM's log says") : text.index("## What `/metrics` says")]
    quoted = re.findall(r"^\| `([^`]+)` \|", lines, re.MULTILINE)
    # Of a line the parts between what is filled in.
    parts = [part for line in quoted for part in re.split(r"\bGPU\b|\bcuda\b|\b[A-Z]\b|\bOSCAR\b|[:,.]", line)]
    parts = [part.strip() for part in parts if len(part.strip()) > 8]
    assert len(parts) > 6 and [part for part in parts if part not in sources] == []
