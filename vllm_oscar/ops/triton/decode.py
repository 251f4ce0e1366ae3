# SPDX-License-Identifier: Apache-2.0
"""Split-KV attention for short queries, and the rotation of queries and outputs.

One program attends ``BLOCK_Q`` tokens x the query heads of one KV head over one split:
split 0 is the exact tail (ring and the step's own tokens), the others share the pages
evenly. The grid depends on shapes alone, so one CUDA graph serves all lengths. Page
splits work in the rotated space; the combine kernel rotates their sum back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops.triton import page as common
from vllm_oscar.ops.triton.page import (
    LOG2E,
    attend_group,
    attend_tail,
    find_request,
    normalise_rows,
    rotated_output,
)

MAX_QUERY = 16
"""Longest query that the decode kernel takes when a batch also holds longer ones."""
_MAX_SPLITS = 128
_PROGRAMS_PER_SM = 8


@triton.jit
def rotate_query_kernel(
    query_ptr,
    out_ptr,  # float32 [rows, 2, HALF_PAD], key columns
    table_ptr,
    rows,
    heads,
    query_stride,
    query_head_stride,
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
    source = (row // heads).to(tl.int64) * query_stride + (row % heads) * query_head_stride
    query = tl.load(
        query_ptr + source[:, None] + channel[None, :], mask=is_row[:, None] & (channel < F.DIM)[None, :], other=0.0
    ).to(DOT)
    for j1 in tl.static_range(2):
        table = tl.load(table_ptr + j1 * DIM_PAD * HALF_PAD + channel[:, None] * HALF_PAD + column[None, :])
        rotated = tl.dot(query, table.to(DOT), input_precision="ieee")
        target = (row.to(tl.int64) * 2 + j1) * HALF_PAD
        tl.store(out_ptr + target[:, None] + column[None, :], rotated, mask=is_row[:, None])


@triton.jit
def split_range(pages, split, SPLITS: tl.constexpr):
    """Pages of page split 0 .. SPLITS-1."""
    per_split = (pages + SPLITS - 1) // SPLITS
    low = split * per_split
    return low, tl.minimum(low + per_split, pages)


@triton.jit
def decode_kernel(
    partial_ptr,  # float32 [SPLITS + 1, rows, heads, 2 * HALF_PAD]
    stats_ptr,  # float32 [SPLITS + 1, rows, heads, 2]: peak, total
    query_ptr,
    rotated_ptr,
    key_ptr,
    value_ptr,
    pages_ptr,
    ring_ptr,
    block_table_ptr,
    ring_table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    ring_start_ptr,
    requests,
    rows,
    ring_pages,
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    page_stride,
    page_head_stride,
    ring_stride,
    ring_head_stride,
    block_table_stride,
    ring_table_stride,
    F: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # tokens per program, BLOCK_Q * GROUP <= BLOCK_M
    BLOCKS_PER_REQUEST: tl.constexpr,  # 0: located by binary search
    SPLITS: tl.constexpr,
    MAX_QUERY: tl.constexpr,  # requests with more tokens are left out; 0: none
    DOT: tl.constexpr,
    CODES: tl.constexpr,
    PRECISE: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DIM_PAD: tl.constexpr = F.DIM_PAD
    HALF_PAD: tl.constexpr = F.HALF_PAD
    program = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if BLOCKS_PER_REQUEST:
        request = program // BLOCKS_PER_REQUEST
        block = program % BLOCKS_PER_REQUEST
        begin = tl.load(query_start_ptr + request)
    else:
        request = find_request(query_start_ptr, program, requests, BLOCK_Q)
        begin = tl.load(query_start_ptr + request)
        if BLOCK_Q > 1:
            block = program - (begin // BLOCK_Q + request)
        else:
            block = program - begin
    length = tl.load(query_start_ptr + request + 1) - begin
    if MAX_QUERY:
        if length > MAX_QUERY:
            return
    if (block < 0) | (block * BLOCK_Q >= length):
        return
    context = tl.load(seq_lens_ptr + request) - length
    ring_begin = tl.load(ring_start_ptr + request)
    low, high = split_range((ring_begin + 127) // 128, split - 1, SPLITS)
    if (split > 0) & (low >= high):
        return

    row = tl.arange(0, BLOCK_M)
    token = block * BLOCK_Q + row // GROUP
    query_head = head * GROUP + row % GROUP
    heads = tl.num_programs(1) * GROUP
    is_row = (row < BLOCK_Q * GROUP) & (token < length)
    query_row = (begin + token).to(tl.int64)
    if BLOCKS_PER_REQUEST:
        partial_row = request * MAX_QUERY + token
    else:
        partial_row = begin + token
    partial = (split * rows + partial_row) * heads + query_head  # at most 2**31 rows

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    logit_scale = scale * LOG2E
    if split == 0:
        channel = tl.arange(0, DIM_PAD)
        query = tl.load(
            query_ptr + query_row[:, None] * query_stride + query_head[:, None] * query_head_stride + channel[None, :],
            mask=is_row[:, None] & (channel < F.DIM)[None, :],
            other=0.0,
        ).to(DOT)
        acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
        peak, total, acc = attend_tail(
            query,
            tl.where(is_row, context + token, -1),
            begin,
            context,
            ring_begin,
            context + tl.minimum(length, (block + 1) * BLOCK_Q),
            key_ptr + head.to(tl.int64) * key_head_stride,
            value_ptr + head.to(tl.int64) * value_head_stride,
            key_stride,
            value_stride,
            ring_ptr + head.to(tl.int64) * ring_head_stride,
            ring_stride,
            ring_table_ptr + request.to(tl.int64) * ring_table_stride,
            ring_pages,
            logit_scale,
            peak,
            total,
            acc,
            F,
            DOT,
            BLOCK_N,
        )
        line = (partial.to(tl.int64) * (2 * HALF_PAD))[:, None]
        tl.store(partial_ptr + line + channel[None, :], acc, mask=is_row[:, None])
    else:
        column = tl.arange(0, HALF_PAD)
        source = rotated_ptr + ((query_row * heads + query_head) * (2 * HALF_PAD))[:, None] + column[None, :]
        q0 = tl.load(source, mask=is_row[:, None], other=0.0)
        q1 = tl.load(source + HALF_PAD, mask=is_row[:, None], other=0.0)
        q2 = q1
        if F.KEY_BITS > 2:
            q2 = tl.load(source + (HALF_PAD + (column ^ 1) - column)[None, :], mask=is_row[:, None], other=0.0)
        q0, q1, q2, row_scale = normalise_rows(q0, q1, q2, logit_scale * F.ROTATION_SCALE, PRECISE)
        zero = tl.zeros([BLOCK_M], tl.float32)
        acc0 = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
        acc1 = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
        table = block_table_ptr + request.to(tl.int64) * block_table_stride
        base = pages_ptr + head.to(tl.int64) * page_head_stride
        GROUPS: tl.constexpr = 128 // F.KEY_GROUP
        group_end = tl.minimum(high * GROUPS, (ring_begin + F.KEY_GROUP - 1) // F.KEY_GROUP)
        for index in range(low * GROUPS, group_end):
            peak, total, zero, acc0, acc1 = attend_group(
                base,
                page_stride,
                table,
                index,
                ring_begin,
                q0,
                q1,
                q2,
                row_scale,
                peak,
                total,
                zero,
                acc0,
                acc1,
                F,
                FOLD,
                CODES,
                PRECISE,
            )
        acc0, acc1 = rotated_output(zero, acc0, acc1, F, CODES)
        target = partial_ptr + (partial.to(tl.int64) * (2 * HALF_PAD))[:, None] + column[None, :]
        tl.store(target, acc0, mask=is_row[:, None])
        tl.store(target + HALF_PAD, acc1, mask=is_row[:, None])
    tl.store(stats_ptr + partial * 2, peak, mask=is_row)
    tl.store(stats_ptr + partial * 2 + 1, total, mask=is_row)


@triton.jit
def combine_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    table_ptr,
    query_start_ptr,
    ring_start_ptr,
    requests,
    rows,
    out_stride,
    out_head_stride,
    F: tl.constexpr,
    MAX_QUERY: tl.constexpr,  # 0: a program is a token; else a request and a token of it
    SPLITS: tl.constexpr,
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
        begin = tl.load(query_start_ptr + request)
        length = tl.load(query_start_ptr + request + 1) - begin
        if (length > MAX_QUERY) | (row % MAX_QUERY >= length):
            return
        out_row = begin + row % MAX_QUERY
    else:
        request = find_request(query_start_ptr, row, requests, 1)
        out_row = row
        if row >= tl.load(query_start_ptr + request + 1):
            return
    pages = (tl.load(ring_start_ptr + request) + 127) // 128
    per_split = (pages + SPLITS - 1) // SPLITS
    used = (pages + per_split - 1) // tl.maximum(per_split, 1)  # page splits with work

    column = tl.arange(0, HALF_PAD)
    channel = tl.arange(0, DIM_PAD)
    step = heads.to(tl.int64) * rows
    first = row.to(tl.int64) * heads + head
    peak = tl.load(stats_ptr + first * 2)
    for start in range(1, used + 1, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        peaks = tl.load(stats_ptr + (split * step + first) * 2, mask=split <= used, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(peaks, 0))
    tail_weight = tl.exp2(tl.load(stats_ptr + first * 2) - peak)
    total = tail_weight * tl.load(stats_ptr + first * 2 + 1)
    out = tail_weight * tl.load(partial_ptr + first * (2 * HALF_PAD) + channel)
    if used > 0:
        sum0 = tl.zeros([HALF_PAD], tl.float32)
        sum1 = tl.zeros([HALF_PAD], tl.float32)
        for start in range(1, used + 1, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            is_split = split <= used
            entry = split * step + first
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
        out += back * F.ROTATION_SCALE
    target = out_ptr + out_row.to(tl.int64) * out_stride + head.to(tl.int64) * out_head_stride
    tl.store(target + channel, (out / total).to(out_ptr.dtype.element_ty), mask=channel < F.DIM)


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
    out, query, key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_start,
    ring_pages, scale, fmt, *, mixed: bool,
) -> None:
    """Attention of all requests (``mixed`` false) or of those with at most MAX_QUERY tokens."""
    tokens, query_heads, dim = query.shape
    heads, requests = key.shape[1], seq_lens.shape[0]
    group, device = query_heads // heads, query.device
    F = common.layout(fmt, key.element_size())
    half = common.padded(dim // 2)
    typical = 1 if mixed else -(-tokens // requests)
    block_m = max(16, min(64, triton.next_power_of_2(group * typical)))
    block_q = block_m // group
    if mixed:
        per_request = -(-MAX_QUERY // block_q)
        blocks, rows = requests * per_request, requests * MAX_QUERY
    else:
        per_request, rows = 0, tokens
        blocks = tokens // block_q + requests if block_q > 1 else tokens
    splits = num_splits(requests * heads * -(-typical // block_q), block_table.shape[1], device)

    rotated = torch.empty(tokens * query_heads, 2, half, dtype=torch.float32, device=device)
    block_rows = 16 if tokens * query_heads < 4096 else 64
    dot = common.dot_dtype(query.dtype)
    rotate_query_kernel[(triton.cdiv(tokens * query_heads, block_rows),)](
        query,
        rotated,
        common.rotation(dim, "key", device, torch.int8),
        tokens * query_heads,
        query_heads,
        query.stride(0),
        query.stride(1),
        F,
        block_rows,
        dot,
        num_warps=4,
    )
    partial = torch.empty(splits + 1, rows, query_heads, 2 * half, dtype=torch.float32, device=device)
    stats = torch.empty(splits + 1, rows, query_heads, 2, dtype=torch.float32, device=device)
    decode_kernel[(blocks, heads, splits + 1)](
        partial,
        stats,
        query,
        rotated,
        key,
        value,
        pages,
        ring,
        block_table,
        ring_table,
        query_start_loc,
        seq_lens,
        ring_start,
        requests,
        rows,
        ring_pages,
        scale,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        pages.stride(0),
        pages.stride(1),
        ring.stride(0),
        ring.stride(1),
        block_table.stride(0),
        ring_table.stride(0),
        F,
        group,
        block_m,
        block_q,
        per_request,
        splits,
        MAX_QUERY if mixed else 0,
        dot,
        common.codes_mode(),
        query.dtype == torch.float32,
        fold_of(fmt),
        16,
        num_warps=decode_warps(block_m, dim),
        num_stages=2,
    )
    combine_kernel[(rows, query_heads)](
        out,
        partial,
        stats,
        common.rotation(dim, "value", device, torch.int8),
        query_start_loc,
        ring_start,
        requests,
        rows,
        out.stride(0),
        out.stride(1),
        F,
        MAX_QUERY if mixed else 0,
        splits,
        min(16, triton.next_power_of_2(splits)),
        num_warps=4,
    )
