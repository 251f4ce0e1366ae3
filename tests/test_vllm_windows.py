# SPDX-License-Identifier: Apache-2.0
"""Models with sliding windows beside full layers, with sinks, and with capped logits, through vLLM.

With the lossless codec it answers as with ``auto``; with a preset as the same numerics computed
independently (see ``replay``). The engines share one process (see ``vllm_engine``).
"""

from __future__ import annotations

import pytest
from replay import Replay
from test_vllm_int2 import close, compare, engine_donors, kernels
from test_vllm_lossless import LOSSLESS, NAN, TOLERANCE, assert_same
from vllm_engine import EngineError
from window_models import MODELS, SLIDING

WINDOWS = {"gemma3": 200, "gpt_oss": 128, "gemma2": 192}
# Usable blocks with which three requests of 380 tokens run until one needs a fourth page. Each takes 11 for the ring of
# each pair of KV-cache groups (6, 2 and 2 pairs), 4 for the pages of full layers and 2 to 3 for those of windows.
# Of gemma3 six less than that: how long its requests overlap depends on the prompts, which are of Python's library.
SCARCE = {"gemma3": 247, "gpt_oss": 83, "gemma2": 85}
LENGTH = 1100
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
# By default vLLM keeps a window's pages only where prompts end or part.
DENSE = {"prefix_cache_retention_interval": None}
SETS = ("edges", "shared", "growing", "repeating")


@pytest.fixture(scope="module")
def prompts(text) -> dict[str, list[list[int]]]:
    windows = sorted(set(WINDOWS.values()))
    lengths = {1, 2, 127, 129, 257, 640} | {n for w in windows for n in (w - 1, w, w + 1, w + 128, 2 * w + 3)}
    base, words = text(1024, at=3000), text(40, at=9000)[1:]
    return {
        "edges": [text(n, at=17 * n) for n in sorted(lengths)],
        "shared": [base[:n] + text(40, at=7000 + n)[1:] for n in (128, 130, 256, 300, 500, 768, 1000)],
        "growing": [text(380 - 3 * i, at=900 * i) for i in range(4)],
        "repeating": [[0] + words * 3 + words[:n] for n in (1, 9, 20)] + [[0] + words * 6, text(250, at=400)],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``models(name)``: the folder of a model, which is written when it is first asked for."""
    folders = {}

    def folder(name: str) -> str:
        if name not in folders:
            folders[name] = str(MODELS[name](tmp_path_factory.mktemp(name)))
        return folders[name]

    return folder


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def auto(engine_host, prompts, models, model):
    """What plain vLLM answers, each prompt set in a batch of its own."""
    engine_host.start("auto", model=models(model), max_model_len=LENGTH, enable_prefix_caching=False)
    return {name: engine_host.run(prompts[name], max_tokens=24) for name in SETS}


@pytest.fixture
def start(engine_host, models, model):
    """``start(**engine args)``: the host with a lossless engine whose cache holds NaN."""

    def started(**args):
        args = {"max_model_len": LENGTH, "enable_prefix_caching": True} | args
        engine_host.start("oscar", env=LOSSLESS, model=models(model), **args)
        engine_host.poison(NAN)
        return engine_host

    return started


def test_everything_together(start, prompts, auto, model):
    """Chunks, prefix hits, preemption and drafts at once, in two rounds; nothing is left behind."""
    blocks = {"num_gpu_blocks_override": 1 + SCARCE[model], "max_model_len": 512}
    host = start(**blocks, max_num_batched_tokens=150, speculative_config=NGRAM)
    for _ in range(2):
        found = host.run(prompts["growing"] + prompts["repeating"], max_tokens=24)
        assert_same(auto["growing"] + auto["repeating"], found)
    counters = host.state()["counters"]
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert counters["vllm:spec_decode_num_accepted_tokens"] > 0
    assert host.state()["free"] == SCARCE[model]


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        pytest.param({}, id="hits"),
        pytest.param(DENSE, id="hits-everywhere"),
        pytest.param({"max_num_batched_tokens": 200}, id="chunks"),
        pytest.param({"enable_prefix_caching": False}, id="no-caching"),
        pytest.param({"speculative_config": NGRAM | {"num_speculative_tokens": 20}}, id="drafts"),
        pytest.param({"enforce_eager": False}, id="compiled"),
        pytest.param({"disable_hybrid_kv_cache_manager": True}, id="one-group"),
    ],
)
def test_each_alone(start, prompts, auto, args):
    host = start(**args)
    for again in (False, True):
        for name in SETS:
            found = host.run(prompts[name], max_tokens=24)
            assert_same(auto[name], found)
            if again and name == "shared" and args.get("enable_prefix_caching", True):
                # Longer than the windows, of whose pages only the last are there.
                assert [result["cached"] for result in found] == [128, 128, 256, 256, 512, 768, 1024]


@pytest.mark.slow
def test_a_window_of_one_token_more_shows(start, prompts, auto, model):
    host = start(hf_overrides={"sliding_window": WINDOWS[model] + 1})
    worst = 0.0
    for want, have in zip(auto["edges"], host.run(prompts["edges"], max_tokens=24)):
        have["outputs"][0]["tokens"] = want["outputs"][0]["tokens"]  # they may differ; logprobs do sooner
        rows = zip(want["outputs"][0]["logprobs"], have["outputs"][0]["logprobs"])
        worst = max(worst, *(abs(a[t] - b[t]) for a, b in rows for t in a.keys() & b.keys()))
    assert worst > 100 * TOLERANCE


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "cpu" else pytest.mark.slow) for k in kernels()])
def test_a_preset(engine_host, text, models, model, kind):
    """Chunks that begin anywhere, decodes that complete blocks, and prefix hits.

    An element of a donor at an edge is rounded to either side, and later chunks and layers multiply that; all hits
    read it. So they are replayed on the pages that the engine has, and these are compared with the replay's.
    """
    engine_host.start(
        "oscar",
        env={"VLLM_OSCAR_KERNELS": kind},
        model=models(model),
        max_model_len=LENGTH,
        enable_prefix_caching=True,
        max_num_batched_tokens=200,
        **DENSE,
    )
    replay = Replay(models(model), "oscar")
    prompts = [text(n, at=1000 + 700 * i) for i, n in enumerate((130, 384, 600))]
    found = engine_host.run(prompts, max_tokens=8)
    assert any(context % 128 and tokens > 1 for result in found for context, tokens in result["chunks"])
    comparisons, states = compare(kind, replay, prompts, found)
    assert close(comparisons)

    growing = [text(n, at=5000 + n) for n in (250, 375)]
    comparisons, _ = compare(kind, replay, growing, engine_host.run(growing, max_tokens=24))
    assert close(comparisons)

    shared = [prompts[2][:n] + text(90, at=9000)[1:] for n in (400, 599)]
    donors = engine_donors(engine_host, replay, states[2], shared)
    found = engine_host.run(shared, max_tokens=8)
    assert [result["cached"] for result in found] == [384, 512]
    comparisons, _ = compare(kind, replay, shared, found, donors)
    assert close(comparisons)


def test_windows_alone_are_refused(engine_host, models):
    with pytest.raises(EngineError, match="layers all have a sliding window .* --disable-sliding-window"):
        engine_host.start("oscar", model=models("gemma3"), hf_overrides={"layer_types": [SLIDING] * 6})
