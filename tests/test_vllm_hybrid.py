# SPDX-License-Identifier: Apache-2.0
"""Models with state-space layers beside attention: blocks of several pages, hits inside a block.

vLLM on CPU serves Qwen3-Next in bf16 alone, in which logits from 4 to 8 are steps of 1/32 apart. Its
kernels give the same bits for a prompt in one piece and in pieces of whole pages, but not, with ``auto``
either, for a last piece of one or four tokens, so no prompt here ends so. Nor do they for tokens that were
decoded: given as a prompt, ``auto`` itself differs by up to 0.27 from what it said of them. A table of
pages with neighbours exchanged shows as 0.9, a ring that begins one position early in other tokens.
"""

from __future__ import annotations

import pytest
from hybrid_models import lfm2, qwen3_next

LOSSLESS = {"VLLM_OSCAR_CODEC": "lossless"}
ROUNDING = 0.1  # three steps of a logit, since attention rounds otherwise
RECOMPUTED = 0.35  # after preemption: tokens that were decoded are prefilled


def assert_close(expected: list[dict], found: list[dict], tolerance: float) -> None:
    """Logprobs within ``tolerance``, and tokens equal until two candidates are that close.

    At the edge of the top 10 nearly equal logprobs may swap.
    """
    rows = same = 0
    for number, (want, have) in enumerate(zip(expected, found, strict=True)):
        (a,), (b,) = want["outputs"], have["outputs"]
        assert len(a["tokens"]) == len(b["tokens"]), f"prompt {number}"
        for at, (row_a, row_b) in enumerate(zip(a["logprobs"], b["logprobs"], strict=True)):
            common = row_a.keys() & row_b.keys()
            assert len(common) >= len(row_a) - 2, f"prompt {number}, token {at}"
            worst = max(abs(row_a[token] - row_b[token]) for token in common)
            assert worst < tolerance, f"prompt {number}, token {at}: {worst}"
            if a["tokens"][at] != b["tokens"][at]:
                break  # a tie: both tokens were compared, what follows is another text
            same += 1
        rows += len(a["tokens"])
    assert same > 0.7 * rows


@pytest.fixture(scope="module")
def prompts(text) -> dict[str, list[list[int]]]:
    base = text(1024, at=3000)

    def branch(length: int) -> list[int]:
        return base[:length] + text(41, at=7000 + length)[1:]

    return {
        "edges": [text(n, at=17 * n) for n in (1, 2, 127, 128, 130, 255, 256, 383, 384, 386, 511, 640, 950)],
        "shared": [branch(n) for n in (128, 130, 260, 300, 384, 500, 768, 1000)],
        "growing": [text(370 - 3 * i, at=900 * i) for i in range(4)],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict:
    """Engine arguments of Qwen3-Next; the state is nearly as large as three unquantized pages."""
    return {"model": str(qwen3_next(tmp_path_factory.mktemp("qwen3_next"))), "dtype": "bfloat16", "max_model_len": 2048}


@pytest.fixture(scope="module")
def auto(engine_host, model, prompts) -> dict[str, list[dict]]:
    """What plain vLLM answers, each prompt in one piece."""
    engine_host.start("auto", enable_prefix_caching=False, **model)
    tokens = {"edges": 12, "shared": 12, "growing": 30}
    return {name: engine_host.run(prompts[name], max_tokens=n) for name, n in tokens.items()}


def block_size(host) -> int:
    return host.log_text().split("Setting attention block size to ")[-1].split()[0]


def test_everything_together(engine_host, model, prompts, auto):
    """Prefix caching, chunked prefill and preemption at once, in two rounds; blocks of three pages."""
    engine_host.start(
        "oscar",
        env=LOSSLESS,
        num_gpu_blocks_override=33,
        enable_prefix_caching=True,
        max_num_batched_tokens=500,
        **model,
    )
    assert block_size(engine_host) == "384"
    for _ in range(2):
        found = engine_host.run(prompts["growing"], max_tokens=30)
        assert_close(auto["growing"], found, RECOMPUTED)
        assert_close(auto["shared"], engine_host.run(prompts["shared"], max_tokens=12), RECOMPUTED)
    counters = engine_host.state()["counters"]
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert engine_host.state()["free"] == 32


@pytest.mark.slow
def test_prompts_of_every_length(engine_host, model, prompts, auto):
    engine_host.start("oscar", env=LOSSLESS, enable_prefix_caching=False, **model)
    assert_close(auto["edges"], engine_host.run(prompts["edges"]), ROUNDING)
    assert_close(auto["shared"], engine_host.run(prompts["shared"]), ROUNDING)
    assert_close(auto["growing"], engine_host.run(prompts["growing"], max_tokens=30), ROUNDING)


@pytest.mark.slow
def test_hits_end_with_a_page_and_not_with_a_block(engine_host, model, prompts, auto):
    """In the first round many requests want copies of the same blocks, and of copies, at once."""
    free = engine_host.start("oscar", env=LOSSLESS, enable_prefix_caching=True, **model)["free"]
    for _ in range(2):
        shared = engine_host.run(prompts["shared"])
        assert_close(auto["shared"], shared, ROUNDING)
        edges = engine_host.run(prompts["edges"])
        assert_close(auto["edges"], edges, ROUNDING)
    # A state is kept where a prompt's last page ends, and where a block ends.
    assert [result["cached"] for result in shared] == [128, 128, 256, 256, 384, 512, 768, 1024]
    assert [result["cached"] for result in edges] == [0, 0, 0, 0, 128, 128, 128, 256, 256, 384, 384, 512, 896]
    assert engine_host.state()["free"] == free


@pytest.mark.slow
def test_chunked_prefill(engine_host, model, prompts, auto):
    engine_host.start("oscar", env=LOSSLESS, enable_prefix_caching=True, max_num_batched_tokens=400, **model)
    for _ in range(2):
        for name in ("edges", "shared"):
            assert_close(auto[name], engine_host.run(prompts[name]), ROUNDING)


@pytest.mark.slow
def test_compiled(engine_host, model, prompts):
    engine_host.start("auto", enforce_eager=False, enable_prefix_caching=False, **model)
    expected = engine_host.run(prompts["shared"])  # compiled code rounds otherwise than eager code
    engine_host.start("oscar", env=LOSSLESS, enforce_eager=False, enable_prefix_caching=True, **model)
    for _ in range(2):
        assert_close(expected, engine_host.run(prompts["shared"]), ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["oscar", "oscar_paper"])
def test_real_pages(engine_host, model, prompts, auto, preset):
    """What is quantized is near enough, with hits inside a block of many pages as without."""
    engine_host.start(preset, enable_prefix_caching=True, **model)
    for _ in range(2):
        for name in ("edges", "shared"):
            found = engine_host.run(prompts[name])
            for want, have in zip(auto[name], found):
                first, ours = want["outputs"][0]["logprobs"][0], have["outputs"][0]["logprobs"][0]
                common = first.keys() & ours.keys()
                assert len(common) >= 3 and all(abs(first[t] - ours[t]) < 2 for t in common)


@pytest.mark.slow
def test_short_convolutions(engine_host, tmp_path, prompts):
    """LFM2 in float32; chunks and hits are left out, since there vLLM on CPU is wrong with ``auto`` as well."""
    args = {"model": str(lfm2(tmp_path)), "max_model_len": 2048, "enable_prefix_caching": False}
    engine_host.start("auto", **args)
    expected = engine_host.run(prompts["edges"]) + engine_host.run(prompts["shared"])
    engine_host.start("oscar", env=LOSSLESS, **args)
    assert_close(expected, engine_host.run(prompts["edges"]) + engine_host.run(prompts["shared"]), 1e-4)
