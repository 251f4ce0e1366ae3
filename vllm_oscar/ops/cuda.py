# SPDX-License-Identifier: Apache-2.0
"""The cache operations as CUDA kernels (``csrc/``); :mod:`vllm_oscar.ops.step` says what they do.

Nothing here synchronizes with the device, and every launch depends on shapes and
``Step.max_query_len`` alone: one CUDA graph serves all lengths, tables and contents.
Warps take work from each other as they get free, so that repeated calls differ by
rounding, unless ``VLLM_OSCAR_DETERMINISTIC=1`` (read once per step).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import cache as memoize

import torch

from vllm_oscar.core import envs
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops.library import NativeLibraryError, how_to_build, library_path, load
from vllm_oscar.ops.native import AttentionParams, Binding, CacheStruct, StepStruct, StoreParams, fields, format_struct
from vllm_oscar.ops.step import Cache, Limits, Step

GRAPH_SUPPORT = "UNIFORM_BATCH"
LIBRARY = library_path("cuda")
HEAD_DIMS = (64, 128, 256)
COUNTER_BYTES = 65536  # OSCAR_COUNTER_BYTES
MAX_DECODE_QUERY = 16
"""Longer queries are split: several launches per call."""
BINDING = Binding("CUDA", "cuda", (torch.float16, torch.bfloat16), alignment=16)


# ---- the library (csrc/include/oscar/launch.h) ---------------------------------------
class LaunchStruct(ctypes.Structure):
    """``OscarLaunch``."""

    _fields_ = [
        *fields(c_void_p, "workspace counters"),
        *fields(c_int64, "workspace_bytes"),
        *fields(c_int32, "first_token query_tokens warps tables_settled deterministic"),
    ]


@memoize
def _library() -> ctypes.CDLL:
    """The loaded library. Raises :class:`NativeLibraryError`."""
    library, sizes = load("cuda", LIBRARY), (c_int32 * 3)()
    library.oscar_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in (StoreParams, AttentionParams, LaunchStruct)]:
        raise NativeLibraryError(f"{LIBRARY} has another interface than this package; {how_to_build('cuda')}")
    library.oscar_error_string.restype = ctypes.c_char_p
    return library


def _call(function: str, device: int, *args) -> None:
    """Call the library with ``device`` as the current one. Raises ``RuntimeError`` with its reason."""
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _call(function, device, *args)
    code = getattr(_library(), function)(*args)
    if code:
        raise RuntimeError(f"{function}: {_library().oscar_error_string(code).decode()}")


def _stream(device: int) -> c_void_p:
    """The current stream. By the function that Triton uses: torch's public one makes an object each time."""
    return c_void_p(torch._C._cuda_getCurrentRawStream(device))


@memoize
def available() -> tuple[bool, str]:
    """Whether the library exists and runs on the current device, and if not, why not."""
    try:
        library = _library()
    except NativeLibraryError as error:
        return False, str(error)
    if not torch.cuda.is_available():
        return False, "no CUDA device is visible to torch"
    torch.cuda.init()
    code = library.oscar_probe()
    if code:
        return False, f"no kernel for this device ({library.oscar_error_string(code).decode()})"
    return True, ""


# ---- workspace and counters ------------------------------------------------------------
class _Memory:
    """What attention needs on one device. All calls there share it, so one stream must order them.

    Attributes:
        counters: zeros for the warps' bookkeeping, which every launch leaves as zeros.
        workspace: partial results of a launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(COUNTER_BYTES, dtype=torch.uint8, device=device)
        self.workspace = torch.empty(0, dtype=torch.uint8, device=device)
        # Graphs that were captured before the workspace grew still write to the old one. After reserve() none is.
        self._outgrown: list[torch.Tensor] = []

    def grow(self, size: int) -> None:
        self._outgrown.append(self.workspace)
        # At least twice the old one: all that were outgrown together are smaller than the newest.
        size = max(size, 2 * self.workspace.numel())
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.workspace.device)


_memories: dict[torch.device, _Memory] = {}


def _memory(device: torch.device, size: int) -> _Memory:
    """With ``size`` bytes of workspace; allocates only what is missing."""
    memory = _memories.get(device)
    if memory is None or memory.workspace.numel() < size:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"OScaR CUDA kernels: attention needs {size} bytes of workspace, which cannot be allocated while a "
                "CUDA graph is captured; call reserve() with limits that allow this step, or run it once before"
            )
        memory = _memories.setdefault(device, memory or _Memory(device))
        if memory.workspace.numel() < size:
            memory.grow(size)
    return memory


def _query_chunk(requests: int, max_query_len: int) -> int:
    """Query tokens per request of one launch: bounds the workspace for long queries."""
    return min(max_query_len, max(MAX_DECODE_QUERY, 1024 // requests))


def _workspace_bytes(params: AttentionParams, query_tokens: int, device: int) -> int:
    """Workspace of one launch; of ``params``, only shapes and format are read."""
    size, launch = c_int64(), LaunchStruct(query_tokens=query_tokens)
    _call("oscar_attention_workspace", device, ctypes.byref(params), ctypes.byref(launch), ctypes.byref(size))
    return size.value


@memoize
def _largest_workspace(fmt: PageFormat, limits: Limits, long_queries: bool, device: int) -> int:
    """Workspace of the largest launch within ``limits``."""
    group = limits.query_heads // limits.kv_heads
    params = AttentionParams(
        step=StepStruct(),
        cache=CacheStruct(kv_heads=limits.kv_heads, format=format_struct(fmt, limits.dtype.itemsize)),
        group=group,
    )
    longest = limits.tokens if long_queries else limits.decode_query_len
    largest = 0
    for requests in range(1, limits.requests + 1):
        params.step.requests = requests
        chunk = _query_chunk(requests, longest)
        # More query tokens need more, but up to eight query rows a multiprocessor has more warps.
        for query_tokens in {chunk, min(chunk, max(8 // group, 1))}:
            largest = max(largest, _workspace_bytes(params, query_tokens, device))
    return largest


def reserve(fmt: PageFormat, limits: Limits, *, long_queries: bool = True) -> None:
    """Allocate workspace and counters for every step within ``limits``: none of them moves or grows anything later.

    Without this, ``attention`` allocates what it misses, which it cannot while a graph is
    captured. Without ``long_queries``, only queries of up to ``decode_query_len`` tokens
    count: those beyond are attended by other kernels.
    """
    there = torch.empty(0, device=limits.device)  # its device has an index
    _memory(there.device, _largest_workspace(fmt, limits, long_queries, there.get_device()))


_LAUNCHES = "CUDA launches"  # in Step.native


def _launches(step: Step, cache: Cache, query: torch.Tensor, params: AttentionParams, warps: int) -> tuple:
    """Pointers to the launches of one call. Layers of the same shape share them."""
    shape = (cache.fmt, cache.kv_heads, query.shape[1], warps)
    known = step.native.get(_LAUNCHES)
    if known is None or known[0] != shape:
        chunk = _query_chunk(step.requests, step.max_query_len)
        memory = _memory(query.device, _workspace_bytes(params, chunk, query.get_device()))
        launches = [
            LaunchStruct(
                workspace=memory.workspace.data_ptr(),
                counters=memory.counters.data_ptr(),
                workspace_bytes=memory.workspace.numel(),
                first_token=first_token,
                query_tokens=chunk,
                warps=warps,
                tables_settled=step.tables_settled,
                deterministic=envs.deterministic(),
            )
            for first_token in range(0, step.max_query_len, chunk)
        ]
        known = step.native[_LAUNCHES] = shape, tuple([ctypes.byref(launch) for launch in launches])
    return known[1]


# ---- the operations ----------------------------------------------------------------------
def store_pages(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Quantize every block that becomes full in this step, from ring and new tokens."""
    if key.shape[0] and step.requests:
        params, device = BINDING.store(step, cache, key, value), key.get_device()
        _call("oscar_store_pages", device, ctypes.byref(params), _stream(device))


def attention(
    step: Step,
    cache: Cache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    *,
    warps: int = 0,
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``. ``warps``: per block, for measurements."""
    if key.shape[0] and step.requests:
        params, device = BINDING.attention(step, cache, query, key, value, out), query.get_device()
        for launch in _launches(step, cache, query, params, warps):
            _call("oscar_attention", device, ctypes.byref(params), launch, _stream(device))


def write_ring(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the newest tokens of each request, at most the ring's capacity."""
    if key.shape[0] and step.requests:
        params, device = BINDING.store(step, cache, key, value), key.get_device()
        _call("oscar_write_ring", device, ctypes.byref(params), _stream(device))
