# SPDX-License-Identifier: Apache-2.0
"""What the backend knows of a step, asked for as vLLM does, without an engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_engine import MODEL

TOKENS = 4  # drafted at a time
TARGET, DRAFT = "model.layers.0.self_attn.attn", "draft_model.model.layers.0.self_attn.attn"
MARKER = 6  # column of the ring table, behind the ring's blocks


@pytest.fixture
def layers(monkeypatch):
    """Configuration and specs of an engine whose target and draft model have a layer each."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    speculation = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": TOKENS}
    config = EngineArgs(model=str(MODEL), kv_cache_dtype="oscar", speculative_config=speculation).create_engine_config()
    with set_current_vllm_config(config):
        for name in (TARGET, DRAFT):
            Attention(4, 128, 0.1, num_kv_heads=2, cache_config=config.cache_config, prefix=name)
    made = config.compilation_config.static_forward_context
    return config, {name: layer.get_kv_cache_spec(config) for name, layer in made.items()}


def common(lengths: list[int], tokens: list[int], table: torch.Tensor, bounds: list[int] | None = None):
    """What vLLM says of a step of requests with so many tokens in all and in flight."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(bounds or lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=sum(tokens),
        max_query_len=max(tokens),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(tokens), dtype=torch.int64),
    )


def ring_table(hit_tokens: list[int]) -> torch.Tensor:
    table = torch.arange(8 * len(hit_tokens), dtype=torch.int32).reshape(-1, 8)
    table[:, MARKER] = torch.tensor(hit_tokens) // 128
    return table


def test_pages_are_the_first_group_and_the_last_layer(layers):
    """V1 gives a draft model the first group's table; vLLM 0.31 and 0.32 take the last layer's for that of MTP."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

    config, specs = layers
    config.cache_config.kv_cache_layout = "LBHNC"  # which an engine settles
    groups = get_kv_cache_groups(config, specs)
    assert [set(group.layer_names) for group in groups] == [
        {TARGET, DRAFT},
        {f"{TARGET}.oscar_tail", f"{DRAFT}.oscar_tail"},
    ]
    assert list(specs)[-1] == DRAFT


def test_a_step_of_v1s_drafter(layers):
    """It comes with the page group's metadata alone; the ring is that of the step before."""
    from vllm_oscar.engine.metadata import OscarMetadataBuilder, OscarTailMetadataBuilder

    config, specs = layers
    rings = [f"{TARGET}.oscar_tail", f"{DRAFT}.oscar_tail"]
    tail = OscarTailMetadataBuilder(specs[rings[0]], rings, config, torch.device("cpu"))
    target = OscarMetadataBuilder(specs[TARGET], [TARGET, DRAFT], config, torch.device("cpu"))
    draft = OscarMetadataBuilder(specs[DRAFT], [DRAFT], config, torch.device("cpu"))
    pages, newest = torch.full((2, 9), 77, dtype=torch.int32), ring_table([256, 0])
    tail.build(0, common([400, 900], [5, 1], newest))
    of_target = target.build(0, common([400, 900], [5, 1], pages))
    # The draft model reads one more token; vLLM raises all lengths but the bounds.
    found = draft.build_for_drafting(common([401, 901], [6, 2], pages, bounds=[400, 900]), 0)
    assert found.page_table is pages and found.tail.ring_table is newest
    assert found.tail.ring_start.tolist() == [256, 899 - 256]
    assert (of_target.host.decode_query_len, found.host.decode_query_len) == (1 + TOKENS, 2 + TOKENS)
    assert (of_target.host.seq_lens.tolist(), found.host.seq_lens.tolist()) == ([400, 900], [401, 901])
    # Its next step, after the first request's drafts were rejected.
    after = draft.build_for_drafting(common([398, 902], [1, 1], pages), 1)
    assert after.tail.ring_start.tolist() == [256, 901 - 256]
    assert found.tail.ring_start.tolist() == [256, 899 - 256]  # may still be read


def test_a_captured_chain_of_draft_steps(layers):
    """V2 changes lengths in place and has the metadata follow, in the memory that a CUDA graph knows."""
    from vllm_oscar.engine.metadata import OscarMetadataBuilder, OscarTailMetadataBuilder

    config, specs = layers
    pages = OscarMetadataBuilder(specs[DRAFT], [DRAFT], config, torch.device("cpu"))
    tail = OscarTailMetadataBuilder(specs[f"{DRAFT}.oscar_tail"], [f"{DRAFT}.oscar_tail"], config, torch.device("cpu"))
    assert pages.supports_draft_decode_metadata_update and tail.supports_draft_decode_metadata_update
    step = common([384, 1000, 0], [1, 1, 0], ring_table([384 - 128, 0, 0]))  # the last one is padding
    ring, of_pages = tail.build(0, step), pages.build(0, step)
    address, joined = ring.ring_start.data_ptr(), of_pages.step(ring, None, lambda made, host: made)
    for ahead in range(1, 4):
        step.seq_lens[:2] += 1
        pages.update_draft_decode_metadata(of_pages)
        tail.update_draft_decode_metadata(ring)
        assert joined.ring_start.tolist() == [256, 999 + ahead - 256, 0]
        assert joined.seq_lens.tolist() == [384 + ahead, 1000 + ahead, 0]
    assert joined.ring_start.data_ptr() == address == tail.build(0, step).ring_start.data_ptr()


def test_further_groups_cost_a_step_nothing(layers):
    """Of 14 groups, seven of pages and seven of rings, each pair but the first makes views and nothing else."""
    from vllm_oscar.engine.metadata import OscarMetadataBuilder, OscarTailMetadataBuilder

    config, specs = layers
    ring = f"{TARGET}.oscar_tail"
    pages = [OscarMetadataBuilder(specs[TARGET], [TARGET], config, torch.device("cpu")) for _ in range(7)]
    rings = [OscarTailMetadataBuilder(specs[ring], [ring], config, torch.device("cpu")) for _ in range(7)]
    impl = config.compilation_config.static_forward_context[TARGET].impl
    made = common([400, 900], [1, 1], torch.zeros(2, 9, dtype=torch.int32))
    tables = [replace(made, block_table_tensor=ring_table([256, 0])) for _ in rings]

    def operations(groups: int) -> list[str]:
        seen = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                if not operation.is_view:
                    seen.append(str(operation))
                return operation(*args, **(kwargs or {}))

        with Count():
            for of_pages, of_ring, table in list(zip(pages, rings, tables))[:groups]:
                step = of_pages.build(0, made).step(of_ring.build(0, table), 200, impl._plan)
                assert step.ring_start.tolist() == [256, 899 - 256]
                assert step.ring_table.data_ptr() == table.block_table_tensor.data_ptr()
        return seen

    assert operations(7) == operations(1) != []
