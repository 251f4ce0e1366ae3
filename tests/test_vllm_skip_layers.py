# SPDX-License-Identifier: Apache-2.0
"""``--kv-cache-dtype-skip-layers``: layers in the model's dtype beside ours, each with pages of its own size.

The lossless codec's pages are a little larger than those of skipped layers, so sizes differ in every test.
"""

from __future__ import annotations

import pytest
from test_vllm_lossless import LOSSLESS, NAN, assert_same
from window_models import gemma3

SETS = ("edges", "shared")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.fixture(scope="module")
def prompts(text) -> dict[str, list[list[int]]]:
    base, words = text(512, at=3000), text(40, at=9000)[1:]
    return {
        "edges": [text(n, at=17 * n) for n in (1, 2, 127, 128, 129, 256, 257, 385, 640)],
        "shared": [base[:n] + text(60, at=7000 + n)[1:] for n in (128, 130, 256, 300, 500)],
        "growing": [text(380 - 3 * i, at=900 * i) for i in range(4)],
        "repeating": [[0] + words * 3 + words[:n] for n in (1, 9, 20)],
    }


@pytest.fixture(scope="module")
def auto(engine_host, prompts) -> dict[str, list[dict]]:
    engine_host.start("auto", enable_prefix_caching=False)
    tokens = {"growing": 40, "repeating": 40}
    return {name: engine_host.run(prompts[name], max_tokens=tokens.get(name, 12)) for name in prompts}


def test_everything_together(engine_host, prompts, auto):
    """The first and the last layer in float32; chunks, hits, preemption and drafts, in two rounds."""
    engine_host.start(
        "oscar",
        env=LOSSLESS,
        kv_cache_dtype_skip_layers=["0", "5"],
        max_model_len=512,
        num_gpu_blocks_override=28,
        enable_prefix_caching=True,
        max_num_batched_tokens=150,
        speculative_config=NGRAM,
    )
    engine_host.poison(NAN)
    everything = prompts["growing"] + prompts["repeating"]
    for _ in range(2):
        assert_same(auto["growing"] + auto["repeating"], engine_host.run(everything, max_tokens=40))
    counters = engine_host.state()["counters"]
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert counters["vllm:spec_decode_num_accepted_tokens"] > 0
    assert engine_host.state()["free"] == 27


# Groups of layers, in vLLM's words, differ: one layer, as many as of ours, all but one.
@pytest.mark.slow
@pytest.mark.parametrize("skipped", [["2"], ["0", "5"], ["1", "3", "5"], ["0", "1", "2", "3", "4"]], ids="-".join)
@pytest.mark.parametrize("chunk", [4096, 200])
def test_layers(engine_host, prompts, auto, skipped, chunk):
    engine_host.start(
        "oscar",
        env=LOSSLESS,
        kv_cache_dtype_skip_layers=skipped,
        enable_prefix_caching=True,
        max_num_batched_tokens=chunk,
    )
    for _ in range(2):
        for name in SETS:
            found = engine_host.run(prompts[name])
            assert_same(auto[name], found)
    assert [result["cached"] for result in found] == [128, 128, 256, 256, 512]


@pytest.mark.slow
def test_compiled(engine_host, prompts, auto):
    engine_host.start(
        "oscar",
        env=LOSSLESS,
        kv_cache_dtype_skip_layers=["0", "5"],
        enforce_eager=False,
        enable_prefix_caching=True,
    )
    for _ in range(2):
        assert_same(auto["shared"], engine_host.run(prompts["shared"]))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["oscar", "oscar_paper"])
def test_real_pages(engine_host, prompts, auto, preset):
    """With most layers exact, logprobs are nearer to exact ones than with none."""

    def distance(skipped: list[str]) -> float:
        engine_host.start(preset, kv_cache_dtype_skip_layers=skipped, enable_prefix_caching=True)
        total = 0.0
        for _ in range(2):
            for want, have in zip(auto["shared"], engine_host.run(prompts["shared"])):
                first, ours = want["outputs"][0]["logprobs"][0], have["outputs"][0]["logprobs"][0]
                total += sum(abs(first[t] - ours[t]) for t in first.keys() & ours.keys())
        return total

    assert 0 < distance(["0", "1", "2", "3", "4"]) < distance([]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("skipped", [["sliding_window"], ["5"], ["0", "1", "2", "3", "4"]], ids="-".join)
def test_windows(engine_host, tmp_path_factory, prompts, skipped):
    """Gemma 3: all windows in float32, with pages of vLLM's own backend, and the full layer alone."""
    folder = tmp_path_factory.getbasetemp() / "skip-gemma3"
    if not folder.exists():
        folder.mkdir()
        gemma3(folder)
    args = {"model": str(folder), "max_model_len": 1024}
    engine_host.start("auto", enable_prefix_caching=False, **args)
    expected = {name: engine_host.run(prompts[name]) for name in SETS}
    engine_host.start("oscar", env=LOSSLESS, kv_cache_dtype_skip_layers=skipped, max_num_batched_tokens=300, **args)
    engine_host.poison(NAN)
    for _ in range(2):
        for name in SETS:
            assert_same(expected[name], engine_host.run(prompts[name]))
