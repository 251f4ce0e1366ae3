# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of the ring: how much memory it is, and how vLLM's block manager hands it out.

Per-channel key groups span 128 tokens, so a block that is not full yet cannot be
quantized. Each request therefore owns a ring of ``pages`` blocks, each as large as a
compressed page so that both KV-cache groups share one block pool. It is claimed with
the request's first tokens, freed with the request, never grows and is never
prefix-cached: a prefix hit ends on a page boundary, where the open block is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec

from vllm_oscar.core.config import PAGE_TOKENS


@dataclass(frozen=True, kw_only=True)
class OscarTailSpec(CircularBufferSpec):
    """KV-cache spec of the ring: ``pages`` blocks a request, whatever its length.

    Attributes:
        pages: blocks of a request's ring.
        sliding_window: of the layer whose ring it is. It changes nothing about the ring. But
            vLLM groups layers by their spec, and if rings differ as the layers' pages do,
            the layers of a group of pages are those of a group of rings, which makes one
            :class:`~vllm_oscar.ops.step.Step` for each, and no group more.
    """

    pages: int
    sliding_window: int | None = None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.pages * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Row length of the ring table: the pages and the hit marker.

        At least a full-attention row, since model runner V1 before 0.31 computes a
        slot mapping for every group and would read past a shorter one.
        """
        return max(self.pages + 1, cdiv(max_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs) -> bool:
        return all(isinstance(spec, OscarTailSpec) for spec in kv_cache_specs.values())


class OscarTailManager(CircularBufferManager):
    """Claims a request's ring and tells the workers where it starts to be valid.

    After a prefix hit the ring holds nothing of the hit tokens, so readers need the
    length of the hit. It travels in the block table itself: the row of a request is
    its ``pages`` blocks followed by a marker whose block id is ``hit tokens / 128``.
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
        row.extend(self.block_pool.get_new_blocks(self.kv_cache_spec.pages))
        row.append(KVCacheBlock(block_id=hit_tokens // PAGE_TOKENS, is_null=True))
        return list(row)

    def get_num_blocks_to_allocate(self, request_id: str, *args, **kwargs) -> int:
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.pages

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._hit_tokens.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]
