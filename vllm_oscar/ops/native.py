# SPDX-License-Identifier: Apache-2.0
"""The C ABI of both native libraries: its structs, and the one place that checks arguments.

``csrc/include/oscar/abi.h`` has the same structs. The libraries trust every pointer, so a
:class:`Binding` checks each tensor once: a step's when it is first used, a layer's cache
when it is first used, the layers' tokens whenever their shapes differ from the layer
before. What a check has found is kept on the :class:`~vllm_oscar.ops.step.Step` and the
:class:`~vllm_oscar.ops.step.Cache`, so a layer's call only fills in addresses.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_oscar.core.config import NormScope
from vllm_oscar.core.format import FORMAT_VERSION, PageFormat
from vllm_oscar.core.ring import RingType
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.ops.step import Cache, Step

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NORMS = {NormScope.NONE: 0, NormScope.HEAD: 1, NormScope.JOINT: 2}


# ---- the structs -------------------------------------------------------------------
def fields(kind, names: str) -> list:
    """``_fields_`` of one C type."""
    return [(name, kind) for name in names.split()]


class FormatStruct(ctypes.Structure):
    """``OscarFormat``."""

    _fields_ = [
        *fields(c_int32, "version head_dim key_bits value_bits key_group value_group key_param_bytes norm"),
        *fields(c_int32, "first_token key_gain value_gain integer_zero"),
        *fields(c_float, "key_clip value_clip"),
        *fields(c_int32, "k_codes k_high v_codes v_high k_params v_scale v_zero norms first_key first_value"),
        *fields(c_int32, "page_bytes int8_ring ring_tokens"),
    ]


class StepStruct(ctypes.Structure):
    """``OscarStep``."""

    _fields_ = [
        *fields(c_void_p, "query_start_loc seq_lens page_table ring_table ring_start"),
        *fields(c_int64, "page_table_row ring_table_row"),
        *fields(c_int32, "requests max_query_len"),
    ]


class SoftmaxStruct(ctypes.Structure):
    """``OscarSoftmax``."""

    _fields_ = [("sinks", c_void_p), *fields(c_float, "scale soft_cap"), ("sliding_window", c_int32)]


class CacheStruct(ctypes.Structure):
    """``OscarCache``."""

    _fields_ = [
        *fields(c_void_p, "pages ring"),
        *fields(c_int64, "page_block page_head ring_block ring_head"),
        *fields(c_int32, "kv_heads ring_pages"),
        ("softmax", SoftmaxStruct),
        ("format", FormatStruct),
    ]


class TokensStruct(ctypes.Structure):
    """``OscarTokens``."""

    _fields_ = [("data", c_void_p), *fields(c_int64, "token head")]


class StoreParams(ctypes.Structure):
    """``OscarStoreParams``."""

    _fields_ = [
        ("step", StepStruct),
        ("cache", CacheStruct),
        *fields(TokensStruct, "key value"),
        ("dtype", c_int32),
    ]


class AttentionParams(ctypes.Structure):
    """``OscarAttentionParams``."""

    _fields_ = [
        ("step", StepStruct),
        ("cache", CacheStruct),
        *fields(TokensStruct, "query out key value"),
        *fields(c_int32, "dtype group"),
    ]


@lru_cache(maxsize=None)
def format_struct(fmt: PageFormat, itemsize: int) -> FormatStruct:
    """``fmt`` for a model whose elements have ``itemsize`` bytes."""
    config = fmt.config
    return FormatStruct(
        version=FORMAT_VERSION,
        head_dim=fmt.head_dim,
        key_bits=config.key_bits,
        value_bits=config.value_bits,
        key_group=config.key_group,
        value_group=config.value_group,
        key_param_bytes=config.key_param.nbytes,
        norm=_NORMS[config.norm],
        first_token=config.first_token,
        key_gain=config.key_gain,
        value_gain=config.value_gain,
        integer_zero=config.integer_zero,
        key_clip=config.key_clip,
        value_clip=config.value_clip,
        **{name: section.offset for name, section in fmt.sections.items()},
        first_key=fmt.first_key.offset,
        first_value=fmt.first_value.offset,
        page_bytes=fmt.page_bytes,
        int8_ring=fmt.ring_type is RingType.INT8,
        ring_tokens=fmt.ring_tokens_per_page(itemsize),
    )


def _shapes(*tensors: torch.Tensor) -> list:
    """All that a check of ``tensors`` looks at, their addresses aside."""
    return [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]


# ---- checks and conversion -----------------------------------------------------------
class _StepParams:
    """The parameters of a step's calls. Layers differ in addresses alone, so they share them."""

    def __init__(self, struct: StepStruct) -> None:
        self.store = StoreParams(step=struct)
        self.attention = AttentionParams(step=struct)
        self.store_tokens: tuple = ()  # what was checked last
        self.attention_tokens: tuple = ()


@dataclass(frozen=True)
class Binding:
    """How one library wants its arguments.

    Attributes:
        name: of the kernels, for messages.
        device_type: of all tensors.
        dtypes: of the model.
        alignment: of every address and stride of tokens, pages and ring, in bytes.
    """

    name: str
    device_type: str
    dtypes: tuple[torch.dtype, ...]
    alignment: int

    def store(self, step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> StoreParams:
        """Arguments of ``store_pages`` and ``write_ring``, valid until the step's next call."""
        state = self._state(step, cache)
        params, seen = state.store, (cache.kv_heads, cache.fmt, *_shapes(key, value))
        if seen != state.store_tokens:
            params.dtype = self._dtype(key)
            self._set_tokens(params.key, "key", key, key, cache.kv_heads, cache.fmt.head_dim)
            self._set_tokens(params.value, "value", value, key, cache.kv_heads, cache.fmt.head_dim)
            state.store_tokens = seen
        params.cache = self._cache(cache, key)
        params.key.data, params.value.data = self._address("key", key), self._address("value", value)
        return params

    def attention(
        self, step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> AttentionParams:
        """Arguments of ``attention``, valid until the step's next call."""
        state, sinks = self._state(step, cache), cache.softmax.sinks
        shapes = _shapes(query, out, key, value, *(() if sinks is None else (sinks,)))
        params, seen = state.attention, (cache.kv_heads, cache.fmt, *shapes)
        if seen != state.attention_tokens:
            heads, dim, query_heads = cache.kv_heads, cache.fmt.head_dim, query.shape[1]
            self.require(query_heads % heads == 0, f"{query_heads} query heads do not divide among {heads} KV heads")
            self.require(sinks is None or len(sinks) == query_heads, f"sinks are not of {query_heads} query heads")
            params.dtype, params.group = self._dtype(key), query_heads // heads
            for name, x in (("query", query), ("out", out), ("key", key), ("value", value)):
                count = query_heads if name in ("query", "out") else heads
                self._set_tokens(getattr(params, name), name, x, key, count, dim)
            state.attention_tokens = seen
        params.cache = self._cache(cache, key)
        params.query.data, params.out.data = self._address("query", query), self._address("out", out)
        params.key.data, params.value.data = self._address("key", key), self._address("value", value)
        return params

    def require(self, condition: bool, message: str) -> None:
        """``ValueError`` unless ``condition`` holds."""
        if not condition:
            raise ValueError(f"OScaR {self.name} kernels: {message}")

    def _dtype(self, key: torch.Tensor) -> int:
        self.require(key.dtype in self.dtypes, f"key is {key.dtype}, not one of {', '.join(map(str, self.dtypes))}")
        return DTYPES[key.dtype]

    def _state(self, step: Step, cache: Cache) -> _StepParams:
        state = step.native.get(self.name)
        if state is None:
            state = step.native[self.name] = _StepParams(self.step_struct(step))
        columns = step.ring_table.shape[1]
        self.require(columns >= cache.ring_pages, f"ring_table has {columns} columns for {cache.ring_pages} ring pages")
        return state

    def step_struct(self, step: Step) -> StepStruct:
        """The step's tensors, checked."""
        requests, device = step.requests, step.seq_lens.device
        self.require(device.type == self.device_type, f"the step is on {device}, not on {self.device_type}")
        self.require(step.max_query_len >= 1, f"max_query_len is {step.max_query_len}")
        for name, rows, dims in (
            ("query_start_loc", requests + 1, 1),
            ("seq_lens", requests, 1),
            ("page_table", requests, 2),
            ("ring_table", requests, 2),
            ("ring_start", requests, 1),
        ):
            x = getattr(step, name)
            self.require(x.dtype == torch.int32 and x.device == device, f"{name} is not int32 on {device}")
            self.require(x.dim() == dims and x.shape[0] == rows, f"{name} is {list(x.shape)} for {requests} requests")
            self.require(x.stride(-1) == 1 or x.shape[-1] <= 1, f"{name} must be contiguous in its last dimension")
        return StepStruct(
            query_start_loc=step.query_start_loc.data_ptr(),
            seq_lens=step.seq_lens.data_ptr(),
            page_table=step.page_table.data_ptr(),
            ring_table=step.ring_table.data_ptr(),
            ring_start=step.ring_start.data_ptr(),
            page_table_row=step.page_table.stride(0) * 4,
            ring_table_row=step.ring_table.stride(0) * 4,
            requests=requests,
            max_query_len=step.max_query_len,
        )

    def _cache(self, cache: Cache, key: torch.Tensor) -> CacheStruct:
        found = self.name, key.dtype  # the ring's geometry depends on it
        struct = cache.native.get(found)
        if struct is None:
            heads, size = cache.kv_heads, cache.fmt.page_bytes
            self.require(cache.ring_pages >= 1, "a ring needs at least one page")
            for name in ("pages", "ring"):
                x = getattr(cache, name)
                self.require(x.dtype == torch.uint8 and x.device == key.device, f"{name} is not uint8 on {key.device}")
                self.require(
                    x.dim() == 3 and x.shape[1:] == (heads, size) and x.stride(2) == 1,
                    f"{name} is {list(x.shape)}, not [blocks, {heads}, {size}] with contiguous bytes",
                )
                aligned = all(n % self.alignment == 0 for n in (x.data_ptr(), x.stride(0), x.stride(1)))
                self.require(aligned, f"{name} must be {self.alignment}-byte aligned")
            struct = cache.native[found] = CacheStruct(
                pages=cache.pages.data_ptr(),
                ring=cache.ring.data_ptr(),
                page_block=cache.pages.stride(0),
                page_head=cache.pages.stride(1),
                ring_block=cache.ring.stride(0),
                ring_head=cache.ring.stride(1),
                kv_heads=heads,
                ring_pages=cache.ring_pages,
                softmax=self._softmax(cache.softmax, key.device),
                format=format_struct(cache.fmt, key.dtype.itemsize),
            )
        return struct

    def _softmax(self, softmax: Softmax, device: torch.device) -> SoftmaxStruct:
        sinks = softmax.sinks
        if sinks is not None:
            plain = sinks.dtype == torch.float32 and sinks.device == device and sinks.is_contiguous()
            self.require(plain and sinks.dim() == 1, f"sinks are not contiguous float32 [query heads] on {device}")
        return SoftmaxStruct(
            sinks=None if sinks is None else sinks.data_ptr(),
            scale=softmax.scale,
            soft_cap=softmax.soft_cap or 0.0,
            sliding_window=softmax.sliding_window or 0,
        )

    def _set_tokens(
        self, struct: TokensStruct, name: str, x: torch.Tensor, key: torch.Tensor, heads: int, dim: int
    ) -> None:
        self.require(x.dtype == key.dtype and x.device == key.device, f"{name} is not {key.dtype} on {key.device}")
        self.require(x.device.type == self.device_type, f"{name} is on {x.device}, not on {self.device_type}")
        self.require(
            x.dim() == 3 and x.shape == (key.shape[0], heads, dim),
            f"{name} is {list(x.shape)}, not [{key.shape[0]} tokens, {heads} heads, {dim}]",
        )
        self.require(x.stride(2) == 1, f"the last dimension of {name} must be contiguous")
        struct.token, struct.head = x.stride(0) * x.element_size(), x.stride(1) * x.element_size()
        aligned = struct.token % self.alignment == 0 and struct.head % self.alignment == 0
        self.require(aligned, f"rows of {name} must be {self.alignment}-byte aligned")

    def _address(self, name: str, x: torch.Tensor) -> int:
        address = x.data_ptr()
        if address % self.alignment:
            self.require(False, f"{name} must be {self.alignment}-byte aligned")
        return address
