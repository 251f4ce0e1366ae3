# SPDX-License-Identifier: Apache-2.0
"""The tokens that vLLM reports for the same memory: honest, tail included, and enough."""

from __future__ import annotations

import re

import pytest

from vllm_oscar.core.config import PRESETS

LAYERS, HEADS, DIM = 6, 2, 128  # the demo model

# Bytes per token and KV head, written down from the definition of each preset (see test_format).
BYTES = {"oscar": 90, "oscar_small": 78, "oscar_large": 106, "oscar_4bit": 138, "oscar_paper": 98}
WINDOWS = {"oscar_large": 352}  # the others': 256


def start(host, dtype: str, context: int, memory: int) -> dict:
    overrides = {"max_position_embeddings": context} if context > 4096 else {}
    return host.start(
        dtype,
        dtype="bfloat16",
        max_model_len=context,
        kv_cache_memory_bytes=memory,
        load_format="dummy",
        hf_overrides=overrides,
        max_num_batched_tokens=4096,
    )


def expected_tokens(preset: str, context: int, memory: int) -> int:
    """What a user gets: requests of full length that fit, each with its pages and its ring, times their length."""
    page = BYTES[preset] * 128
    # The open block in 16 bit, or a window in 8 bit with a scale each for key and value; and one token more.
    token, tokens = (2 * DIM * 2, 128) if preset == "oscar_paper" else (2 * (DIM + 2), WINDOWS.get(preset, 256))
    tokens += 1
    ring_pages = -(-tokens // (page // token))
    blocks = memory // (page * HEADS * LAYERS)
    return int(blocks / (-(-context // 128) + ring_pages) * context)


@pytest.fixture(scope="module")
def auto(engine_host):
    """Tokens that ``auto`` holds by (context, memory), and a check that this is plain arithmetic."""
    tokens = {}
    for context, memory in ((4096, 1 << 28), (131072, 1 << 30)):
        tokens[context] = start(engine_host, "auto", context, memory)["tokens"]
        assert tokens[context] == pytest.approx(memory / (LAYERS * HEADS * DIM * 2 * 2), rel=0.01)
    return tokens


@pytest.mark.parametrize("preset", PRESETS)
def test_reported_tokens_at_4k(engine_host, auto, preset):
    memory = 1 << 28
    found = start(engine_host, preset, 4096, memory)
    assert found["tokens"] == expected_tokens(preset, 4096, memory)
    reports = re.findall(r"[CG]PU KV cache size: ([\d,]+) tokens", engine_host.log_text())
    assert int(reports[-1].replace(",", "")) == found["tokens"]
    if preset == "oscar":
        assert found["tokens"] / auto[4096] >= 4.4


def test_reported_tokens_at_128k(engine_host, auto):
    found = start(engine_host, "oscar", 131072, 1 << 30)
    assert found["tokens"] == expected_tokens("oscar", 131072, 1 << 30)
    assert found["tokens"] / auto[131072] >= 5.2


def test_the_reported_requests_really_fit(engine_host, text):
    """Memory for three full requests and a bit: three run at once, the fourth waits."""
    pages = 1024 // 128 + 6
    info = engine_host.start("oscar", max_model_len=1024, num_gpu_blocks_override=1 + 3 * pages + 5, dtype="bfloat16")
    assert info["tokens"] == int(info["blocks"] / pages * 1024)
    prompts = [text(1000, at=1000 * i) for i in range(4)]
    found = engine_host.run(prompts, max_tokens=24)
    begun = [result["chunks"][0] for result in found]
    assert all(context == 0 for context, _ in begun)
    assert engine_host.state()["counters"]["vllm:num_preemptions"] == 0
    assert engine_host.state()["free"] == info["free"]
