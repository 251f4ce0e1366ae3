# SPDX-License-Identifier: Apache-2.0
"""One attention layer's forward pass: three operations in a fixed order."""

from __future__ import annotations

from typing import Protocol

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_oscar.core import envs
from vllm_oscar.core.config import get_preset
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.lossless import LosslessFormat
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.engine.metadata import OscarMetadata, OscarTailMetadata, appended_tokens
from vllm_oscar.engine.refusal import OTHER_MODEL, UnsupportedByOscar
from vllm_oscar.ops import select
from vllm_oscar.ops.step import Cache, HostLengths, Limits, Step


class Ring(Protocol):
    """What a layer needs of its tail (:class:`vllm_oscar.engine.tail.OscarTail`).

    Attributes:
        prefix: name under which vLLM keeps the ring group's metadata.
        pages: blocks of a request's ring.
        kv_cache: the ring's memory, set by vLLM when it binds the KV cache.
    """

    prefix: str
    pages: int
    kv_cache: torch.Tensor


def current_format(vllm_config: VllmConfig, head_dim: int) -> PageFormat | LosslessFormat:
    """Page layout for the engine that is being configured: preset, or the lossless test codec."""
    name = vllm_config.cache_config.cache_dtype
    if envs.lossless_codec():
        return LosslessFormat(get_preset(name), head_dim, vllm_config.model_config.dtype.itemsize)
    return PageFormat.preset(name, head_dim)


def _blocks(name: str, memory: torch.Tensor) -> torch.Tensor:
    """vLLM's ``[blocks, heads, 128, bytes per token]`` as ``[blocks, heads, page_bytes]``, never a copy."""
    try:
        return memory.view(*memory.shape[:2], -1)
    except RuntimeError:
        raise ValueError(
            f"the {name} of shape {list(memory.shape)} and strides {list(memory.stride())} do not hold the bytes of a "
            "page one after the other; unset VLLM_KV_CACHE_LAYOUT"
        ) from None


class OscarImpl(AttentionImpl[OscarMetadata]):
    """Causal decoder attention over INT2 pages, the 16-bit ring and the step's own tokens."""

    tail: Ring  # set when the layer's tail is made

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
        sinks: torch.Tensor | None = None,
        **kwargs,
    ) -> None:
        """What vLLM gives every impl; ``sinks``: ``[num_heads]`` of the model's weights, loaded later."""
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that share a KV cache": kv_sharing_target_layer_name is not None,
        }
        found = [what for what, present in unsupported.items() if present]
        if found:
            raise UnsupportedByOscar(f"--kv-cache-dtype {kv_cache_dtype} does not support {found[0]}; {OTHER_MODEL}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.soft_cap = logits_soft_cap or None  # some models say 0 for none
        self.sinks, self._loaded_sinks = sinks, None
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        vllm_config = get_current_vllm_config()
        self.fmt = current_format(vllm_config, head_size)
        device_type = vllm_config.device_config.device_type
        self.kernels = select.select(device_type, self.fmt)
        self.limits = self._limits(vllm_config, device_type)
        self.kernels.reserve(self.fmt, self.limits)
        self._bound: tuple[torch.Tensor, torch.Tensor, Cache] | None = None

    def _limits(self, vllm_config: VllmConfig, device_type: str) -> Limits:
        index = torch.accelerator.current_device_index() if device_type != "cpu" else None
        return Limits(
            requests=vllm_config.scheduler_config.max_num_seqs,
            tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            decode_query_len=1 + vllm_config.num_speculative_tokens + appended_tokens(vllm_config),
            query_heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            dtype=vllm_config.model_config.dtype,
            device=torch.device(device_type, index),
            sliding_window=self.sliding_window,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Convert the sinks; in place when weights are loaded again, since graphs keep their address."""
        if self.sinks is None:
            return
        loaded = self.sinks.detach().to(torch.float32, copy=True).contiguous()
        if self._loaded_sinks is None:
            self._loaded_sinks = loaded
        else:
            self._loaded_sinks.copy_(loaded)

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
        """Store, attend, keep the tail. ``query``, ``output``: ``[T, Hq, D]``; ``key``, ``value``: ``[T, H, D]``.

        Why in this order: :class:`vllm_oscar.ops.step.Kernels`.
        """
        if attn_metadata is None:  # memory profiling
            return output.fill_(0)
        step = attn_metadata.step(attn_metadata.tail or self._tail_metadata(), self.sliding_window, self._plan)
        cache = self._cache(kv_cache)
        tokens = attn_metadata.num_actual_tokens
        query, key, value, out = query[:tokens], key[:tokens], value[:tokens], output[:tokens]
        self.kernels.store_pages(step, cache, key, value)
        self.kernels.attention(step, cache, query, key, value, out)
        self.kernels.write_ring(step, cache, key, value)
        return output

    def _plan(self, step: Step, host: HostLengths) -> Step:
        """The step with a plan of its prefills, where the kernels make one."""
        plan = getattr(self.kernels, "plan", None)
        if plan is None or step.max_query_len <= host.decode_query_len:
            return step
        starts, lengths = host.query_start_loc.tolist(), host.seq_lens.tolist()
        return plan(step, self.fmt, self.limits, starts, lengths, host.decode_query_len)

    def _cache(self, kv_cache: torch.Tensor) -> Cache:
        """The layer's cache; made again when vLLM has bound other memory."""
        ring = self.tail.kv_cache
        if self._bound is None or self._bound[0] is not kv_cache or self._bound[1] is not ring:
            if self._loaded_sinks is None:
                self.process_weights_after_loading(self.limits.dtype)
            softmax = Softmax(self.scale, self.sliding_window, self.soft_cap, self._loaded_sinks)
            cache = Cache(_blocks("pages", kv_cache), _blocks("ring", ring), self.tail.pages, self.fmt, softmax)
            self._bound = kv_cache, ring, cache
        return self._bound[2]

    def _tail_metadata(self) -> OscarTailMetadata:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):  # speculative decoding: the base model comes first
            metadata = metadata[0]
        return metadata[self.tail.prefix]
