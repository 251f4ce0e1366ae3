# SPDX-License-Identifier: Apache-2.0
"""The cache operations as Triton kernels: any NVIDIA GPU from sm_80, AMD, or the interpreter.

Arguments are those of :mod:`vllm_oscar.ops.reference`. No function synchronizes with
the device or looks at tensor contents on the host, and every grid depends on shapes
alone, so all of them can be captured in CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from vllm_oscar.core.format import PageFormat


def available() -> tuple[bool, str]:
    """Whether Triton is installed and has a GPU, or runs in its interpreter, and if not, why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return True, ""
    return False, "no GPU is visible to torch"


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
    from vllm_oscar.ops.triton import store as triton_store

    if not key.shape[0]:
        return
    triton_store.store_pages(
        _rows(key), _rows(value), pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_pages, fmt
    )


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
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``.

    Up to 16 tokens per request on average, all requests take the split-KV kernel.
    Beyond, it takes the requests of up to 16 tokens and the prefill kernel the others.
    """
    from vllm_oscar.ops.triton import decode as triton_decode
    from vllm_oscar.ops.triton import prefill as triton_prefill

    tokens = query.shape[0]
    if not tokens:
        return
    args = (
        out, _rows(query), _rows(key), _rows(value), pages, ring, block_table, ring_table,
        query_start_loc, seq_lens, ring_start, ring_pages, scale, fmt,
    )  # fmt: skip
    longest = triton_decode.MAX_QUERY
    mixed = tokens > longest * seq_lens.shape[0]
    if mixed:
        triton_prefill.prefill(*args, min_query=longest + 1)
    if not mixed or seq_lens.shape[0] > 1:
        triton_decode.decode(*args, mixed=mixed)


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
    from vllm_oscar.ops.triton import store as triton_store

    if not key.shape[0]:
        return
    triton_store.write_ring(
        _rows(key), _rows(value), ring, ring_table, query_start_loc, seq_lens, ring_pages, fmt
    )
