# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of pages and ring: how much memory they are, and how vLLM's block manager hands it out.

Per-channel key groups span 128 tokens, so a block that is not full yet cannot be
quantized. Each request therefore owns a ring of ``pages`` pages, in blocks as large as
those of compressed pages so that all KV-cache groups share one block pool. It is claimed
with the request's first tokens, freed with the request, never grows and is never
prefix-cached: a prefix hit ends on a page boundary, where the open page is empty.

A block is one page of every head, unless the model has state-space layers too: then vLLM
makes blocks of ``split`` pages, so that one of them is as large as such a layer's state,
and gives the worker tables of single pages. Prefix hits may then end inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager, FullAttentionManager
from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec

from vllm_oscar.core.config import PAGE_TOKENS


@dataclass(frozen=True, kw_only=True)
class OscarTailSpec(CircularBufferSpec):
    """KV-cache spec of the ring: ``pages`` pages a request, whatever its length.

    Attributes:
        pages: that a request's ring takes.
        split: pages in a block. The worker's copy of the spec keeps it, although its
            ``block_size`` is then that of a page.
        sliding_window: of the layer whose ring it is. It changes nothing about the ring. But
            vLLM groups layers by their spec, and if rings differ as the layers' pages do,
            the layers of a group of pages are those of a group of rings, which makes one
            :class:`~vllm_oscar.ops.step.Step` for each, and no group more.
        mixed: layers in the model's dtype have pages in the same blocks.
    """

    pages: int
    split: int = 1
    sliding_window: int | None = None
    mixed: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of a request's ring."""
        return cdiv(self.pages, self.split)

    def hit_tokens(self, ring_table: torch.Tensor) -> torch.Tensor:
        """Lengths ``[R]`` of the requests' prefix hits, out of the worker's table ``[R, blocks * split + 1 or more]``.

        There block ``b`` has become pages ``b * split`` and following, and so has the marker.
        """
        return ring_table[:, self.blocks * self.split] // self.split * PAGE_TOKENS

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Row length of the ring table: the blocks and the hit marker.

        At least a full-attention row, since model runner V1 before 0.31 computes a
        slot mapping for every group and would read past a shorter one.
        """
        return max(self.blocks + 1, cdiv(max_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs) -> bool:
        return all(isinstance(spec, OscarTailSpec) for spec in kv_cache_specs.values())


class OscarTailManager(CircularBufferManager):
    """Claims a request's ring and tells the workers where it starts to be valid.

    After a prefix hit the ring holds nothing of the hit tokens, so readers need the
    length of the hit. It travels in the block table itself: the row of a request is
    its blocks followed by a marker whose block id is ``hit tokens / 128``.
    The marker is a null block, so it is never freed into the pool.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._hit_tokens: dict[str, int] = {}

    def add_local_computed_blocks(
        self, request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
    ) -> None:
        self._hit_tokens[request_id] = num_local_computed_tokens + num_external_computed_tokens

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[KVCacheBlock]:
        row = self.req_to_blocks[request_id]
        if row:
            return []
        hit_tokens = self._hit_tokens.pop(request_id, 0)
        if hit_tokens % PAGE_TOKENS:
            raise RuntimeError(
                f"prefix hit of {hit_tokens} tokens does not end on an OScaR page; "
                f"unset --prefix-match-unit (hits must be multiples of {PAGE_TOKENS} tokens)"
            )
        row.extend(self.block_pool.get_new_blocks(self.kv_cache_spec.blocks))
        row.append(KVCacheBlock(block_id=hit_tokens // PAGE_TOKENS, is_null=True))
        return list(row)

    def get_num_blocks_to_allocate(self, request_id: str, *args, **kwargs) -> int:
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._hit_tokens.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]


@dataclass(frozen=True, kw_only=True)
class OscarPageSpec(FullAttentionSpec):
    """KV-cache spec of pages where a block has several, and so hits may end inside a block."""


class OscarPageManager(FullAttentionManager):
    """Lets a request wait for the next step if it needs a copy of a block that this step writes.

    A request that hits the first pages of a block gets a copy of it. vLLM makes all copies of a
    step at its beginning, one from another's result too, and then they hold what was there before.
    It copies as many bytes as a state-space layer's state has: all pages of a block but the last,
    and a hit inside the block reads no more.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._hashed_in_this_step: set[int] = set()

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._hashed_in_this_step.clear()

    def cache_blocks(self, request, num_tokens: int, *args, **kwargs) -> None:
        cached = self.num_cached_block.get(request.request_id, 0)
        blocks = self.req_to_blocks[request.request_id][cached:]
        before = [block.block_hash_num_tokens for block in blocks]
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        self._hashed_in_this_step.update(
            block.block_id for block, tokens in zip(blocks, before) if block.block_hash_num_tokens != tokens
        )

    def get_num_blocks_to_allocate(
        self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, num_local_computed_tokens,
        *args, **kwargs,
    ) -> int:  # fmt: skip
        if self._has_partial_local_hit(new_computed_blocks, num_local_computed_tokens):
            if new_computed_blocks[-1].block_id in self._hashed_in_this_step:
                return self.block_pool.num_gpu_blocks + 1  # more than there are
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, num_local_computed_tokens,
            *args, **kwargs,
        )  # fmt: skip
