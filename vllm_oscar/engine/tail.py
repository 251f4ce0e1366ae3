# SPDX-License-Identifier: Apache-2.0
"""The worker's side of the ring: the layer that owns one Attention layer's ring memory."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.engine.backend import OscarTailBackend
from vllm_oscar.engine.checks import mixes_pages
from vllm_oscar.engine.metadata import OscarTailMetadataBuilder
from vllm_oscar.engine.scheduler import OscarTailSpec


class OscarTail(nn.Module, AttentionLayerBase):
    """Holds memory and computes nothing.

    Registered in ``static_forward_context`` under ``<layer>.oscar_tail``, which is all
    that vLLM needs to give it a KV-cache group, a block table and memory.

    Attributes:
        builder: of the ring group's metadata; vLLM makes it after it has bound the memory.
    """

    builder: OscarTailMetadataBuilder

    def __init__(self, attention: nn.Module, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.prefix = attention.layer_name + ".oscar_tail"
        self.num_kv_heads = attention.num_kv_heads
        self.head_size = attention.head_size
        self.sliding_window = attention.sliding_window
        self.fmt = attention.impl.fmt
        self.pages = self.fmt.ring_pages(attention.dtype.itemsize, vllm_config.num_speculative_tokens)
        self.kv_cache = torch.tensor([])
        context = vllm_config.compilation_config.static_forward_context
        if self.prefix in context:
            raise ValueError(f"duplicate layer name: {self.prefix}")
        others = any(isinstance(layer, OscarTail) for layer in context.values())
        context[self.prefix] = self
        if others:
            # A layer comes behind its ring, so that the last one has pages: vLLM 0.31 and 0.32 take its group for
            # that of MTP's drafts. The first layer comes before it: V1 gives draft models the first group's table.
            context[attention.layer_name] = context.pop(attention.layer_name)
        attention.impl.tail = self

    def get_attn_backend(self):
        return OscarTailBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> OscarTailSpec:
        block_size = vllm_config.cache_config.block_size  # final by now: vLLM may have changed it since __init__
        extra = {"dcp_sharded": False} if "dcp_sharded" in {f.name for f in fields(OscarTailSpec)} else {}
        return OscarTailSpec(
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=torch.uint8,
            state_content_bytes=self.fmt.bytes_per_token,
            pages=self.pages,
            sliding_window=self.sliding_window,
            split=block_size // PAGE_TOKENS,
            mixed=mixes_pages(vllm_config),
            **extra,
        )

    def forward(self) -> None:
        raise RuntimeError("the OScaR tail layer holds memory, it is not called")
