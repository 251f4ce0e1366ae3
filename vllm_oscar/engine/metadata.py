# SPDX-License-Identifier: Apache-2.0
"""Per-step metadata, built once for all layers, on the device and without synchronizing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_oscar.core import envs
from vllm_oscar.core.config import PAGE_TOKENS, WINDOW_TOKENS, get_preset
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import select as ops
from vllm_oscar.ops.dense_prefill import Prefill


@dataclass
class OscarMetadata(AttentionMetadata):
    """What a step's requests look like. Tensors are int32.

    Attributes:
        num_actual_tokens: tokens of the step, without padding.
        max_query_len: upper bound over the batch, on the host.
        query_start_loc: ``[R + 1]``.
        seq_lens: ``[R]``, the step's tokens included.
        block_table: ``[R, M]`` pages, or for the tail the ring's pages and hit marker.
        ring_start: ``[R]`` (tail only) first position that is read from the ring.
        num_decodes: the first so many requests have at most ``max_decode_query_len`` tokens.
        prefills: rows of the others (CUDA only; elsewhere one kernel takes all requests).
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    ring_start: torch.Tensor | None = None
    num_decodes: int = 0
    max_decode_query_len: int = 0
    prefills: list[Prefill] = field(default_factory=list)


def ring_start(context: torch.Tensor, hit_tokens: torch.Tensor, recent_window: bool) -> torch.Tensor:
    """First position that each request reads from its ring.

    Without a window only the open block is read from the ring. With one, so are the
    last ``WINDOW_TOKENS`` tokens, as far as this request has computed them itself:
    after a prefix hit the ring starts empty. ``context``, ``hit_tokens``: ``[R]``.
    """
    if not recent_window:
        return context // PAGE_TOKENS * PAGE_TOKENS
    return torch.maximum((context - WINDOW_TOKENS).clamp(min=0), hit_tokens)


class OscarMetadataBuilder(AttentionMetadataBuilder[OscarMetadata]):
    """Builds the metadata of the page group."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decodes and verification steps first, as the attention kernels of decodes expect.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        name, head_dim = vllm_config.cache_config.cache_dtype, vllm_config.model_config.get_head_size()
        if envs.lossless_codec():
            return AttentionCGSupport.NEVER
        return ops.graph_support(vllm_config.device_config.device_type, PageFormat.preset(name, head_dim))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> OscarMetadata:
        common = common_attn_metadata
        num_decodes, prefills = common.num_reqs, []
        if self.device.type == "cuda":
            num_decodes, prefills = self._split(common)
        return OscarMetadata(
            num_decodes=num_decodes,
            max_decode_query_len=min(common.max_query_len, self.reorder_batch_threshold)
            if prefills
            else common.max_query_len,
            prefills=prefills,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
        )

    def _split(self, common: CommonAttentionMetadata) -> tuple[int, list[Prefill]]:
        """Leading short requests, and the rows of the rest, from host copies alone."""
        starts = common.query_start_loc_cpu.tolist()
        if common.max_query_len <= self.reorder_batch_threshold:
            return common.num_reqs, []
        lengths = [end - begin for begin, end in zip(starts, starts[1:], strict=False)]
        decodes = next(i for i, n in enumerate(lengths) if n > self.reorder_batch_threshold)
        seq_lens = common.seq_lens_cpu_upper_bound.tolist()  # exact for requests in prefill
        prefills = [
            Prefill(i, starts[i], starts[i + 1], seq_lens[i] - lengths[i])
            for i in range(decodes, common.num_reqs)
            if lengths[i]
        ]
        return decodes, prefills


class OscarTailMetadataBuilder(OscarMetadataBuilder):
    """Builds the metadata of the ring group; adds ``ring_start``."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._recent_window = get_preset(vllm_config.cache_config.cache_dtype).recent_window
        # Full CUDA graphs replay with the addresses seen at capture.
        rows = vllm_config.scheduler_config.max_num_seqs
        self._ring_start = torch.zeros(rows, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> OscarMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = metadata.query_start_loc
        context = metadata.seq_lens - (starts[1:] - starts[:-1])
        hit_tokens = metadata.block_table[:, self.kv_cache_spec.pages] * PAGE_TOKENS
        rows = context.shape[0]
        if rows > self._ring_start.shape[0]:  # a padded capture batch
            self._ring_start = torch.zeros(rows, dtype=torch.int32, device=context.device)
        metadata.ring_start = self._ring_start[:rows]
        metadata.ring_start.copy_(ring_start(context, hit_tokens[:rows], self._recent_window))
        return metadata
