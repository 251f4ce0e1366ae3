# SPDX-License-Identifier: Apache-2.0
"""KV offloading: pages come back from host memory as they went, and rings stay out of it.

vLLM's CPU build has no copies between cache and host; ``offload_on_cpu`` stands in for them, late.
"""

from __future__ import annotations

import pytest
from test_vllm_lossless import LOSSLESS, NAN, assert_same, difference
from window_models import MODELS

CONNECTORS = {"OffloadingConnector": {}, "SimpleCPUOffloadConnector": {"VLLM_USE_SIMPLE_KV_OFFLOAD": "1"}}
OFFLOAD = {"kv_offloading_size": 0.5, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def prompts(text) -> list[list[int]]:
    """Prompts that end on both sides of a page's edge, and three that share pages."""
    base = text(512, at=3000)
    edges = [text(n, at=17 * n) for n in (1, 127, 128, 129, 255, 256, 257, 384, 500)]
    return edges + [base[:n] + text(60, at=7000 + n)[1:] for n in (130, 256, 325)]


# Pages that hold the last token are computed again, also at 128, 256 and 384 = 325 + 59 tokens.
CACHED = [0, 0, 0, 128, 128, 128, 256, 256, 384, 128, 256, 256]


@pytest.fixture(scope="module")
def host(engine_host):
    engine_host.call("offload_on_cpu", "install")
    return engine_host


@pytest.fixture(scope="module")
def auto(host, prompts, text) -> list[dict]:
    host.start("auto", enable_prefix_caching=False)
    return host.run(prompts)


@pytest.mark.parametrize(
    "connector", ["OffloadingConnector", pytest.param("SimpleCPUOffloadConnector", marks=pytest.mark.slow)]
)
def test_reloaded_prefixes(host, prompts, auto, connector):
    """After the whole cache is NaN, prefixes are those of the host."""
    info = host.start("oscar", env=LOSSLESS | CONNECTORS[connector], **OFFLOAD)
    assert f"Creating v1 connector with name: {connector}" in host.log_text()
    first = host.run(prompts)
    assert_same(auto, first)
    for _ in range(2):
        host.poison(NAN)
        again = host.run(prompts)
        assert [result["cached"] for result in again] == CACHED
        assert_same(auto, again)
    # Prompts that share pages may find them on the device again, the other nine cannot.
    assert host.state()["counters"]["vllm:external_prefix_cache_hits"] >= 2 * sum(CACHED[:9])
    assert host.state()["free"] == info["free"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["oscar", "oscar_paper"])
def test_a_reloaded_prefix_is_like_one_that_stayed(host, prompts, preset):
    host.start(preset, enable_prefix_caching=True)
    host.run(prompts)
    stayed = host.run(prompts)
    assert [result["cached"] for result in stayed] == CACHED
    host.start(preset, **OFFLOAD)
    host.run(prompts)
    host.poison(NAN)
    reloaded = host.run(prompts)
    assert [result["cached"] for result in reloaded] == CACHED
    assert difference(stayed, reloaded) < 1e-5


def forget_the_device(host, text) -> None:
    """Fill the device's cache with NaN, once another request has seen the last copies through."""
    host.run([text(9)], max_tokens=2)
    host.poison(NAN)


def test_blocks_that_become_rings(host, text):
    """One request fits at a time: its blocks are the next one's pages and ring while they are still being copied."""
    prompts = [text(300 + 13 * i, at=900 * i) for i in range(6)]
    host.start("auto", enable_prefix_caching=False, max_model_len=384)
    expected = host.run(prompts, max_tokens=1)
    host.start("oscar", env=LOSSLESS, max_model_len=384, num_gpu_blocks_override=15, **OFFLOAD)
    host.run(prompts, max_tokens=1)
    forget_the_device(host, text)
    again = host.run(prompts, max_tokens=1)
    assert [result["cached"] for result in again] == [256] * 6
    assert_same(expected, again)


@pytest.mark.slow
@pytest.mark.parametrize("connector", CONNECTORS)
def test_everything_together(host, text, connector):
    """Offloading of answers, too, with preemption, chunks, shared prefixes and drafts."""
    growing = [text(380 - 3 * i, at=900 * i) for i in range(4)]
    shared = growing[0][:256] + text(50, at=6000)[1:]
    prompts = [*growing, shared, [0] + text(40, at=9000)[1:] * 5, text(256, at=400)]
    host.start("auto", enable_prefix_caching=False, max_model_len=512)
    expected = host.run(prompts, max_tokens=45)
    host.start(
        "oscar",
        env=LOSSLESS,
        max_model_len=512,
        max_num_batched_tokens=400,
        num_gpu_blocks_override=44,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
        kv_transfer_config={
            "kv_connector": connector,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28, "offload_prompt_only": False},
        },
    )
    for _ in range(3):
        assert_same(expected, host.run(prompts, max_tokens=45))
        forget_the_device(host, text)
    state = host.state()
    assert state["counters"]["vllm:num_preemptions"] > 0
    assert state["counters"]["vllm:external_prefix_cache_hits"] > 0
    assert state["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert state["free"] == 43


@pytest.mark.slow
def test_the_host_holds_five_times_as_many_tokens(host):
    held = {}
    for dtype in ("auto", "oscar"):
        host.start(dtype, dtype="bfloat16", kv_offloading_size=0.125)
        held[dtype] = host.state()["host_tokens"]
    # 6 layers of 2 heads, 90 bytes a token.
    assert held["oscar"] == pytest.approx(2**27 / (6 * 2 * 90), rel=0.01)
    assert held["oscar"] / held["auto"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("model", ["gemma3", "gpt_oss"])
def test_models_with_sliding_windows(host, text, tmp_path, model, connector):
    """Several groups of pages, of which windows have the newest alone."""
    options = {"model": str(MODELS[model](tmp_path)), "max_model_len": 1100}
    prompts = [text(n, at=17 * n) for n in (129, 257, 500, 900)]
    host.start("auto", enable_prefix_caching=False, **options)
    expected = host.run(prompts)
    info = host.start("oscar", env=LOSSLESS | CONNECTORS[connector], **OFFLOAD, **options)
    assert_same(expected, host.run(prompts))
    for _ in range(2):
        forget_the_device(host, text)
        again = host.run(prompts)
        assert [result["cached"] for result in again] == [128, 256, 384, 896]
        assert_same(expected, again)
    assert host.state()["counters"]["vllm:external_prefix_cache_hits"] > 0
    assert host.state()["free"] == info["free"]
