# SPDX-License-Identifier: Apache-2.0
"""The integration without the quantizer: with the lossless codec vLLM answers as with ``auto``.

Tokens are equal and every logprob is within 1e-4 in float32, for each scheduler feature
alone and for several together. The engines share one process (see ``vllm_engine``).
"""

from __future__ import annotations

import pytest

TOLERANCE = 1e-4
LOSSLESS = {"VLLM_OSCAR_CODEC": "lossless"}
# Two prompts fit one step: vLLM on CPU cannot rewind the seed of a chunked prompt.
SAMPLED = {"n": 3, "temperature": 0.8, "seed": 11}
NAN = 0x7FC00000  # a float32 NaN


def difference(expected: list[dict], found: list[dict]) -> float:
    """Largest logprob difference; fails unless all samples have the same tokens.

    At the edge of the top 10 two nearly equal logprobs may swap, so one of ten may miss.
    """
    assert len(expected) == len(found)
    worst = 0.0
    for number, (want, have) in enumerate(zip(expected, found)):
        assert len(want["outputs"]) == len(have["outputs"]), f"prompt {number}"
        for a, b in zip(want["outputs"], have["outputs"]):
            assert a["tokens"] == b["tokens"], f"prompt {number}"
            assert len(a["logprobs"]) == len(b["logprobs"]) == len(a["tokens"]), f"prompt {number}"
            for row_a, row_b in zip(a["logprobs"], b["logprobs"]):
                common = row_a.keys() & row_b.keys()
                assert len(common) >= len(row_a) - 1, f"prompt {number}"
                worst = max(worst, *(abs(row_a[token] - row_b[token]) for token in common))
    return worst


def assert_same(expected: list[dict], found: list[dict]) -> None:
    assert difference(expected, found) < TOLERANCE


@pytest.fixture(scope="module")
def prompts(text) -> dict[str, list[list[int]]]:
    edges = [text(n, at=17 * n) for n in (1, 2, 127, 128, 129, 255, 256, 257, 385)]
    base = text(512, at=3000)
    shared = [base[:n] + text(60, at=7000 + n)[1:] for n in (128, 130, 256, 300, 500)]
    long = text(2060, at=500)
    words = text(40, at=9000)[1:]
    return {
        "edges": edges,
        "shared": shared,
        "long": [long, long[:1920] + text(150, at=12000)[1:]],
        "growing": [text(380 - 3 * i, at=900 * i) for i in range(4)],
        "repeating": [[0] + words * 3 + words[:n] for n in (1, 9, 20)] + [[0] + words * 6, text(250, at=400)],
    }


@pytest.fixture(scope="module")
def auto(engine_host, prompts) -> dict[str, list[dict]]:
    """What plain vLLM answers, each prompt set in a batch of its own."""
    engine_host.start("auto", enable_prefix_caching=False)
    return {
        "edges": engine_host.run(prompts["edges"]),
        "shared": engine_host.run(prompts["shared"]),
        "long": engine_host.run(prompts["long"], max_tokens=4),
        "growing": engine_host.run(prompts["growing"], max_tokens=40),
        "repeating": engine_host.run(prompts["repeating"], max_tokens=40),
        "sampled": engine_host.run(prompts["shared"][:2], **SAMPLED),
    }


@pytest.fixture(scope="module")
def caching(engine_host, auto):
    """A lossless engine with prefix caching; the tests that use it come first in this file."""
    engine_host.start("oscar", env=LOSSLESS, enable_prefix_caching=True)
    assert "the KV cache is NOT compressed" in engine_host.log_text()
    return engine_host


def test_prompts_of_every_length(caching, prompts, auto):
    assert_same(auto["edges"], caching.run(prompts["edges"]))


def test_prefix_hit_of_a_block_computed_in_the_same_step(caching, prompts, auto):
    caching.poison(NAN)
    found = caching.run(prompts["shared"])
    first_chunks = [result["chunks"][0] for result in found]
    assert [context for context, _ in first_chunks] == [0, 128, 128, 256, 256]
    assert [result["arrivals"] for result in found] == [12] * 5  # so all five began in one step
    assert_same(auto["shared"], found)


def test_prefix_hits_of_earlier_requests(caching, prompts, auto):
    caching.run(prompts["edges"] + prompts["shared"])
    again = caching.run(prompts["edges"])
    assert [result["cached"] for result in again] == [0, 0, 0, 0, 128, 128, 128, 256, 384]
    assert_same(auto["edges"], again)
    again = caching.run(prompts["shared"])
    assert [result["cached"] for result in again] == [128, 128, 256, 256, 512]
    assert_same(auto["shared"], again)


def test_long_prompts(caching, prompts, auto):
    caching.poison(NAN)
    found = caching.run(prompts["long"], max_tokens=4)
    assert found[1]["cached"] == 1920
    assert_same(auto["long"], found)
    again = caching.run(prompts["long"], max_tokens=4)
    assert [result["cached"] for result in again] == [2048, 2048]
    assert_same(auto["long"], again)


def test_streaming(caching, prompts, auto):
    found = caching.run(prompts["shared"], stream=True)
    assert all(result["arrivals"] == 12 for result in found)
    assert_same(auto["shared"], found)


def test_several_samples(caching, prompts, auto):
    """The three samples of a request share the full blocks of its prompt."""
    found = caching.run(prompts["shared"][:2], **SAMPLED)
    assert all(len({tuple(sample["tokens"]) for sample in result["outputs"]}) > 1 for result in found)
    assert_same(auto["sampled"], found)


def test_abort(caching, prompts, auto):
    """Aborting leaves nothing behind, neither blocks nor wrong bytes."""
    before = caching.state()["free"]
    found = caching.run(prompts["growing"], max_tokens=40, abort={"0": 3, "2": 7})
    assert [result["outputs"][0]["finish"] for result in found] == ["abort", "length", "abort", "length"]
    assert_same([auto["growing"][1], auto["growing"][3]], [found[1], found[3]])
    state = caching.state()
    assert (state["running"], state["waiting"], state["free"]) == (0, 0, before)
    assert_same(auto["growing"], caching.run(prompts["growing"], max_tokens=40))


def test_chunked_prefill(engine_host, prompts, auto):
    engine_host.start("oscar", env=LOSSLESS, enable_prefix_caching=False, max_num_batched_tokens=200)
    found = engine_host.run(prompts["edges"])
    # Requests fill a step's 200 tokens in turn, so chunks begin and end anywhere in a block.
    starts = {context % 128 for result in found for context, tokens in result["chunks"] if tokens > 1}
    assert len(starts) > 5
    assert_same(auto["edges"], found)
    assert_same(auto["shared"], engine_host.run(prompts["shared"]))
    assert_same(auto["long"], engine_host.run(prompts["long"], max_tokens=4))


@pytest.mark.parametrize("caching", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preemption(engine_host, prompts, auto, caching):
    """29 usable blocks: three requests of 3 pages and 6 ring pages fit, until one grows."""
    engine_host.start(
        "oscar", env=LOSSLESS, max_model_len=512, num_gpu_blocks_override=30, enable_prefix_caching=caching
    )
    found = engine_host.run(prompts["growing"], max_tokens=40)
    assert engine_host.state()["counters"]["vllm:num_preemptions"] > 0
    assert_same(auto["growing"], found)
    assert engine_host.state()["free"] == 29


@pytest.mark.parametrize("drafts", [1, pytest.param(4, marks=pytest.mark.slow), 20])
def test_speculation(engine_host, prompts, auto, drafts):
    """With 20 drafts the ring must be longer, since rejected ones overwrite the oldest slots."""
    engine_host.start(
        "oscar",
        env=LOSSLESS,
        enable_prefix_caching=False,
        speculative_config={"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3},
    )
    found = engine_host.run(prompts["repeating"], max_tokens=40)
    counters = engine_host.state()["counters"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < counters["vllm:spec_decode_num_draft_tokens"]  # some are rejected
    assert_same(auto["repeating"], found)


def test_everything_together(engine_host, prompts, auto):
    """Prefix caching, chunked prefill, preemption and speculation at once, in two rounds."""
    engine_host.start(
        "oscar",
        env=LOSSLESS,
        max_model_len=512,
        num_gpu_blocks_override=28,
        enable_prefix_caching=True,
        max_num_batched_tokens=150,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    )
    everything = prompts["growing"] + prompts["repeating"]
    for _ in range(2):
        found = engine_host.run(everything, max_tokens=40)
        assert_same(auto["growing"] + auto["repeating"], found)
    counters = engine_host.state()["counters"]
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert counters["vllm:spec_decode_num_accepted_tokens"] > 0
    assert engine_host.state()["free"] == 27  # all but the null block


def test_stale_bytes_never_matter(engine_host, prompts, auto):
    """The whole cache holds NaN (as fp32, fp16 or e4m3) or huge numbers before requests are computed."""
    engine_host.start("oscar", env=LOSSLESS, max_model_len=1024, num_gpu_blocks_override=200)
    for word in (0xFFFFFFFF, NAN, 0x7F7F7F7F):
        for name in ("edges", "shared"):
            engine_host.poison(word)
            assert_same(auto[name], engine_host.run(prompts[name]))


# Inductor's C++ takes longer than all the rest; every day the same trace runs as it is.
TRACED = {"mode": 2, "backend": "eager"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"compilation_config": TRACED}, id="traced"),
        pytest.param({}, id="inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled(engine_host, prompts, auto, options):
    engine_host.start("oscar", env=LOSSLESS, enforce_eager=False, enable_prefix_caching=True, **options)
    for _ in range(2):
        assert_same(auto["shared"], engine_host.run(prompts["shared"]))
    assert_same(auto["edges"], engine_host.run(prompts["edges"]))
