# SPDX-License-Identifier: Apache-2.0
"""Capacity of real models with sliding windows: ``plan`` counts as vLLM does, from their ``config.json``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.core.layers import sliding_windows  # noqa: E402
from vllm_oscar.engine.scheduler import OscarTailSpec  # noqa: E402
from vllm_oscar.tools import plan as planner  # noqa: E402

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
SERVED = [name for name in CONFIGS if name != "gemma-4-31b"]
MEMORY, BATCHED = 48 << 30, 8192


def specs(name: str, dtype: str) -> dict:
    """Each layer's spec as its Attention makes it on a GPU, with a ring beside it where there are OScaR pages."""
    shape = planner.ModelShape.load(CONFIGS[name])
    oscar = PageFormat.preset("oscar", shape.head_dim) if dtype == "oscar" else None
    common = {"num_kv_heads": shape.kv_heads, "head_size": shape.head_dim, "block_size": 128 if oscar else 16}
    common["dtype"] = torch.bfloat16 if dtype == "auto" else torch.uint8
    if oscar:
        common["state_content_bytes"] = oscar.bytes_per_token
    found = {}
    for number, window in enumerate(sliding_windows(planner.text_config(CONFIGS[name]))):
        layer = f"layers.{number}"
        found[layer] = SlidingWindowSpec(**common, sliding_window=window) if window else FullAttentionSpec(**common)
        if oscar:
            found[layer + ".oscar_tail"] = OscarTailSpec(**common, pages=oscar.ring_pages(2), sliding_window=window)
    return found


def configured(context: int) -> SimpleNamespace:
    """What vLLM's accounting reads of its configuration."""
    layout = KVCacheLayout.LBHNC
    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=context, original_max_model_len=context, hf_config=SimpleNamespace(model_type="")
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, tensor_parallel_size=1, prefill_context_parallel_size=1
        ),
        max_in_flight_tokens=2 * BATCHED,  # with asynchronous scheduling
        num_prefill_lookahead_tokens=0,
        speculative_config=None,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            kv_cache_layout=layout.name,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
    )


def of_vllm(name: str, dtype: str, context: int) -> tuple[int, list[list[str]]]:
    """Tokens that vLLM would log, and the layers of each KV-cache group."""
    config = configured(context)
    found = kv_cache_utils.get_kv_cache_configs(config, [specs(name, dtype)], [MEMORY])[0]
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([found])
    tokens, _ = kv_cache_utils.get_kv_cache_capacity(config, scheduler)
    return tokens, [group.layer_names for group in found.kv_cache_groups]


@pytest.mark.parametrize("context", [8192, 32768, 131072])
@pytest.mark.parametrize("name", SERVED)
def test_plan_says_what_vllm_would(name, context):
    rows = planner.plan(planner.ModelShape.load(CONFIGS[name]), MEMORY, planner.Load(context, BATCHED))
    planned = {row.name: row.tokens for row in rows}
    for dtype in ("auto", "fp8", "oscar"):
        assert planned[dtype] == of_vllm(name, dtype, context)[0]


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gemma-3-27b"])
def test_five_times_the_tokens_at_32k(name):
    assert of_vllm(name, "oscar", 32768)[0] >= 5.0 * of_vllm(name, "auto", 32768)[0]


@pytest.mark.parametrize("name", SERVED)
def test_the_layers_of_a_group_of_pages_are_those_of_a_group_of_rings(name):
    """So that one step serves each group of pages, not one for each pair of groups."""
    _, groups = of_vllm(name, "oscar", 32768)
    rings = [names for names in groups if names[0].endswith(".oscar_tail")]
    pages = [names for names in groups if names not in rings]
    assert sorted(pages) == sorted([ring.removesuffix(".oscar_tail") for ring in names] for names in rings)
    if name == "gemma-3-27b":
        assert len(groups) == 14


def test_gemma_4_is_refused():
    with pytest.raises(ValueError, match=r"layers that differ in head size \(global_head_dim in config.json\)"):
        planner.ModelShape.load(CONFIGS["gemma-4-31b"])
