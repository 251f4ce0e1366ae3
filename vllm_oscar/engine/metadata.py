# SPDX-License-Identifier: Apache-2.0
"""Per-step metadata: what each KV-cache group knows of a step, built on the device and without synchronizing.

vLLM builds metadata per group, but an operation needs both groups' tables: the first layer
of a step joins them into the :class:`~vllm_oscar.ops.step.Step` that all layers share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_oscar.core import envs
from vllm_oscar.core.config import PAGE_TOKENS, get_preset
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import select
from vllm_oscar.ops.step import HostLengths, Step


@dataclass
class OscarTailMetadata(AttentionMetadata):
    """What the ring group knows of a step. ``R`` requests, int32 tensors.

    Attributes:
        ring_table: ``[R, pages + 1 or more]``, a request's ring and its hit marker.
        ring_start: ``[R]`` first position that is read from the ring.
    """

    ring_table: torch.Tensor
    ring_start: torch.Tensor


@dataclass
class OscarMetadata(AttentionMetadata):
    """What the page group knows of a step. ``R`` requests, int32 tensors.

    Attributes:
        num_actual_tokens: tokens of the step, without padding.
        max_query_len: upper bound on the tokens of a request, on the host.
        query_start_loc: ``[R + 1]``.
        seq_lens: ``[R]``, the step's tokens included.
        page_table: ``[R, M]``.
        host: the same lengths on the host.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    host: HostLengths
    _steps: dict[tuple[int, int | None], tuple[OscarTailMetadata, Step]] = field(default_factory=dict, repr=False)

    def step(self, tail: OscarTailMetadata, sliding_window: int | None, plan) -> Step:
        """The step of the layers whose ring group is ``tail`` and who see ``sliding_window`` tokens.

        Made once, and planned by ``plan(step, host)``.
        """
        key = id(tail), sliding_window
        found = self._steps.get(key)
        if found is None:
            requests = self.seq_lens.shape[0]
            step = Step(
                query_start_loc=self.query_start_loc,
                seq_lens=self.seq_lens,
                page_table=self.page_table[:requests],
                ring_table=tail.ring_table[:requests],
                ring_start=tail.ring_start[:requests],
                max_query_len=self.max_query_len,
                tables_settled=True,
            )
            found = self._steps[key] = tail, plan(step, self.host)
        return found[1]


def ring_start(context: torch.Tensor, hit_tokens: torch.Tensor, window: int) -> torch.Tensor:
    """First position that each request reads from its ring.

    Without a window only the open block is read from the ring. With one, so are the
    last ``window`` tokens, as far as this request has computed them itself: after a
    prefix hit the ring starts empty. ``context``, ``hit_tokens``: ``[R]``.
    """
    if not window:
        return context // PAGE_TOKENS * PAGE_TOKENS
    return torch.maximum((context - window).clamp(min=0), hit_tokens)


class OscarMetadataBuilder(AttentionMetadataBuilder[OscarMetadata]):
    """Builds the metadata of the page group."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decodes and verification steps first, as the attention kernels of decodes expect.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        if envs.lossless_codec():
            return AttentionCGSupport.NEVER
        name, head_dim = vllm_config.cache_config.cache_dtype, vllm_config.model_config.get_head_size()
        kernels = select.select(vllm_config.device_config.device_type, PageFormat.preset(name, head_dim))
        return AttentionCGSupport[getattr(kernels, "GRAPH_SUPPORT", "NEVER")]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> OscarMetadata:
        common = common_attn_metadata
        return OscarMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            page_table=common.block_table_tensor,
            host=HostLengths(
                query_start_loc=common.query_start_loc_cpu,
                seq_lens=common.seq_lens_cpu_upper_bound,
                decode_query_len=self.reorder_batch_threshold,
            ),
        )


class _Newest(NamedTuple):
    """A ``ring_start``, who computed it, and the tensors that it came from."""

    builder: OscarTailMetadataBuilder
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    ring_start: torch.Tensor


class OscarTailMetadataBuilder(AttentionMetadataBuilder[OscarTailMetadata]):
    """Builds the metadata of a ring group.

    A model with sliding windows has several (Gemma-3-27B: seven), whose tables differ, but
    not ``ring_start``. The first one of a step computes it for all.
    """

    _newest: ClassVar[_Newest | None] = None

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._window = get_preset(vllm_config.cache_config.cache_dtype).window
        # Full CUDA graphs replay with the address seen at capture, also for batches padded beyond max_num_seqs.
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, captured)
        self._ring_start = torch.zeros(rows, dtype=torch.int32, device=device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        return OscarMetadataBuilder.get_cudagraph_support(vllm_config, kv_cache_spec)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> OscarTailMetadata:
        common = common_attn_metadata
        newest = OscarTailMetadataBuilder._newest
        # A builder comes again only in another step, for which vLLM may have changed the same tensors.
        if (
            newest is None
            or newest.builder is self
            or newest.query_start_loc is not common.query_start_loc
            or newest.seq_lens is not common.seq_lens
        ):
            newest = _Newest(self, common.query_start_loc, common.seq_lens, self._compute_ring_start(common))
            OscarTailMetadataBuilder._newest = newest
        return OscarTailMetadata(ring_table=common.block_table_tensor, ring_start=newest.ring_start)

    def _compute_ring_start(self, common: CommonAttentionMetadata) -> torch.Tensor:
        """``[R]``, in memory of this builder."""
        table, starts, requests = common.block_table_tensor, common.query_start_loc, common.seq_lens.shape[0]
        context = common.seq_lens - (starts[1:] - starts[:-1])
        hit_tokens = table[:requests, self.kv_cache_spec.pages] * PAGE_TOKENS
        if requests > self._ring_start.shape[0]:
            raise RuntimeError(f"a step of {requests} requests, but only {self._ring_start.shape[0]} were announced")
        return self._ring_start[:requests].copy_(ring_start(context, hit_tokens, self._window))
