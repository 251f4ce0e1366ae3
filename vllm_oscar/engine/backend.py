# SPDX-License-Identifier: Apache-2.0
"""The attention backends: what they support."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS
from vllm_oscar.engine.metadata import OscarMetadataBuilder, OscarTailMetadataBuilder


class OscarBackend(AttentionBackend):
    """Backend of the model's Attention layers: INT2 pages."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = list(PRESETS)
    forward_includes_kv_cache_update = True
    name = "OSCAR"
    bytes_per_token: ClassVar[dict[int, int]] = {}
    """Of this process's layers by head size, per KV head; each layer enters itself when it is made."""

    @classmethod
    def get_name(cls) -> str:
        return cls.name

    @staticmethod
    def get_impl_cls():
        from vllm_oscar.engine.impl import OscarImpl

        return OscarImpl

    @staticmethod
    def get_builder_cls():
        return OscarMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return [PAGE_TOKENS]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(SUPPORTED_HEAD_DIMS)

    @classmethod
    def supported_kv_cache_layouts(cls):
        # Each needs the page of one (block, head) to be one contiguous run of bytes.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return capability is None or capability >= (8, 0)  # None: a CPU

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix,
        device_capability,
    ) -> str | None:  # fmt: skip
        if dtype == torch.float32 and device_capability is not None:
            return "dtype not supported"  # tensor cores take 16-bit queries
        return None

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec):
        """Our bytes for a spec that vLLM made to price a token, which it does to make blocks as large as states."""
        if spec.state_content_bytes is not None:
            return spec
        return replace(spec, state_content_bytes=cls.bytes_per_token[spec.head_size])

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # those that checks.py lets pass

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # prefills are planned from the host's lengths


class OscarTailBackend(OscarBackend):
    """Backend of the ring layers; never called, only asked for metadata and layout."""

    name = "OSCAR_TAIL"

    @staticmethod
    def get_builder_cls():
        return OscarTailMetadataBuilder
