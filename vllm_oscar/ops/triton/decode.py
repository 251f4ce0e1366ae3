# SPDX-License-Identifier: Apache-2.0
"""Split-KV attention for short queries, and the rotation of queries and outputs.

One program attends ``BLOCK_Q`` tokens x the query heads of one KV head over one split:
split 0 is the tail (ring and the step's own tokens), the others share the pages
evenly. The grid depends on shapes alone, so one CUDA graph serves all lengths. Page
splits work in the rotated space; the combine kernel rotates their sum back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops.step import Cache, Step
from vllm_oscar.ops.triton import layout
from vllm_oscar.ops.triton.page import attend_pages
from vllm_oscar.ops.triton.tokens import (
    Sums,
    add_sink,
    attend_tail,
    cache_args,
    find_request,
    first_block,
    load_query,
    page_row,
    query_tile,
    ring_row,
    row_positions,
    softmax_args,
    step_args,
    step_tokens,
    token_args,
    visible_span,
)

MAX_QUERY = 16
"""Longest query that the decode kernel takes when a batch also holds longer ones."""
_MAX_SPLITS = 128
_PROGRAMS_PER_SM = 8


@triton.jit(do_not_specialize=["rows"])
def rotate_query_kernel(
    query,
    out_ptr,  # float32 [rows, 2, HALF_PAD], key columns
    table_ptr,
    rows,
    heads,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT: tl.constexpr,
):
    """``query @ H`` with unnormalised H, in the order of key columns."""
    HALF_PAD: tl.constexpr = F.HALF_PAD
    DIM_PAD: tl.constexpr = F.DIM_PAD
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    channel = tl.arange(0, DIM_PAD)
    column = tl.arange(0, HALF_PAD)
    source = (row // heads).to(tl.int64) * query.token + (row % heads) * query.head
    q = tl.load(
        query.data + source[:, None] + channel[None, :], mask=is_row[:, None] & (channel < F.DIM)[None, :], other=0.0
    ).to(DOT)
    for j1 in tl.static_range(2):
        table = tl.load(table_ptr + j1 * DIM_PAD * HALF_PAD + channel[:, None] * HALF_PAD + column[None, :])
        rotated = tl.dot(q, table.to(DOT), input_precision="ieee")
        target = (row.to(tl.int64) * 2 + j1) * HALF_PAD
        tl.store(out_ptr + target[:, None] + column[None, :], rotated, mask=is_row[:, None])


@triton.jit
def pages_per_split(pages, splits):
    return (pages + splits - 1) // splits


# Batches differ in rows and splits: specialising for them would compile the kernels again and again.
@triton.jit(do_not_specialize=["rows", "splits"])
def decode_kernel(
    partial_ptr,  # float32 [splits + 1, rows, heads, 2 * HALF_PAD]
    stats_ptr,  # float32 [splits + 1, rows, heads, 2]: peak, total
    query,
    rotated_ptr,
    key,
    value,
    step,
    cache,
    softmax,
    rows,
    splits,
    F: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # tokens per program, BLOCK_Q * GROUP <= BLOCK_M
    BLOCKS_PER_REQUEST: tl.constexpr,  # 0: located by binary search
    MAX_QUERY: tl.constexpr,  # requests with more tokens are left out; 0: none
    BLOCK_N: tl.constexpr,
):
    DIM_PAD: tl.constexpr = F.DIM_PAD
    HALF_PAD: tl.constexpr = F.HALF_PAD
    program = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if BLOCKS_PER_REQUEST:
        request = program // BLOCKS_PER_REQUEST
        tokens = step_tokens(step, request)
        block = program % BLOCKS_PER_REQUEST
    else:
        request = find_request(step, program, BLOCK_Q)
        tokens = step_tokens(step, request)
        block = program - first_block(tokens.begin, request, BLOCK_Q)
    if MAX_QUERY:
        if tokens.length > MAX_QUERY:
            return
    if (block < 0) | (block * BLOCK_Q >= tokens.length):
        return
    span = visible_span(step, softmax, request, tokens.context, 0, M)
    per_split = pages_per_split(span.pages, splits)
    low = (split - 1) * per_split  # split 0 is the tail
    high = tl.minimum(low + per_split, span.pages)
    if (split > 0) & (low >= high):
        return

    tile = query_tile(tokens, block, head, GROUP, BLOCK_M, BLOCK_Q)
    heads = tl.num_programs(1) * GROUP
    if BLOCKS_PER_REQUEST:
        partial_row = request * MAX_QUERY + tile.token
    else:
        partial_row = tokens.begin + tile.token
    partial = (split * rows + partial_row) * heads + tile.head  # at most 2**31 rows

    if split == 0:
        channel = tl.arange(0, DIM_PAD)
        empty = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sums = attend_tail(
            load_query(query, tile, F, M),
            tile,
            tokens,
            span,
            tokens.context + tl.minimum(tokens.length, (block + 1) * BLOCK_Q),
            key,
            value,
            cache,
            softmax,
            ring_row(step, request),
            head.to(tl.int64),
            Sums(empty, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, DIM_PAD], tl.float32)),
            F,
            M,
            BLOCK_N,
        )
        peak = sums.peak
        total = sums.total
        line = (partial.to(tl.int64) * (2 * HALF_PAD))[:, None]
        tl.store(partial_ptr + line + channel[None, :], sums.acc, mask=tile.is_row[:, None])
    else:
        column = tl.arange(0, HALF_PAD)
        is_row = tile.is_row
        source = rotated_ptr + ((tile.row * heads + tile.head) * (2 * HALF_PAD))[:, None] + column[None, :]
        q0 = tl.load(source, mask=is_row[:, None], other=0.0)
        q1 = tl.load(source + HALF_PAD, mask=is_row[:, None], other=0.0)
        q2 = q1
        if F.KEY_BITS > 2:
            q2 = tl.load(source + (HALF_PAD + (column ^ 1) - column)[None, :], mask=is_row[:, None], other=0.0)
        table = page_row(step, request)
        low += span.page
        high += span.page
        position = row_positions(tile, tokens.context)
        peak, total, out0, out1 = attend_pages(
            q0, q1, q2, cache, softmax, table, head.to(tl.int64), low, high, span, position, F, M
        )
        target = partial_ptr + (partial.to(tl.int64) * (2 * HALF_PAD))[:, None] + column[None, :]
        tl.store(target, out0, mask=is_row[:, None])
        tl.store(target + HALF_PAD, out1, mask=is_row[:, None])
    tl.store(stats_ptr + partial * 2, peak, mask=tile.is_row)
    tl.store(stats_ptr + partial * 2 + 1, total, mask=tile.is_row)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    out,
    partial_ptr,
    stats_ptr,
    table_ptr,
    step,
    softmax,
    rows,
    splits,
    F: tl.constexpr,
    M: tl.constexpr,
    MAX_QUERY: tl.constexpr,  # 0: a program is a token; else a request and a token of it
    BLOCK_S: tl.constexpr,
):
    """One query head of one token: merge the splits and rotate the pages' part back."""
    HALF_PAD: tl.constexpr = F.HALF_PAD
    DIM_PAD: tl.constexpr = F.DIM_PAD
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    if MAX_QUERY:
        request = row // MAX_QUERY
        token = row % MAX_QUERY
    else:
        request = find_request(step, row, 1)
        token = row - tl.load(step.query_start_loc + request)
    tokens = step_tokens(step, request)
    if token >= tokens.length:
        return
    if MAX_QUERY:
        if tokens.length > MAX_QUERY:
            return
    pages = visible_span(step, softmax, request, tokens.context, 0, M).pages
    per_split = pages_per_split(pages, splits)
    used = (pages + per_split - 1) // tl.maximum(per_split, 1)  # page splits with work

    column = tl.arange(0, HALF_PAD)
    channel = tl.arange(0, DIM_PAD)
    per_part = heads.to(tl.int64) * rows
    first = row.to(tl.int64) * heads + head
    peak = tl.load(stats_ptr + first * 2)
    for start in range(1, used + 1, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        peaks = tl.load(stats_ptr + (split * per_part + first) * 2, mask=split <= used, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(peaks, 0))
    tail_weight = tl.exp2(tl.load(stats_ptr + first * 2) - peak)
    total = tail_weight * tl.load(stats_ptr + first * 2 + 1)
    result = tail_weight * tl.load(partial_ptr + first * (2 * HALF_PAD) + channel)
    if used > 0:
        sum0 = tl.zeros([HALF_PAD], tl.float32)
        sum1 = tl.zeros([HALF_PAD], tl.float32)
        for start in range(1, used + 1, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            is_split = split <= used
            entry = split * per_part + first
            weight = tl.exp2(tl.load(stats_ptr + entry * 2, mask=is_split, other=float("-inf")) - peak)
            total += tl.sum(weight * tl.load(stats_ptr + entry * 2 + 1, mask=is_split, other=0.0), 0)
            source = partial_ptr + (entry * (2 * HALF_PAD))[:, None] + column[None, :]
            part0 = tl.load(source, mask=is_split[:, None], other=0.0)
            part1 = tl.load(source + HALF_PAD, mask=is_split[:, None], other=0.0)
            sum0 += tl.sum(part0 * weight[:, None], 0)
            sum1 += tl.sum(part1 * weight[:, None], 0)
        table = table_ptr + column[:, None] * DIM_PAD + channel[None, :]
        back = tl.sum(sum0[:, None] * tl.load(table).to(tl.float32), 0)
        back += tl.sum(sum1[:, None] * tl.load(table + HALF_PAD * DIM_PAD).to(tl.float32), 0)
        result += back * F.ROTATION_SCALE
    if M.SINKS:
        total = add_sink(total, peak, softmax, head)
    target = out.data + (tokens.begin + token).to(tl.int64) * out.token + head.to(tl.int64) * out.head
    tl.store(target + channel, (result / total).to(out.data.dtype.element_ty), mask=channel < F.DIM)


# ---- host -------------------------------------------------------------------------
def num_splits(programs: int, max_pages: int, device: torch.device) -> int:
    """Page splits per program row: enough programs to fill the device, from shapes alone."""
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        processors = 2
    splits = -(-processors * _PROGRAMS_PER_SM // max(programs, 1))
    return max(1, min(splits, max_pages, _MAX_SPLITS))


def fold_of(fmt: PageFormat) -> int:
    """Products need 16 tokens: with 32-token key groups a tile covers two slots."""
    return 2 if fmt.config.key_group == 32 else 1


def decode_warps(block_m: int, dim: int) -> int:
    """As few as keep everything in registers: warps of one row tile share its accumulators' columns."""
    return max(2 if dim <= 128 else 4, block_m // 16)


def decode(
    step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    *, mixed: bool,
) -> None:
    """Attention of all requests (``mixed`` false) or of those with at most MAX_QUERY tokens."""
    tokens, query_heads, dim = query.shape
    requests, heads, device = step.requests, cache.kv_heads, query.device
    F = layout.page_layout(cache.fmt, key.element_size())
    M = layout.mode(query.dtype, fold_of(cache.fmt), cache.softmax)
    half, group = layout.padded(dim // 2), query_heads // heads
    typical = 1 if mixed else min(step.max_query_len, -(-tokens // requests))
    block_m = max(16, min(64, triton.next_power_of_2(group * typical)))
    block_q = block_m // group
    if mixed:
        per_request = -(-MAX_QUERY // block_q)
        blocks, rows = requests * per_request, requests * MAX_QUERY
    else:
        per_request, rows = 0, tokens
        blocks = tokens // block_q + requests if block_q > 1 else tokens
    splits = num_splits(requests * heads * -(-typical // block_q), step.page_table.shape[1], device)

    S, C, Q = step_args(step), cache_args(cache), token_args("query", query)
    softmax = softmax_args(cache, query_heads)
    rotated = torch.empty(tokens * query_heads, 2, half, dtype=torch.float32, device=device)
    block_rows = 16 if tokens * query_heads < 4096 else 64
    rotate_query_kernel[(triton.cdiv(tokens * query_heads, block_rows),)](
        Q,
        rotated,
        layout.rotation(dim, "key", device),
        tokens * query_heads,
        query_heads,
        F,
        block_rows,
        M.DOT,
        num_warps=4,
    )
    partial = torch.empty(splits + 1, rows, query_heads, 2 * half, dtype=torch.float32, device=device)
    stats = torch.empty(splits + 1, rows, query_heads, 2, dtype=torch.float32, device=device)
    decode_kernel[(blocks, heads, splits + 1)](
        partial,
        stats,
        Q,
        rotated,
        token_args("key", key),
        token_args("value", value),
        S,
        C,
        softmax,
        rows,
        splits,
        F,
        M,
        group,
        block_m,
        block_q,
        per_request,
        MAX_QUERY if mixed else 0,
        16,
        num_warps=decode_warps(block_m, dim),
        num_stages=2,
    )
    combine_kernel[(rows, query_heads)](
        token_args("out", out),
        partial,
        stats,
        layout.rotation(dim, "value", device),
        S,
        softmax,
        rows,
        splits,
        F,
        M,
        MAX_QUERY if mixed else 0,
        min(16, triton.next_power_of_2(splits)),
        num_warps=4,
    )
