# SPDX-License-Identifier: Apache-2.0
"""Prefill on CUDA: dense FlashAttention over keys and values gathered in bounded pieces.

A long query is limited by arithmetic, not by memory, so it pays to dequantize each page
once into 16 bit and let the fastest dense kernel attend. A request without history
needs no gathering at all. The pieces live in one workspace for all layers, reserved
when the layers are made, so that memory profiling and CUDA graphs know it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import cuda

WORKSPACE_TOKENS = 16384
"""Keys and values gathered at a time (64 MiB for 8 KV heads of 128)."""


@dataclass(frozen=True)
class Prefill:
    """One request's rows in the step: tokens ``begin .. end - 1`` follow ``context`` older ones."""

    request: int
    begin: int
    end: int
    context: int


@lru_cache(maxsize=None)
def available() -> tuple[bool, str]:
    """Whether vLLM's FlashAttention and our CUDA library are usable here."""
    usable, reason = cuda.available()
    if not usable:
        return False, reason
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version()
    except ImportError as error:
        return False, str(error)
    return (True, "") if version in (2, 3) else (False, f"FlashAttention version {version}")


_workspaces: dict[tuple, torch.Tensor] = {}


def reserve(fmt: PageFormat, kv_heads: int, dtype: torch.dtype, max_step_tokens: int, device: torch.device) -> None:
    """Allocate the workspace: a piece of history, or one step's tokens and two pages if that is more."""
    _workspace(fmt, kv_heads, dtype, max_step_tokens + 2 * PAGE_TOKENS, device)


def _workspace(fmt: PageFormat, kv_heads: int, dtype: torch.dtype, tokens: int, device: torch.device) -> torch.Tensor:
    """``[2, n, kv_heads, head_dim]`` with n at least ``tokens`` and ``WORKSPACE_TOKENS``."""
    key = (fmt.head_dim, kv_heads, dtype, device)
    found = _workspaces.get(key)
    if found is None or found.shape[1] < tokens:
        rows = max(WORKSPACE_TOKENS, -(-tokens // PAGE_TOKENS) * PAGE_TOKENS)
        found = _workspaces[key] = torch.empty(2, rows, kv_heads, fmt.head_dim, dtype=dtype, device=device)
    return found


def gather(
    key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_start, ring_pages, fmt,
    request: int, first: int, count: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """Dense keys and values of positions ``first .. first + count - 1`` of one request.

    ``first`` is a multiple of 128; ``out``: ``[2, >= count, H, D]`` in the model's dtype.
    Other arguments as in :mod:`vllm_oscar.ops.reference`.
    """
    args = cuda._AttentionArgs(
        key=key.data_ptr(),
        value=value.data_ptr(),
        pages=pages.data_ptr(),
        ring=ring.data_ptr(),
        block_table=block_table.data_ptr(),
        ring_table=ring_table.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        ring_start=ring_start.data_ptr(),
        block_table_row=block_table.stride(0) * 4,
        ring_table_row=ring_table.stride(0) * 4,
        requests=seq_lens.shape[0],
        kv_heads=key.shape[1],
        ring_pages=ring_pages,
        is_bf16=key.dtype == torch.bfloat16,
        format=cuda._format(fmt),
        **cuda._strides("key", key, "token"),
        **cuda._strides("value", value, "token"),
        **cuda._strides("page", pages, "block"),
        **cuda._strides("ring", ring, "block"),
    )
    pointers = [ctypes.c_void_p(out[i].data_ptr()) for i in range(2)]
    with torch.cuda.device(key.device):
        cuda._call("oscar_gather", args, request, first, count, *pointers, cuda._stream(key.device))


def _flash(query, key, value, query_starts, key_starts, max_query: int, max_key: int, scale: float, causal: bool):
    """FlashAttention; returns the output ``[T, Hq, D]`` and its log-sum-exp ``[Hq, T]``."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    return flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=max_query,
        cu_seqlens_q=query_starts,
        max_seqlen_k=max_key,
        cu_seqlens_k=key_starts,
        softmax_scale=scale,
        causal=causal,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(),
    )


def attention(
    out, query, key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_start,
    ring_pages: int, scale: float, fmt: PageFormat, prefills: list[Prefill],
) -> None:  # fmt: skip
    """Causal attention of the given requests' rows; the other rows of ``out`` stay as they are."""
    index = 0
    while index < len(prefills):
        run = index
        while run < len(prefills) and prefills[run].context == 0:
            run += 1
        if run > index:  # adjacent requests without history: one launch, nothing to gather
            group = prefills[index:run]
            rows = slice(group[0].begin, group[-1].end)
            starts = query_start_loc[group[0].request : group[-1].request + 2] - group[0].begin
            longest = max(item.end - item.begin for item in group)
            out[rows] = _flash(query[rows], key[rows], value[rows], starts, starts, longest, longest, scale, True)[0]
            index = run
            continue
        item = prefills[index]
        sources = (
            key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_start, ring_pages, fmt,
        )  # fmt: skip
        out[item.begin : item.end] = _with_history(query[item.begin : item.end], sources, item, scale)
        index += 1


def _with_history(query: torch.Tensor, sources: tuple, item: Prefill, scale: float) -> torch.Tensor:
    """Attention of one request's rows over its history and themselves, piece by piece."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    key, fmt = sources[0], sources[-1]
    tokens = item.end - item.begin
    length = item.context + tokens
    space = _workspace(fmt, key.shape[1], key.dtype, tokens + PAGE_TOKENS, key.device)
    rows = space.shape[1] // PAGE_TOKENS * PAGE_TOKENS
    # The last piece holds the step's own tokens and is the only causal one.
    last = max(0, -(-(length - rows) // PAGE_TOKENS) * PAGE_TOKENS)
    pieces = [(begin, min(begin + rows, last)) for begin in range(0, last, rows)] + [(last, length)]
    query_starts = torch.tensor([0, tokens], dtype=torch.int32, device=query.device)
    result = lse = None
    for begin, end in pieces:
        count = end - begin
        gather(*sources, item.request, begin, count, space)
        key_starts = torch.tensor([0, count], dtype=torch.int32, device=query.device)
        part, part_lse = _flash(
            query, space[0, :count], space[1, :count], query_starts, key_starts, tokens, count, scale, begin == last
        )
        if result is None:
            result, lse = part, part_lse
        else:
            merged, merged_lse = torch.empty_like(result), torch.empty_like(lse)
            merge_attn_states(merged, result, lse, part, part_lse, merged_lse)
            result, lse = merged, merged_lse
    return result
