# SPDX-License-Identifier: Apache-2.0
"""The cache operations as CUDA kernels (``csrc/``), bound through a plain C ABI.

The functions are those of :mod:`vllm_oscar.ops.reference`, plus ``max_query_len``, a
host-side upper bound on the tokens per request. Nothing here synchronizes with the
device, and every launch depends on shapes and ``max_query_len`` alone: one CUDA graph
serves all lengths, tables and contents. Attention needs a workspace of fixed address;
call :func:`reserve` before capturing graphs, or run each shape once before. Warps take
work from each other as they get free, so that repeated calls differ by rounding, unless
``VLLM_OSCAR_DETERMINISTIC=1`` (read when a call is made or captured).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from vllm_oscar.core import envs
from vllm_oscar.core.config import NormScope, ParamType
from vllm_oscar.core.format import PageFormat

GRAPH_SUPPORT = "UNIFORM_BATCH"
LIBRARY = Path(__file__).parents[1] / "lib" / "oscar_cuda.so"
HEAD_DIMS = (64, 128, 256)
COUNTER_BYTES = 65536  # OSCAR_COUNTER_BYTES
MAX_DECODE_QUERY = 16
"""Longer queries are split: several launches per call."""


# ---- the C ABI (csrc/include/oscar/abi.h) --------------------------------------
def _fields(kind, names: str) -> list:
    return [(name, kind) for name in names.split()]


class _Format(ctypes.Structure):
    _fields_ = _fields(
        ctypes.c_int32, "head_dim key_bits key_group value_group fp8_params norm exact_first_key integer_zero"
    ) + _fields(ctypes.c_float, "key_clip value_clip")


class _AttentionArgs(ctypes.Structure):
    _fields_ = (
        _fields(ctypes.c_void_p, "out query key value pages ring block_table ring_table query_start_loc seq_lens")
        + _fields(ctypes.c_void_p, "ring_start workspace counters")
        + _fields(ctypes.c_int64, "workspace_bytes out_token out_head query_token query_head key_token key_head")
        + _fields(ctypes.c_int64, "value_token value_head page_block page_head ring_block ring_head")
        + _fields(ctypes.c_int64, "block_table_row ring_table_row")
        + _fields(ctypes.c_int32, "requests kv_heads group ring_pages is_bf16 max_query_len first_token")
        + _fields(ctypes.c_float, "scale")
        + _fields(ctypes.c_int32, "warps tables_ready deterministic")
        + [("format", _Format)]
    )


class _StoreArgs(ctypes.Structure):
    _fields_ = (
        _fields(ctypes.c_void_p, "key value pages ring block_table ring_table query_start_loc seq_lens")
        + _fields(ctypes.c_int64, "key_token key_head value_token value_head page_block page_head")
        + _fields(ctypes.c_int64, "ring_block ring_head block_table_row ring_table_row")
        + _fields(ctypes.c_int32, "requests kv_heads max_query_len ring_pages is_bf16")
        + [("format", _Format)]
    )


@cache
def _library() -> ctypes.CDLL:
    """The loaded library. Raises ``OSError`` if it is missing or of another version."""
    library = ctypes.CDLL(str(LIBRARY))
    library.oscar_error_string.restype = ctypes.c_char_p
    sizes = ctypes.c_int32(), ctypes.c_int32()
    library.oscar_abi_sizes(*map(ctypes.byref, sizes))
    if [size.value for size in sizes] != [ctypes.sizeof(_AttentionArgs), ctypes.sizeof(_StoreArgs)]:
        raise OSError(f"{LIBRARY} belongs to another version of vllm-oscar; rebuild it")
    return library


def _call(function: str, args: ctypes.Structure, *rest) -> None:
    library = _library()
    code = getattr(library, function)(ctypes.byref(args), *rest)
    if code:
        raise RuntimeError(f"{function}: {library.oscar_error_string(code).decode()}")


@cache
def available() -> tuple[bool, str]:
    """Whether the library exists and runs on the current device, and if not, why not."""
    if not LIBRARY.exists():
        return False, "the CUDA library was not built (no nvcc, or it failed; OSCAR_NATIVE=cuda pip install . tells)"
    if not torch.cuda.is_available():
        return False, "no CUDA device is visible to torch"
    try:
        library = _library()
    except OSError as error:
        return False, str(error)
    torch.cuda.init()
    code = library.oscar_probe()
    if code:
        return False, f"no kernel for this device ({library.oscar_error_string(code).decode()})"
    return True, ""


@cache
def _format(fmt: PageFormat) -> _Format:
    config = fmt.config
    return _Format(
        head_dim=fmt.head_dim,
        key_bits=config.key_bits,
        key_group=config.key_group,
        value_group=config.value_group,
        fp8_params=config.key_param is ParamType.E4M3,
        norm=(NormScope.NONE, NormScope.HEAD, NormScope.JOINT).index(config.norm),
        exact_first_key=config.exact_first_key,
        integer_zero=config.integer_zero,
        key_clip=config.key_clip,
        value_clip=config.value_clip,
    )


# ---- argument checks -------------------------------------------------------------
def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"OScaR CUDA kernels: {message}")


def _check(
    fmt: PageFormat, model: dict[str, torch.Tensor], pages: dict, tables: dict, lengths: dict, ring_pages: int
) -> None:
    """Everything that the kernels take for granted, checked once before a launch.

    ``model``: ``[T, heads, D]`` in the model's dtype; ``pages``: page and ring storage;
    ``tables``: ``[R, n]``; ``lengths``: ``query_start_loc`` and per-request vectors.
    """
    key = model["key"]
    _require(fmt.head_dim in HEAD_DIMS, f"head_dim {fmt.head_dim} is not one of {HEAD_DIMS}")
    _require(key.dtype in (torch.float16, torch.bfloat16), f"dtype {key.dtype} is not fp16 or bf16")
    for name, x in model.items():
        _require(x.dtype == key.dtype and x.device == key.device, f"{name} is not {key.dtype} on {key.device}")
        _require(x.dim() == 3 and x.shape[0] == key.shape[0], f"{name} is {list(x.shape)}, not [tokens, heads, dim]")
        _require(x.shape[2] == fmt.head_dim and x.stride(2) == 1, f"{name}: {fmt.head_dim} contiguous channels needed")
        _require(x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0, f"{name} rows must be 16-byte aligned")
        _require(x.data_ptr() % 16 == 0, f"{name} must be 16-byte aligned")
    for name, x in pages.items():
        _require(x.dtype == torch.uint8 and x.device == key.device, f"{name} is not uint8 on {key.device}")
        _require(
            x.dim() == 3 and x.shape[1] == key.shape[1] and x.shape[2] == fmt.page_bytes and x.stride(2) == 1,
            f"{name} is {list(x.shape)}, not [blocks, {key.shape[1]}, {fmt.page_bytes}] with contiguous bytes",
        )
        _require(
            x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0,
            f"{name} must be 16-byte aligned",
        )
    requests = lengths["seq_lens"].shape[0]
    for name, x in (tables | lengths).items():
        _require(x.dtype == torch.int32 and x.device == key.device, f"{name} is not int32 on {key.device}")
        _require(x.stride(-1) == 1 or x.shape[-1] <= 1, f"{name} must be contiguous in its last dimension")
        expected = requests + (name == "query_start_loc")
        _require(x.shape[0] == expected, f"{name} has {x.shape[0]} entries for {requests} requests")
    width = tables["ring_table"].shape[1]
    _require(1 <= ring_pages <= width, f"ring_table has {width} columns for a ring of {ring_pages} pages")


def _strides(prefix: str, x: torch.Tensor, outer: str) -> dict[str, int]:
    """Byte strides of the two outer dimensions."""
    size = x.element_size()
    return {f"{prefix}_{outer}": x.stride(0) * size, f"{prefix}_head": x.stride(1) * size}


def _stream(device: torch.device) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


# ---- workspace ---------------------------------------------------------------------
_workspaces: dict[torch.device, torch.Tensor] = {}
_retired: list[torch.Tensor] = []  # CUDA graphs may still use them


@cache
def _workspace_bytes(fmt: PageFormat, requests: int, kv_heads: int, group: int, max_query_len: int, device: int) -> int:
    args = _AttentionArgs(
        requests=requests, kv_heads=kv_heads, group=group, max_query_len=max_query_len, format=_format(fmt)
    )
    size = ctypes.c_int64()
    with torch.cuda.device(device):
        _call("oscar_attention_workspace", args, ctypes.byref(size))
    return size.value


def _query_chunk(requests: int, max_query_len: int) -> int:
    """Query tokens per request of one launch: bounds the workspace for long queries."""
    return min(max_query_len, max(MAX_DECODE_QUERY, 1024 // requests))


@cache
def counters(device: torch.device) -> torch.Tensor:
    """Zeros for the warps' bookkeeping, which every call leaves as zeros; all calls on ``device`` share them."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "OScaR CUDA kernels: the first attention of a process is captured in a CUDA graph, which only records "
            "that counters be cleared; run it once before (vLLM: leave cudagraph_num_of_warmups at 1 or more)"
        )
    return torch.zeros(COUNTER_BYTES, dtype=torch.uint8, device=device)


def reserve(
    fmt: PageFormat, requests: int, kv_heads: int, query_heads: int, max_query_len: int, device: torch.device
) -> torch.Tensor:
    """The workspace for these bounds; grows, and never moves while it suffices.

    All layers share it: attention calls on one device must be ordered by one stream.
    """
    device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    chunk = _query_chunk(requests, max_query_len)
    size = _workspace_bytes(fmt, requests, kv_heads, query_heads // kv_heads, chunk, device.index)
    current = _workspaces.get(device)
    if current is None or current.numel() < size:
        if current is not None:
            _retired.append(current)
        # Powers of two: all retired workspaces together are smaller than the newest.
        current = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, device=device)
        _workspaces[device] = current
    return current


# ---- torch operators -----------------------------------------------------------------
# A format crosses the dispatcher as [head_dim, key_bits, ...] and [key_clip, value_clip].
_operators = torch.library.Library("vllm_oscar_cuda", "DEF")
_operators.define(
    "attention(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor pages, Tensor ring, "
    "Tensor block_table, Tensor ring_table, Tensor query_start_loc, Tensor seq_lens, Tensor ring_start, "
    "Tensor(b!) workspace, Tensor(c!) counters, int ring_pages, float scale, int max_query_len, int first_token, "
    "int[] layout, int warps=0, bool tables_ready=False, bool deterministic=False) -> ()"
)
_operators.define(
    "store_pages(Tensor key, Tensor value, Tensor(a!) pages, Tensor ring, Tensor block_table, Tensor ring_table, "
    "Tensor query_start_loc, Tensor seq_lens, int ring_pages, int max_query_len, int[] layout, float[] clips) -> ()"
)
_operators.define(
    "write_ring(Tensor key, Tensor value, Tensor(a!) ring, Tensor ring_table, "
    "Tensor query_start_loc, Tensor seq_lens, int ring_pages, int max_query_len, int[] layout) -> ()"
)


@cache
def _layout(fmt: PageFormat) -> tuple[list[int], list[float]]:
    f = _format(fmt)
    return [getattr(f, name) for name, _ in _Format._fields_[:8]], [fmt.config.key_clip, fmt.config.value_clip]


def _attention(
    out, query, key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_start,
    workspace, counters, ring_pages, scale, max_query_len, first_token, layout, warps=0, tables_ready=False,
    deterministic=False,
):  # fmt: skip
    args = _AttentionArgs(
        out=out.data_ptr(),
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        pages=pages.data_ptr(),
        ring=ring.data_ptr(),
        block_table=block_table.data_ptr(),
        ring_table=ring_table.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        ring_start=ring_start.data_ptr(),
        workspace=workspace.data_ptr(),
        counters=counters.data_ptr(),
        workspace_bytes=workspace.numel(),
        block_table_row=block_table.stride(0) * 4,
        ring_table_row=ring_table.stride(0) * 4,
        requests=seq_lens.shape[0],
        kv_heads=key.shape[1],
        group=query.shape[1] // key.shape[1],
        ring_pages=ring_pages,
        is_bf16=query.dtype == torch.bfloat16,
        max_query_len=max_query_len,
        first_token=first_token,
        scale=scale,
        warps=warps,
        tables_ready=tables_ready,
        deterministic=deterministic,
        format=_Format(*layout),
        **_strides("out", out, "token"),
        **_strides("query", query, "token"),
        **_strides("key", key, "token"),
        **_strides("value", value, "token"),
        **_strides("page", pages, "block"),
        **_strides("ring", ring, "block"),
    )
    with torch.cuda.device(query.device):
        _call("oscar_attention", args, _stream(query.device))


def _store_args(key, value, ring, ring_table, query_start_loc, seq_lens, ring_pages, max_query_len, **rest):
    return _StoreArgs(
        key=key.data_ptr(),
        value=value.data_ptr(),
        ring=ring.data_ptr(),
        ring_table=ring_table.data_ptr(),
        ring_table_row=ring_table.stride(0) * 4,
        query_start_loc=query_start_loc.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        requests=seq_lens.shape[0],
        kv_heads=key.shape[1],
        max_query_len=max_query_len,
        ring_pages=ring_pages,
        is_bf16=key.dtype == torch.bfloat16,
        **_strides("key", key, "token"),
        **_strides("value", value, "token"),
        **_strides("ring", ring, "block"),
        **rest,
    )


def _store_pages(
    key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_pages, max_query_len,
    layout, clips,
):  # fmt: skip
    args = _store_args(
        key, value, ring, ring_table, query_start_loc, seq_lens, ring_pages, max_query_len,
        pages=pages.data_ptr(),
        block_table=block_table.data_ptr(),
        block_table_row=block_table.stride(0) * 4,
        format=_Format(*layout, *clips),
        **_strides("page", pages, "block"),
    )  # fmt: skip
    with torch.cuda.device(key.device):
        _call("oscar_store_pages", args, _stream(key.device))


def _write_ring(key, value, ring, ring_table, query_start_loc, seq_lens, ring_pages, max_query_len, layout):
    args = _store_args(
        key, value, ring, ring_table, query_start_loc, seq_lens, ring_pages, max_query_len, format=_Format(*layout)
    )
    with torch.cuda.device(key.device):
        _call("oscar_write_ring", args, _stream(key.device))


_operators.impl("attention", _attention, "CUDA")
_operators.impl("store_pages", _store_pages, "CUDA")
_operators.impl("write_ring", _write_ring, "CUDA")
for _name in ("attention", "store_pages", "write_ring"):
    torch.library.register_fake(f"vllm_oscar_cuda::{_name}", lambda *args, **kwargs: None, lib=_operators)


def _operator(name: str):
    return getattr(torch.ops.vllm_oscar_cuda, name)


# ---- the operations ----------------------------------------------------------------------
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
    if not key.shape[0] or not seq_lens.shape[0]:
        return
    _check(
        fmt,
        {"key": key, "value": value},
        {"pages": pages, "ring": ring},
        {"block_table": block_table, "ring_table": ring_table},
        {"query_start_loc": query_start_loc, "seq_lens": seq_lens},
        ring_pages,
    )
    _operator("store_pages")(
        key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_pages,
        max_query_len or key.shape[0], *_layout(fmt),
    )  # fmt: skip


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
    warps: int = 0,
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``.

    ``max_query_len``: at least the longest query; the default is the number of tokens,
    which is safe and slow. ``warps``: per block, for measurements.
    """
    requests, heads = seq_lens.shape[0], key.shape[1]
    if not key.shape[0] or not requests:
        return
    _check(
        fmt,
        {"key": key, "value": value, "query": query, "out": out},
        {"pages": pages, "ring": ring},
        {"block_table": block_table, "ring_table": ring_table},
        {"query_start_loc": query_start_loc, "seq_lens": seq_lens, "ring_start": ring_start},
        ring_pages,
    )
    _require(query.shape[1] % heads == 0, f"{query.shape[1]} query heads do not divide among {heads} KV heads")
    _require(out.shape == query.shape, f"out is {list(out.shape)}, query {list(query.shape)}")
    longest = max_query_len or key.shape[0]
    workspace = reserve(fmt, requests, heads, query.shape[1], longest, query.device)
    chunk = _query_chunk(requests, longest)
    layout, _ = _layout(fmt)
    zeros, deterministic = counters(query.device), envs.deterministic()
    for first_token in range(0, longest, chunk):
        _operator("attention")(
            out, query, key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_start,
            workspace, zeros, ring_pages, scale, chunk, first_token, layout, warps, tables_ready, deterministic,
        )  # fmt: skip


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
    if not key.shape[0] or not seq_lens.shape[0]:
        return
    _check(
        fmt,
        {"key": key, "value": value},
        {"ring": ring},
        {"ring_table": ring_table},
        {"query_start_loc": query_start_loc, "seq_lens": seq_lens},
        ring_pages,
    )
    _operator("write_ring")(
        key, value, ring, ring_table, query_start_loc, seq_lens, ring_pages, max_query_len or key.shape[0],
        _layout(fmt)[0],
    )  # fmt: skip
