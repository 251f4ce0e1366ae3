# SPDX-License-Identifier: Apache-2.0
"""One attention layer's forward pass: three operations in a fixed order."""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_oscar.core import envs
from vllm_oscar.core.config import get_preset
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.lossless import LosslessFormat
from vllm_oscar.engine.metadata import OscarMetadata
from vllm_oscar.engine.tail import OscarTail
from vllm_oscar.ops import select as ops


def current_format(head_dim: int):
    """Page layout for the engine that is being configured: preset, or the lossless test codec."""
    vllm_config = get_current_vllm_config()
    name = vllm_config.cache_config.cache_dtype
    if envs.lossless_codec():
        return LosslessFormat(get_preset(name), head_dim, vllm_config.model_config.dtype.itemsize)
    return PageFormat.preset(name, head_dim)


class OscarImpl(AttentionImpl[OscarMetadata]):
    """Causal decoder attention over INT2 pages, the 16-bit ring and the step's own tokens."""

    tail: OscarTail  # set when the layer's tail is created

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **kwargs,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "logit soft-capping": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that share a KV cache": kv_sharing_target_layer_name is not None,
            "attention sinks": kwargs.get("sinks") is not None,
        }
        found = [what for what, present in unsupported.items() if present]
        if found:
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype} does not support {found[0]}, which this model uses; "
                "serve it with --kv-cache-dtype auto"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.fmt = current_format(head_size)
        vllm_config = get_current_vllm_config()
        device_type = vllm_config.device_config.device_type
        self.ops = ops.select(device_type, self.fmt)
        self.dense_prefill = ops.select_prefill(device_type, self.ops)
        if self.dense_prefill:
            self.dense_prefill.reserve(
                self.fmt,
                self.num_kv_heads,
                vllm_config.model_config.dtype,
                vllm_config.scheduler_config.max_num_batched_tokens,
                torch.device(device_type, torch.accelerator.current_device_index()),
            )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: OscarMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store, attend, keep the tail. Shapes as in :mod:`vllm_oscar.ops.reference`.

        The order holds for the whole batch: full blocks first, because another request
        of this step may read them as a prefix hit; the ring last, because its slots
        still hold tokens that this step reads.
        """
        if attn_metadata is None:  # memory profiling
            return output.fill_(0)
        step, tail = attn_metadata, self._tail_metadata()
        rows = slice(step.num_actual_tokens)
        query, key, value, out = query[rows], key[rows], value[rows], output[rows]
        pages, ring = kv_cache.flatten(2), self.tail.kv_cache.flatten(2)
        tables = (step.block_table, tail.block_table)
        lengths = (step.query_start_loc, step.seq_lens)
        ring_pages, fmt, longest = self.tail.pages, self.fmt, step.max_query_len

        self.ops.store_pages(key, value, pages, ring, *tables, *lengths, ring_pages, fmt, max_query_len=longest)
        new = (out, query, key, value, pages, ring)
        if self.dense_prefill and step.prefills:
            self._attend_mixed(new, tables, lengths, tail.ring_start, step)
        else:
            self.ops.attention(
                *new, *tables, *lengths, tail.ring_start, ring_pages, self.scale, fmt, max_query_len=longest,
                tables_ready=True,  # store_pages came before, and does not write them
            )
        self.ops.write_ring(key, value, ring, tail.block_table, *lengths, ring_pages, fmt, max_query_len=longest)
        return output

    def _attend_mixed(self, new, tables, lengths, ring_start: torch.Tensor, step: OscarMetadata) -> None:
        """Decodes by the split-KV kernel, the requests behind them by FlashAttention."""
        decodes, (starts, seq_lens) = step.num_decodes, lengths
        common = (self.tail.pages, self.scale, self.fmt)
        if decodes:
            self.ops.attention(
                *new,
                *(table[:decodes] for table in tables),
                starts[: decodes + 1],
                seq_lens[:decodes],
                ring_start[:decodes],
                *common,
                max_query_len=step.max_decode_query_len,
                tables_ready=True,  # as in forward()
            )
        self.dense_prefill.attention(*new, *tables, *lengths, ring_start, *common, step.prefills)

    def _tail_metadata(self) -> OscarMetadata:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):  # speculative decoding: the base model comes first
            metadata = metadata[0]
        return metadata[self.tail.prefix]
