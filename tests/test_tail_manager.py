# SPDX-License-Identifier: Apache-2.0
"""The ring's block manager alone: claims, frees, markers and ``ring_start``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool  # noqa: E402

from vllm_oscar.engine.metadata import ring_start  # noqa: E402
from vllm_oscar.engine.scheduler import (  # noqa: E402
    OscarPageManager,
    OscarPageSpec,
    OscarTailManager,
    OscarTailSpec,
)

PAGES = 6


def make_spec(split: int = 1) -> OscarTailSpec:
    return OscarTailSpec(
        block_size=128 * split,
        num_kv_heads=2,
        head_size=128,
        dtype=torch.uint8,
        state_content_bytes=90,
        pages=PAGES,
        split=split,
    )


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(num_gpu_blocks=40, enable_caching=True, hash_block_size=128)


@pytest.fixture
def manager(pool) -> OscarTailManager:
    return OscarTailManager(
        make_spec(), block_pool=pool, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=128
    )


def claim(manager, request: str, hit: int = 0, tokens: int = 200) -> list:
    manager.add_local_computed_blocks(request, [], hit, 0)
    return manager.allocate_new_blocks(request, tokens, tokens)


def needed(manager, request: str, tokens: int = 200) -> int:
    return manager.get_num_blocks_to_allocate(request, tokens, [], 0, 0, tokens)


def test_a_request_claims_its_ring_once(manager, pool):
    free = pool.get_num_free_blocks()
    assert needed(manager, "a") == PAGES
    row = claim(manager, "a")
    assert len({block.block_id for block in row[:PAGES]}) == PAGES
    assert row[PAGES].is_null and row[PAGES].block_id == 0
    assert pool.get_num_free_blocks() == free - PAGES
    for tokens in (201, 1000, 100_000):  # it never grows
        assert needed(manager, "a", tokens) == 0
        assert manager.allocate_new_blocks("a", tokens, tokens) == []
    assert pool.get_num_free_blocks() == free - PAGES


def test_freeing_returns_the_ring_and_not_the_marker(manager, pool):
    free = pool.get_num_free_blocks()
    claim(manager, "a", hit=384)
    claim(manager, "b", hit=0)
    popped = manager.pop_blocks_for_free("a")
    assert len(popped) == PAGES and not any(block.is_null for block in popped)
    pool.free_blocks(reversed(popped))
    manager.free("b")
    assert pool.get_num_free_blocks() == free
    assert not manager.req_to_blocks and not manager._hit_tokens
    assert manager.pop_blocks_for_free("never seen") == []


@pytest.mark.parametrize("hit", [0, 128, 256, 4096])
def test_the_marker_carries_the_length_of_the_hit(manager, hit):
    assert claim(manager, "a", hit)[PAGES].block_id * 128 == hit


def test_a_hit_inside_a_page_is_refused(manager):
    with pytest.raises(RuntimeError, match="prefix hit of 100 tokens .* unset --prefix-match-unit"):
        claim(manager, "a", hit=100)


def test_a_resumed_request_gets_the_marker_of_its_new_hit(manager):
    claim(manager, "a", hit=128)
    manager.free("a")
    assert claim(manager, "a", hit=512)[PAGES].block_id == 4
    manager.free("a")
    assert claim(manager, "a")[PAGES].block_id == 0


def test_the_ring_is_never_prefix_cached(manager, pool):
    claim(manager, "a")
    assert all(block.block_hash is None for block in manager.req_to_blocks["a"])
    hit = OscarTailManager.find_longest_cache_hit(
        block_hashes=[], max_length=1000, kv_cache_group_ids=[1], block_pool=pool, kv_cache_spec=make_spec(),
        drop_eagle_block=False, alignment_tokens=128,
    )  # fmt: skip
    assert hit == (([],), 0)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(0, 9)), max_size=40))
@settings(deadline=None, max_examples=50)
def test_no_sequence_of_claims_and_frees_leaks_or_shares(history):
    pool = BlockPool(num_gpu_blocks=40, enable_caching=True, hash_block_size=128)
    manager = OscarTailManager(
        make_spec(), block_pool=pool, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=128
    )
    held = set()
    for request, frees, pages in history:
        if frees:
            manager.free(request)
            held.discard(request)
        elif request not in held:
            claim(manager, request, 128 * pages)
            held.add(request)
        blocks = [b.block_id for name in held for b in manager.req_to_blocks[name][:PAGES]]
        assert len(set(blocks)) == len(blocks) == PAGES * len(held)
        assert pool.get_num_free_blocks() == 39 - len(blocks)


def test_spec():
    spec = make_spec()
    assert spec.page_size_bytes == 2 * 128 * 90
    assert spec.max_memory_usage_bytes(None) == PAGES * spec.page_size_bytes
    assert not spec.prefix_cacheable
    assert spec.max_num_blocks_per_req(None, 100) == PAGES + 1  # the marker fits
    assert spec.max_num_blocks_per_req(None, 4096) == 32
    assert spec.is_uniform_with_collection({"a": make_spec()})
    assert not spec.is_uniform_with_collection({"a": make_spec(), "b": object()})


@pytest.mark.parametrize("split, blocks", [(1, 6), (2, 3), (4, 2), (5, 2), (25, 1)])
def test_blocks_of_several_pages(pool, split, blocks):
    """The worker's table, as vLLM makes it of the manager's row, holds every page of the ring once, and the hit."""
    spec = make_spec(split)
    assert spec.blocks == blocks and spec.max_memory_usage_bytes(None) == blocks * split * 2 * 128 * 90
    assert spec.max_num_blocks_per_req(None, 100) == blocks + 1
    manager = OscarTailManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=128 * split
    )
    assert needed(manager, "a") == blocks
    rows = [
        [block.block_id for block in claim(manager, name, hit)] for name, hit in (("a", 0), ("b", 384), ("c", 8064))
    ]
    assert all(len(row) == blocks + 1 for row in rows)
    table = torch.tensor([[block * split + page for block in row for page in range(split)] for row in rows])
    worker = spec.copy_with_new_block_size(128)
    assert worker.hit_tokens(table).tolist() == [0, 384, 8064]
    assert table[:, :PAGES].unique().numel() == 3 * PAGES


@pytest.fixture
def pages(pool) -> OscarPageManager:
    """Blocks of three pages; block 7 bears a hash that nothing has changed in this step."""
    spec = OscarPageSpec(block_size=384, num_kv_heads=2, head_size=128, dtype=torch.uint8, state_content_bytes=90)
    return OscarPageManager(spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=384)


def test_a_copy_of_what_this_step_writes_waits_for_the_next_step(pages, pool):
    blocks = pages.req_to_blocks["writer"] = pool.get_new_blocks(2)
    request = SimpleNamespace(
        request_id="writer",
        num_tokens=700,
        num_prompt_tokens=700,
        block_hashes=[bytes([i]) * 8 for i in range(5)],
        shared_prefix_boundary=0,
        kv_transfer_params=None,
    )
    pages.new_step_starts()
    pages.cache_blocks(request, 640, replay_boundaries=[])
    assert [block.block_hash_num_tokens for block in blocks] == [384, 640]

    def needed(hit: int, *found) -> int:
        return pages.get_num_blocks_to_allocate("reader", 900, list(found), hit, hit, 900)

    assert needed(640, *blocks) > pool.num_gpu_blocks
    assert needed(256, blocks[0]) > pool.num_gpu_blocks
    assert needed(384, blocks[0]) == 2  # no copy: it reads the block itself, which is stored before it is read
    pages.new_step_starts()
    assert needed(640, *blocks) == 2  # the last one and the copy
    pages.cache_blocks(request, 690, replay_boundaries=[])  # goes on behind what was cached
    assert needed(640, *blocks) == 2


@given(st.integers(0, 100_000), st.integers(0, 700), st.sampled_from([128, 256, 1000]))
def test_ring_start(context, hit_pages, window):
    hit = min(hit_pages * 128, context // 128 * 128)
    contexts, hits = torch.tensor([context]), torch.tensor([hit])
    windowed = ring_start(contexts, hits, window).item()
    assert windowed == max(context - window, hit, 0)
    plain = ring_start(contexts, hits, 0).item()
    assert plain == context - context % 128
    for start, capacity in ((windowed, window), (plain, 128)):
        assert hit <= start <= context  # what lies before a hit was never in this ring
        assert context - start <= capacity  # and the ring holds no more than that
        assert -(-start // 128) * 128 <= context  # pages that are read are full


def test_all_ring_groups_of_a_step_share_one_ring_start():
    """The first computes it, also when vLLM changes the tensors of a step in place for the next."""
    from vllm_oscar.engine.metadata import OscarTailMetadataBuilder

    def builder():
        made = object.__new__(OscarTailMetadataBuilder)  # without an engine
        made.kv_cache_spec, made._window, made._ring_start = make_spec(), 256, torch.zeros(4, dtype=torch.int32)
        return made

    def step(context: list[int], table: torch.Tensor):
        lens = torch.tensor(context, dtype=torch.int32) + 1
        starts = torch.arange(len(lens) + 1, dtype=torch.int32)
        return SimpleNamespace(query_start_loc=starts, seq_lens=lens, block_table_tensor=table)

    tables = [torch.full((2, PAGES + 1), group, dtype=torch.int32) for group in range(3)]
    for table in tables:
        table[:, PAGES] = torch.tensor([0, 3])  # the markers
    builders, newest = [builder() for _ in tables], step([300, 400], tables[0])
    for contexts in ([300, 400], [301, 700]):
        newest.seq_lens.copy_(torch.tensor(contexts) + 1)
        steps = [SimpleNamespace(**vars(newest) | {"block_table_tensor": table}) for table in tables]
        found = [builder.build(0, common) for builder, common in zip(builders, steps, strict=True)]
        expected = [contexts[0] - 256, max(contexts[1] - 256, 384)]
        assert [metadata.ring_start.tolist() for metadata in found] == [expected] * 3
        assert all(metadata.ring_start.data_ptr() == builders[0]._ring_start.data_ptr() for metadata in found)
        assert all(metadata.ring_table is table for metadata, table in zip(found, tables, strict=True))
    other = builders[1].build(0, step([1000, 384], tables[1]))  # another step's tensors
    assert other.ring_start.tolist() == [744, 384] and found[0].ring_start.tolist() == expected


def test_sinks_are_converted_in_place():
    """Loaded again, they keep the address that a captured graph knows."""
    from vllm_oscar.engine.impl import OscarImpl

    impl = object.__new__(OscarImpl)
    impl.sinks, impl._loaded_sinks = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)), None
    impl.process_weights_after_loading(torch.bfloat16)
    first = impl._loaded_sinks
    assert first.dtype == torch.float32 and first.tolist() == [1.0, -2.0] and not first.requires_grad
    impl.sinks.data.copy_(torch.tensor([3.0, 4.0]))
    impl.process_weights_after_loading(torch.bfloat16)
    assert impl._loaded_sinks is first and first.tolist() == [3.0, 4.0]


def test_a_cache_is_a_view_and_never_a_copy():
    from vllm_oscar.engine.impl import _blocks

    memory = torch.zeros(3, 2, 128, 90, dtype=torch.uint8)
    assert _blocks("pages", memory).data_ptr() == memory.data_ptr() and _blocks("pages", memory).shape == (3, 2, 11520)
    with pytest.raises(ValueError, match=r"the pages of shape .* do not hold the bytes of a page one after the other"):
        _blocks("pages", memory.transpose(1, 2).contiguous().transpose(1, 2))
