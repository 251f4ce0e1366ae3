# SPDX-License-Identifier: Apache-2.0
"""The cache operations in native CPU code: :mod:`vllm_oscar.ops.reference` has the definition.

The library (``csrc/cpu``) has a plain C ABI. This file is the only one that checks
arguments, since the other side trusts every pointer it is given: once for every combination
of shapes, because a decode step has no time for more.
"""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from vllm_oscar.core.config import NormScope
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.hadamard import hadamard

LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "oscar_cpu.so"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NORMS = {NormScope.NONE: 0, NormScope.HEAD: 1, NormScope.JOINT: 2}
_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # in the order of preference, worst first


class _Args(ctypes.Structure):
    """``OscarArgs`` of csrc/cpu/oscar_cpu.h, field by field."""

    _fields_ = [
        *((name, c_int32) for name in ("head_dim", "key_bits", "key_group", "value_group")),
        *((name, c_int32) for name in ("key_param_bytes", "norm", "integer_zero", "exact_first_key")),
        *((name, c_int64) for name in ("k_codes", "k_high", "v_codes", "k_params")),
        *((name, c_int64) for name in ("v_scale", "v_zero", "norms", "page_bytes")),
        *((name, c_float) for name in ("key_clip", "value_clip", "scale")),
        *((name, c_int32) for name in ("dtype", "requests", "heads", "query_heads", "ring_pages", "ring_tokens")),
        *((name, c_int32) for name in ("threads", "isa")),
        *((name, c_void_p) for name in ("query", "key", "value", "out", "pages", "ring")),
        *((name, c_void_p) for name in ("block_table", "ring_table", "query_start_loc", "seq_lens", "ring_start")),
        *((name, c_void_p) for name in ("hadamard", "hadamard_t")),
        *((name, c_int64) for name in ("query_token", "query_head", "key_token", "key_head")),
        *((name, c_int64) for name in ("value_token", "value_head", "out_token", "out_head")),
        *((name, c_int64) for name in ("page_stride", "page_head", "ring_stride", "ring_head")),
        *((name, c_int64) for name in ("block_table_row", "ring_table_row")),
    ]


@lru_cache(maxsize=None)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    path = Path(os.environ.get("OSCAR_CPU_LIBRARY", LIBRARY))
    if not path.exists():
        return None, f"{path} was not built (no C++ compiler, or it failed; OSCAR_NATIVE=cpu pip install . tells)"
    try:
        library = ctypes.CDLL(str(path))  # after torch, whose OpenMP runtime it shares
        size = library.oscar_cpu_args_size()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if size != ctypes.sizeof(_Args):
        return None, f"{path} was built from another version of vllm-oscar; install the package again"
    return library, ""


def available() -> tuple[bool, str]:
    """Whether the native library can be used, and if not, why not."""
    library, reason = _load()
    return library is not None, reason


@lru_cache(maxsize=None)
def isas() -> tuple[str, ...]:
    """Instruction sets that library and machine share, best last."""
    bits = _library().oscar_cpu_isas()
    return tuple(name for i, name in enumerate(_ISAS) if bits >> i & 1)


def _isa() -> int:
    """The best instruction set, or the one that ``OSCAR_CPU_ISA`` names."""
    name = os.environ.get("OSCAR_CPU_ISA") or isas()[-1]
    if name not in isas():
        raise ValueError(f"OSCAR_CPU_ISA={name} is not available here; use one of {', '.join(isas())}")
    return _ISAS.index(name)


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the native CPU kernels of vllm-oscar are not available: {reason}")
    return library


# ---- arguments ---------------------------------------------------------------------
@lru_cache(maxsize=None)
def _layout(fmt: PageFormat) -> dict[str, int | float]:
    """The fields that a page format determines, and the rotation."""
    config, sections = fmt.config, fmt.sections
    matrix = hadamard(fmt.head_dim).contiguous()
    return {
        "head_dim": fmt.head_dim,
        "key_bits": config.key_bits,
        "key_group": config.key_group,
        "value_group": config.value_group,
        "key_param_bytes": config.key_param.nbytes,
        "norm": _NORMS[config.norm],
        "integer_zero": config.integer_zero,
        "exact_first_key": config.exact_first_key,
        **{name: sections[name].offset for name in sections},
        "page_bytes": fmt.page_bytes,
        "key_clip": config.key_clip,
        "value_clip": config.value_clip,
        "hadamard": _kept(matrix),
        "hadamard_t": _kept(matrix.T.contiguous()),
    }


_KEPT: list[torch.Tensor] = []


def _kept(tensor: torch.Tensor) -> int:
    """Address of a tensor that lives as long as the process."""
    _KEPT.append(tensor)
    return tensor.data_ptr()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _set_tokens(args: _Args, name: str, x: torch.Tensor, like: torch.Tensor, heads: int, dim: int) -> None:
    _require(
        x.is_cpu and x.dtype == like.dtype and x.dim() == 3 and x.shape[1:] == (heads, dim),
        f"{name} must be a CPU tensor [tokens, {heads}, {dim}] of {like.dtype}, not {tuple(x.shape)} of {x.dtype}",
    )
    _require(x.shape[0] >= like.shape[0], f"{name} has {x.shape[0]} tokens, key has {like.shape[0]}")
    _require(x.stride(2) == 1, f"the last dimension of {name} must be contiguous")
    setattr(args, f"{name}_token", x.stride(0))
    setattr(args, f"{name}_head", x.stride(1))


def _set_blocks(args: _Args, name: str, prefix: str, x: torch.Tensor, heads: int, fmt: PageFormat) -> None:
    _require(
        x.is_cpu and x.dtype == torch.uint8 and x.dim() == 3 and x.shape[1:] == (heads, fmt.page_bytes),
        f"{name} must be uint8 [blocks, {heads}, {fmt.page_bytes}] on the CPU, not {tuple(x.shape)} of {x.dtype}",
    )
    _require(x.stride(2) == 1, f"the last dimension of {name} must be contiguous")
    setattr(args, f"{prefix}_stride", x.stride(0))
    setattr(args, f"{prefix}_head", x.stride(1))


def _set_ints(args: _Args, name: str, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    _require(
        x.is_cpu and x.dtype == torch.int32 and x.dim() == len(shape) and all(n >= m for n, m in zip(x.shape, shape)),
        f"{name} must be int32 of at least {shape} on the CPU, not {tuple(x.shape)} of {x.dtype}",
    )
    _require(x.stride(-1) == 1 or x.shape[-1] <= 1, f"{name} must be contiguous")
    if len(shape) == 2:
        setattr(args, f"{name}_row", x.stride(0))


# The tensors of a call in the order of their addresses in OscarArgs.
_TENSORS = (
    *("query", "key", "value", "out", "pages", "ring"),
    *("block_table", "ring_table", "query_start_loc", "seq_lens", "ring_start"),
)
_POINTERS = struct.Struct(f"{len(_TENSORS)}P")


def _checked(tensors: tuple, ring_pages: int, scale: float, fmt: PageFormat) -> _Args:
    """Everything but the addresses; an operation leaves out the tensors that it does not need."""
    given = dict(zip(_TENSORS, tensors))
    key, ring, seq_lens = given["key"], given["ring"], given["seq_lens"]
    _require(key.dtype in _DTYPES, f"the CPU kernels need fp32, bf16 or fp16 models, not {key.dtype}")
    requests, heads = seq_lens.shape[0], key.shape[1]
    args = _Args(**_layout(fmt))
    args.dtype, args.requests, args.heads, args.scale = _DTYPES[key.dtype], requests, heads, scale
    args.ring_pages, args.ring_tokens = ring_pages, fmt.ring_tokens_per_page(key.dtype.itemsize)
    args.threads, args.isa = torch.get_num_threads(), _isa()
    _require(ring_pages >= 1, "ring_pages must be positive")
    _set_tokens(args, "key", key, key, heads, fmt.head_dim)
    _set_tokens(args, "value", given["value"], key, heads, fmt.head_dim)
    _set_blocks(args, "ring", "ring", ring, heads, fmt)
    _set_ints(args, "ring_table", given["ring_table"], (requests, ring_pages))
    _set_ints(args, "query_start_loc", given["query_start_loc"], (requests + 1,))
    _set_ints(args, "seq_lens", seq_lens, (requests,))
    if given["pages"] is not None:
        _set_blocks(args, "pages", "page", given["pages"], heads, fmt)
        _set_ints(args, "block_table", given["block_table"], (requests, 0))
    if (query := given["query"]) is not None:
        args.query_heads = query_heads = query.shape[1]
        _require(query_heads % heads == 0, f"{query_heads} query heads are not a multiple of {heads} KV heads")
        _set_tokens(args, "query", query, key, query_heads, fmt.head_dim)
        _set_tokens(args, "out", given["out"], key, query_heads, fmt.head_dim)
        _set_ints(args, "ring_start", given["ring_start"], (requests,))
    return args


_CHECKED: dict[tuple, tuple[_Args, PageFormat]] = {}


def _call(function: str, tensors: tuple, ring_pages: int, scale: float, fmt: PageFormat) -> None:
    shapes = tuple([x if x is None else (x.shape, x.stride(), x.dtype, x.is_cpu) for x in tensors])
    choice = (torch.get_num_threads(), os.environ.get("OSCAR_CPU_ISA"))
    case = (shapes, ring_pages, scale, id(fmt), choice)
    if case not in _CHECKED:
        if len(_CHECKED) > 4096:
            _CHECKED.clear()
        # With the format itself, so that its id stays its own.
        _CHECKED[case] = _checked(tensors, ring_pages, scale, fmt), fmt
    args = _Args.from_buffer_copy(_CHECKED[case][0])
    _POINTERS.pack_into(args, _Args.query.offset, *[0 if x is None else x.data_ptr() for x in tensors])
    if getattr(_library(), function)(ctypes.byref(args)):
        raise MemoryError(f"{function}: no memory for scratch")


# ---- the operations ----------------------------------------------------------------
def store_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    ring: torch.Tensor,
    block_table: torch.Tensor,
    ring_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ring_pages: int,
    fmt: PageFormat,
    max_query_len: int | None = None,
) -> None:
    """Quantize every block that becomes full in this step, from ring and new tokens."""
    tensors = (None, key, value, None, pages, ring, block_table, ring_table, query_start_loc, seq_lens, None)
    _call("oscar_cpu_store_pages", tensors, ring_pages, 0.0, fmt)


def attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    ring: torch.Tensor,
    block_table: torch.Tensor,
    ring_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ring_start: torch.Tensor,
    ring_pages: int,
    scale: float,
    fmt: PageFormat,
    max_query_len: int | None = None,
    tables_ready: bool = False,
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``."""
    tables = (block_table, ring_table, query_start_loc, seq_lens, ring_start)
    _call("oscar_cpu_attention", (query, key, value, out, pages, ring, *tables), ring_pages, scale, fmt)


def write_ring(
    key: torch.Tensor,
    value: torch.Tensor,
    ring: torch.Tensor,
    ring_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ring_pages: int,
    fmt: PageFormat,
    max_query_len: int | None = None,
) -> None:
    """Write the newest tokens of each request, at most the ring's capacity."""
    tensors = (None, key, value, None, None, ring, None, ring_table, query_start_loc, seq_lens, None)
    _call("oscar_cpu_write_ring", tensors, ring_pages, 0.0, fmt)
