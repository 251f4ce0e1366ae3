# SPDX-License-Identifier: Apache-2.0
"""The cache operations in native CPU code; see :class:`vllm_oscar.ops.step.Kernels`.

The library (``csrc/cpu``) has a plain C ABI and trusts what :class:`~vllm_oscar.ops.native.Binding`
has checked. ``OSCAR_CPU_ISA`` names an instruction set, ``OSCAR_CPU_LIBRARY`` another library;
both are read once.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int32, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from vllm_oscar.core.format import FORMAT_VERSION, PageFormat
from vllm_oscar.core.hadamard import hadamard
from vllm_oscar.ops.library import NativeLibraryError, how_to_build, library_path, load
from vllm_oscar.ops.native import AttentionParams, Binding, StoreParams, fields
from vllm_oscar.ops.step import Cache, Limits, Step

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # in the order of preference, worst first
_BINDING = Binding("CPU", "cpu", (torch.float32, torch.bfloat16, torch.float16), alignment=1)


class _Run(ctypes.Structure):
    """``OscarCpuRun`` of csrc/cpu/oscar_cpu.h."""

    _fields_ = [*fields(c_void_p, "hadamard hadamard_t"), *fields(c_int32, "threads isa")]


# ---- the library -------------------------------------------------------------------
@lru_cache(maxsize=None)
def _library() -> ctypes.CDLL:
    """The loaded library. Raises :class:`NativeLibraryError`."""
    path = Path(os.environ.get("OSCAR_CPU_LIBRARY") or library_path("cpu"))
    library, sizes = load("cpu", path), (c_int32 * 3)()
    library.oscar_cpu_sizes(sizes)
    expected = [ctypes.sizeof(struct) for struct in (StoreParams, AttentionParams, _Run)]
    if list(sizes) != expected or library.oscar_cpu_format_version() != FORMAT_VERSION:
        raise NativeLibraryError(f"{path} has another interface than this package; {how_to_build('cpu')}")
    return library


def available() -> tuple[bool, str]:
    """Whether the native library can be used, and if not, why not."""
    try:
        _library()
    except NativeLibraryError as error:
        return False, str(error)
    return True, ""


# ---- how to run --------------------------------------------------------------------
@lru_cache(maxsize=None)
def isas() -> tuple[str, ...]:
    """Instruction sets that library and machine share, best last."""
    bits = _library().oscar_cpu_isas()
    return tuple(name for i, name in enumerate(ISAS) if bits >> i & 1)


@lru_cache(maxsize=None)
def _rotation(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hadamard matrix and its transpose; kept, as the library gets their addresses."""
    matrix = hadamard(head_dim).contiguous()
    return matrix, matrix.T.contiguous()


@lru_cache(maxsize=None)
def isa() -> str:
    """The instruction set in use: the best, or the one that ``OSCAR_CPU_ISA`` names.

    Raises ``ValueError`` if it is not available here.
    """
    name = os.environ.get("OSCAR_CPU_ISA") or isas()[-1]
    if name not in isas():
        raise ValueError(f"OSCAR_CPU_ISA={name} is not available here; use one of {', '.join(isas())}")
    return name


@lru_cache(maxsize=None)
def _run(head_dim: int, threads: int, isa: str) -> _Run:
    matrix, transposed = _rotation(head_dim)
    return _Run(matrix.data_ptr(), transposed.data_ptr(), threads, ISAS.index(isa))


def _call(function, params: ctypes.Structure, cache: Cache) -> None:
    how = _run(cache.fmt.head_dim, torch.get_num_threads(), isa())
    if function(ctypes.byref(params), ctypes.byref(how)):
        raise MemoryError(f"{function.__name__}: no memory for scratch")


# ---- the operations ----------------------------------------------------------------
def store_pages(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Quantize every block that becomes full in this step, from ring and new tokens."""
    _call(_library().oscar_cpu_store_pages, _BINDING.store(step, cache, key, value), cache)


def attention(
    step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``."""
    _call(_library().oscar_cpu_attention, _BINDING.attention(step, cache, query, key, value, out), cache)


def write_ring(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the newest tokens of each request, at most the ring's capacity."""
    _call(_library().oscar_cpu_write_ring, _BINDING.store(step, cache, key, value), cache)


def reserve(fmt: PageFormat, limits: Limits) -> None:
    """Nothing, since threads keep their scratch memory; but refuse a wrong ``OSCAR_CPU_ISA`` at start-up."""
    isa()
