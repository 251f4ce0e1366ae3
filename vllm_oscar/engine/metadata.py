# SPDX-License-Identifier: Apache-2.0
"""Per-step metadata: what each KV-cache group knows of a step, built on the device and without synchronizing.

vLLM builds metadata per group, but an operation needs both groups' tables: the first layer
of a step joins them into the :class:`~vllm_oscar.ops.step.Step` that all layers share.

Drafts. Model runner V2 builds both groups' metadata for every step of a drafter, or, where it
captures all of them in one CUDA graph, lets :meth:`update_draft_decode_metadata` bring it up to
date. V1 asks the page group alone (:meth:`OscarMetadataBuilder.build_for_drafting`); the ring's
side then comes from the table of the target's step before it, which had the same requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from vllm.config import VllmConfig
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

DRAFT_MODEL = "draft_model."
"""How the layers of a draft model are called; those of EAGLE and MTP continue the target's."""


@dataclass
class OscarTailMetadata(AttentionMetadata):
    """What the ring group knows of a step. ``R`` requests, int32 tensors.

    Attributes:
        ring_table: ``[R, pages + 1 or more]``, a request's ring and its hit marker.
        ring_start: ``[R]`` first position that is read from the ring.
        query_start_loc, seq_lens: what ``ring_start`` was computed from.
    """

    ring_table: torch.Tensor
    ring_start: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


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
        tail: of a drafter's step, where vLLM builds no metadata for the ring group.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    host: HostLengths
    tail: OscarTailMetadata | None = None
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


def appended_tokens(vllm_config: VllmConfig) -> int:
    """Tokens that a drafter adds to the target's before its first step.

    EAGLE and MTP replace the target's tokens by the next ones; a draft model reads the same
    tokens and the sampled one.
    """
    speculative = vllm_config.speculative_config
    return int(speculative is not None and speculative.method == "draft_model")


class OscarMetadataBuilder(AttentionMetadataBuilder[OscarMetadata]):
    """Builds the metadata of the page group."""

    supports_draft_decode_metadata_update = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decodes and verification steps first, as the attention kernels of decodes expect.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        of_draft = all(name.startswith(DRAFT_MODEL) for name in layer_names)
        self._appended = appended_tokens(vllm_config) if of_draft else 0

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
        # vLLM appends a draft model's token to all but the upper bounds.
        bounds, appended = common.seq_lens_cpu_upper_bound, self._appended
        return OscarMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            page_table=common.block_table_tensor,
            host=HostLengths(
                query_start_loc=common.query_start_loc_cpu,
                seq_lens=bounds + appended if appended else bounds,
                decode_query_len=self.reorder_batch_threshold + appended,
            ),
        )

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> OscarMetadata:
        """A step of V1's drafter, which has its page layers alone in mind."""
        metadata = self.build(0, common_attn_metadata)
        tail = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]].oscar_tail
        metadata.tail = tail.builder.build_for_drafting(common_attn_metadata, draft_index)
        return metadata

    def update_draft_decode_metadata(self, metadata: OscarMetadata) -> None:
        """Nothing to do: all that a step of decodes reads are tensors that vLLM updates itself."""


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

    supports_draft_decode_metadata_update = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._window = get_preset(vllm_config.cache_config.cache_dtype).window
        # Full CUDA graphs replay with the address seen at capture, also for batches padded beyond max_num_seqs.
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, captured)
        self._ring_start = torch.zeros(rows, dtype=torch.int32, device=device)
        self._table: torch.Tensor | None = None
        for name in layer_names:
            vllm_config.compilation_config.static_forward_context[name].builder = self

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        return OscarMetadataBuilder.get_cudagraph_support(vllm_config, kv_cache_spec)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> OscarTailMetadata:
        common = common_attn_metadata
        self._table = common.block_table_tensor
        newest = OscarTailMetadataBuilder._newest
        # A builder comes again only in another step, for which vLLM may have changed the same tensors.
        if (
            newest is None
            or newest.builder is self
            or newest.query_start_loc is not common.query_start_loc
            or newest.seq_lens is not common.seq_lens
        ):
            requests = common.seq_lens.shape[0]
            if requests > self._ring_start.shape[0]:
                raise RuntimeError(
                    f"a step of {requests} requests, but only {self._ring_start.shape[0]} were announced"
                )
            start = self._metadata(common, self._ring_start[:requests]).ring_start
            newest = OscarTailMetadataBuilder._newest = _Newest(self, common.query_start_loc, common.seq_lens, start)
        return OscarTailMetadata(self._table, newest.ring_start, common.query_start_loc, common.seq_lens)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> OscarTailMetadata:
        """For the requests of the newest step, whose table this is; V1 captures no drafts, so in memory of its own."""
        return self._metadata(common_attn_metadata, torch.empty_like(common_attn_metadata.seq_lens))

    def update_draft_decode_metadata(self, metadata: OscarTailMetadata) -> None:
        """Compute ``ring_start`` anew, in place, after vLLM has changed the lengths in place."""
        starts = metadata.query_start_loc
        context = metadata.seq_lens - (starts[1:] - starts[:-1])
        hit_tokens = self.kv_cache_spec.hit_tokens(metadata.ring_table[: context.shape[0]])
        metadata.ring_start.copy_(ring_start(context, hit_tokens, self._window))

    def _metadata(self, common: CommonAttentionMetadata, start: torch.Tensor) -> OscarTailMetadata:
        """With ``ring_start`` in ``start``."""
        metadata = OscarTailMetadata(self._table, start, common.query_start_loc, common.seq_lens)
        self.update_draft_decode_metadata(metadata)
        return metadata
