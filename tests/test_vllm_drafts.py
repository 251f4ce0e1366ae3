# SPDX-License-Identifier: Apache-2.0
"""Drafters with layers of their own: they draft what they draft with ``auto``, so their pages and rings are right.

With the lossless codec a drafter reads the numbers that it reads with ``auto``. Then the
target's logprobs are equal, which shows little, since it checks every draft; the drafted
tokens are equal, which shows that no page and no position is wrong; and as many are accepted.
"""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import window_models
from test_vllm_lossless import LOSSLESS, NAN, assert_same

from benchmarks import drafters
from vllm_oscar.core.format import PageFormat

TOKENS = 4  # drafted at a time
OUTPUT = 40
# A draft model takes one of a step's tokens from every request.
BATCH = {"max_num_seqs": 8, "max_num_batched_tokens": 200 + 8}
KINDS = ("same", "noisy", "eagle", "eagle3", "mtp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drafters")


@pytest.fixture(scope="module")
def prompts(text) -> list[list[int]]:
    """Prompts that soon need another block, of lengths around a block's, and with a common prefix that hits at once."""
    base = text(512, at=3000)
    growing = [text(380 - 3 * i, at=900 * i) for i in range(4)]
    shared = [base[:n] + text(60, at=7000 + n)[1:] for n in (128, 300, 500)]
    return growing + [text(n, at=17 * n) for n in (2, 127, 255)] + shared


class Rounds:
    """Two rounds of all prompts in one engine.

    Attributes:
        found: what the rounds answered, one after the other.
        accepted, drafted: tokens.
    """

    def __init__(self, host, prompts, dtype: str, env: dict, **options) -> None:
        host.start(dtype, env=env, **options)
        if dtype != "auto":  # whose own kernels let NaN of unused slots through
            host.poison(NAN)
        self.found = [result for _ in range(2) for result in host.run(prompts, max_tokens=OUTPUT)]
        self.state = host.state()
        counters = self.state["counters"]
        self.accepted = counters["vllm:spec_decode_num_accepted_tokens"]
        self.drafted = counters["vllm:spec_decode_num_draft_tokens"]

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted

    @property
    def drafts(self) -> list:
        return [result["drafts"] for result in self.found]

    @property
    def cached(self) -> list[int]:
        return [result["cached"] for result in self.found]


@pytest.fixture(scope="module")
def plain(engine_host, prompts):
    """What ``auto`` answers without a drafter."""
    engine_host.start("auto", enable_prefix_caching=False)
    return engine_host.run(prompts, max_tokens=OUTPUT)


@pytest.fixture(scope="module")
def auto(engine_host, prompts, folder):
    """``auto(kind)``: with a drafter, prefix hits and chunks."""
    known: dict[str, Rounds] = {}

    def rounds(kind: str) -> Rounds:
        if kind not in known:
            options = drafters.options(kind, folder, TOKENS)
            known[kind] = Rounds(engine_host, prompts, "auto", {}, enable_prefix_caching=True, **BATCH, **options)
        return known[kind]

    return rounds


def same_drafts(expected: Rounds, found: Rounds) -> None:
    assert found.cached == expected.cached and sum(found.cached) > 800
    assert found.drafts == expected.drafts
    assert (found.accepted, found.drafted) == (expected.accepted, expected.drafted)


@pytest.mark.parametrize(
    "kind", [k if k == "eagle" else pytest.param(k, marks=pytest.mark.slow) for k in (*KINDS, "medusa")]
)
def test_lossless_with_hits_and_chunks(engine_host, prompts, plain, auto, folder, kind):
    expected = auto(kind)
    assert expected.rate >= {"same": 0.95, "noisy": 0.7, "eagle": 0.3}.get(kind, 0)
    options = drafters.options(kind, folder, TOKENS)
    found = Rounds(engine_host, prompts, "oscar", LOSSLESS, enable_prefix_caching=True, **BATCH, **options)
    assert_same(plain + plain, found.found)
    same_drafts(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lossless_alone_and_compiled(engine_host, prompts, plain, auto, folder, kind):
    options = drafters.options(kind, folder, TOKENS) | {"enforce_eager": False}
    found = Rounds(engine_host, prompts, "oscar", LOSSLESS, enable_prefix_caching=False, **options)
    assert_same(plain + plain, found.found)
    # Compiled code rounds otherwise, so a draft between nearly equal tokens may be another than in eager mode.
    compiled = Rounds(engine_host, prompts, "auto", {}, enable_prefix_caching=False, **options)
    assert found.rate == pytest.approx(compiled.rate, rel=0.02, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lossless_with_preemption_too(engine_host, prompts, plain, auto, folder, kind):
    """Where a request is interrupted, and so where its drafts begin, differs from ``auto``: not all are the same."""
    options = drafters.options(kind, folder, TOKENS)
    found = Rounds(
        engine_host, prompts, "oscar", LOSSLESS,
        enable_prefix_caching=True, max_model_len=640, num_gpu_blocks_override=30, **BATCH, **options,
    )  # fmt: skip
    assert found.state["counters"]["vllm:num_preemptions"] > 0 and sum(found.cached) > 0
    assert_same(plain + plain, found.found)
    assert found.rate == pytest.approx(auto(kind).rate, rel=0.05, abs=0.005)
    assert found.state["free"] == 29


@pytest.mark.slow
@pytest.mark.parametrize("model", [window_models.gemma3, window_models.gpt_oss], ids=lambda model: model.__name__)
def test_eagle_beside_sliding_windows(engine_host, tmp_path_factory, prompts, model):
    """Its layer is in the group of the full layers, so it must be given that one's ring."""
    folder = tmp_path_factory.mktemp("windows")
    model(folder / "target")
    config = json.loads((folder / "target" / "config.json").read_text())
    draft = drafters.random_eagle(folder / "eagle", config)
    options = {
        "model": str(folder / "target"),
        "max_model_len": 1024,
        "enable_prefix_caching": True,
        "speculative_config": {"method": "eagle", "model": draft, "num_speculative_tokens": TOKENS},
    }
    expected = Rounds(engine_host, prompts, "auto", {}, **BATCH, **options)
    found = Rounds(engine_host, prompts, "oscar", LOSSLESS, **BATCH, **options)
    assert_same(expected.found, found.found)
    same_drafts(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noisy", "eagle"])
def test_prefixes_from_host_memory(engine_host, prompts, plain, auto, folder, kind):
    """A drafter's pages are in the target's blocks, and come back with them.

    vLLM loads the block that it would drop of a hit on the device, whose last token EAGLE may have seen with another
    one behind it: some drafts differ, as they would with ``auto``.
    """
    engine_host.call("offload_on_cpu", "install")
    options = drafters.options(kind, folder, TOKENS)
    engine_host.start("oscar", env=LOSSLESS, kv_offloading_size=0.5, enable_prefix_caching=True, **BATCH, **options)
    found = []
    for _ in range(2):
        engine_host.poison(NAN)
        found += engine_host.run(prompts, max_tokens=OUTPUT)
    assert_same(plain + plain, found)
    counters = engine_host.state()["counters"]
    rate = counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_draft_tokens"]
    assert rate == pytest.approx(auto(kind).rate, rel=0.05)
    assert counters["vllm:external_prefix_cache_hits"] > 800


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["same", "random", "eagle", "mtp"])
def test_a_drafter_in_the_models_dtype(engine_host, prompts, plain, auto, folder, kind):
    """Beside pages of another size; also one of other heads, which must be so. First lossless, then quantized."""
    expected, options = auto(kind), drafters.options(kind, folder, TOKENS, kv_cache_dtype="auto")
    found = Rounds(engine_host, prompts, "oscar", LOSSLESS, enable_prefix_caching=True, **BATCH, **options)
    assert_same(plain + plain, found.found)
    same_drafts(expected, found)
    found = Rounds(engine_host, prompts, "oscar", {}, enable_prefix_caching=True, **BATCH, **options)
    assert found.rate == pytest.approx(expected.rate, rel=0.05, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["same", "noisy", "eagle"])
def test_quantized_pages_cost_few_accepted_tokens(engine_host, prompts, auto, folder, kind):
    options = drafters.options(kind, folder, TOKENS)
    found = Rounds(engine_host, prompts, "oscar", {}, enable_prefix_caching=True, **BATCH, **options)
    assert found.rate > 0.95 * auto(kind).rate


# ---- capacity by vLLM's own accounting ---------------------------------------------------
def vllm_tokens(layers: dict, context: int, memory: int) -> int:
    """What vLLM says that ``memory`` bytes hold of layers with these specs."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_layout import KVCacheLayout

    one = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1, tensor_parallel_size=1)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=context, original_max_model_len=context, hf_config=SimpleNamespace(model_type="qwen3")
        ),
        parallel_config=one,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC,
            kv_cache_layout="LBHNC",
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        max_in_flight_tokens=8192,
        num_prefill_lookahead_tokens=0,
    )
    found = kv_cache_utils.get_kv_cache_configs(config, [layers], [memory])
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config(found)
    return kv_cache_utils.get_kv_cache_capacity(config, scheduler)[0]


def test_an_eagle_layer_beside_36(monkeypatch):
    """Qwen3-8B's shape: over 5.3 times what ``auto`` holds, and what ``plan`` says."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_oscar.engine.scheduler import OscarTailSpec
    from vllm_oscar.tools import plan

    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.ERROR)
    fmt, memory, context, drafts = PageFormat.preset("oscar", 128), 24 << 30, 131072, 4
    heads = {"num_kv_heads": 8, "head_size": 128}
    wide = FullAttentionSpec(block_size=16, dtype=torch.bfloat16, **heads)
    ours = {"block_size": 128, "dtype": torch.uint8, "state_content_bytes": fmt.bytes_per_token, **heads}
    pages, tail = FullAttentionSpec(**ours), OscarTailSpec(**ours, pages=fmt.ring_pages(2, drafts))
    names = [f"model.layers.{i}.self_attn.attn" for i in range(36 + 1)]
    base = vllm_tokens(dict.fromkeys(names, wide), context, memory)
    rings = dict.fromkeys([f"{name}.oscar_tail" for name in names], tail)
    found = vllm_tokens(dict.fromkeys(names, pages) | rings, context, memory)
    assert found / base > 5.3
    shape, load = plan.ModelShape(layers=36, kv_heads=8, head_dim=128, itemsize=2), plan.Load(context, drafts=drafts)
    planned = {row.name: row.tokens for row in plan.plan(shape.with_drafter(1), memory, load)}
    assert planned["oscar"] == found
    assert planned["auto"] == pytest.approx(base, rel=1e-3)  # of blocks of 16 tokens a few more fit
