# SPDX-License-Identifier: Apache-2.0
"""Attention of long queries: one program per tile of query rows, over all it sees.

History is dequantized page by page in registers, with the query rotated once and the
accumulated output rotated back once; ring and the step's own tokens follow as in
ordinary flash attention, in the model's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_oscar.ops.triton import page as common
from vllm_oscar.ops.triton.page import (
    LOG2E,
    attend_group,
    attend_tail,
    find_request,
    normalise_rows,
    rotated_output,
)


@triton.jit
def prefill_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    pages_ptr,
    ring_ptr,
    key_table_ptr,
    value_table_ptr,
    block_table_ptr,
    ring_table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    ring_start_ptr,
    requests,
    ring_pages,
    scale,
    out_stride,
    out_head_stride,
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
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MIN_QUERY: tl.constexpr,  # requests with fewer tokens are left out
    DOT: tl.constexpr,
    CODES: tl.constexpr,
    PRECISE: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DIM: tl.constexpr = F.DIM
    DIM_PAD: tl.constexpr = F.DIM_PAD
    HALF_PAD: tl.constexpr = F.HALF_PAD
    program = tl.program_id(0)
    head = tl.program_id(1)
    request = find_request(query_start_ptr, program, requests, BLOCK_Q)
    begin = tl.load(query_start_ptr + request)
    length = tl.load(query_start_ptr + request + 1) - begin
    block = program - (begin // BLOCK_Q + request)
    if (length < MIN_QUERY) | (block < 0) | (block * BLOCK_Q >= length):
        return
    context = tl.load(seq_lens_ptr + request) - length
    ring_begin = tl.load(ring_start_ptr + request)

    row = tl.arange(0, BLOCK_M)
    token = block * BLOCK_Q + row // GROUP
    query_head = head * GROUP + row % GROUP
    is_row = (row < BLOCK_Q * GROUP) & (token < length)
    query_row = (begin + token).to(tl.int64)
    channel = tl.arange(0, DIM_PAD)
    column = tl.arange(0, HALF_PAD)
    in_row = is_row[:, None] & (channel < DIM)[None, :]
    query = tl.load(
        query_ptr + (query_row * query_stride + query_head * query_head_stride)[:, None] + channel[None, :],
        mask=in_row,
        other=0.0,
    ).to(DOT)
    logit_scale = scale * LOG2E
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)

    pages = (ring_begin + 127) // 128
    if pages > 0:
        key_table = key_table_ptr + channel[:, None] * HALF_PAD + column[None, :]
        q0 = tl.dot(query, tl.load(key_table).to(DOT), input_precision="ieee")
        q1 = tl.dot(query, tl.load(key_table + DIM_PAD * HALF_PAD).to(DOT), input_precision="ieee")
        q2 = q1
        if F.KEY_BITS > 2:
            exchanged = key_table + (DIM_PAD * HALF_PAD + (column ^ 1) - column)[None, :]
            q2 = tl.dot(query, tl.load(exchanged).to(DOT), input_precision="ieee")
        q0, q1, q2, row_scale = normalise_rows(q0, q1, q2, logit_scale * F.ROTATION_SCALE, PRECISE)
        zero = tl.zeros([BLOCK_M], tl.float32)
        acc0 = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
        acc1 = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
        table = block_table_ptr + request.to(tl.int64) * block_table_stride
        base = pages_ptr + head.to(tl.int64) * page_head_stride
        for index in range(0, (ring_begin + F.KEY_GROUP - 1) // F.KEY_GROUP):
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
        # rotate back relative to the total, whose size fp16 cannot be trusted with
        norm = (1.0 / tl.maximum(total, 1.0e-30))[:, None]
        value_table = value_table_ptr + column[:, None] * DIM_PAD + channel[None, :]
        acc = unrotate(acc0 * norm, tl.load(value_table), acc, PRECISE)
        acc = unrotate(acc1 * norm, tl.load(value_table + HALF_PAD * DIM_PAD), acc, PRECISE)
        acc = acc * (total * F.ROTATION_SCALE)[:, None]

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
    target = out_ptr + (query_row * out_stride + query_head * out_head_stride)[:, None] + channel[None, :]
    result = acc / tl.where(is_row, total, 1.0)[:, None]
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def unrotate(part, signs, acc, PRECISE: tl.constexpr):
    """``acc + part @ signs``. tf32 keeps the range of float32 and as many bits as fp16."""
    if PRECISE:
        return tl.dot(part, signs.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(part, signs.to(tl.float32), acc)


def prefill(
    out, query, key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_start,
    ring_pages, scale, fmt, *, min_query: int,
) -> None:
    """Attention of the requests with at least ``min_query`` tokens."""
    tokens, query_heads, dim = query.shape
    heads, requests = key.shape[1], seq_lens.shape[0]
    group, device = query_heads // heads, query.device
    F = common.layout(fmt, key.element_size())
    wide = dim > 128
    precise = query.dtype == torch.float32
    block_m = max(32 if wide or precise or common.is_interpreted() else 64, triton.next_power_of_2(2 * group))
    block_q = block_m // group
    prefill_kernel[(tokens // block_q + requests, heads)](
        out,
        query,
        key,
        value,
        pages,
        ring,
        common.rotation(dim, "key", device, torch.int8),
        common.rotation(dim, "value", device, torch.int8),
        block_table,
        ring_table,
        query_start_loc,
        seq_lens,
        ring_start,
        requests,
        ring_pages,
        scale,
        out.stride(0),
        out.stride(1),
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
        min_query,
        common.dot_dtype(query.dtype),
        common.codes_mode(),
        precise,
        4 if fmt.config.key_group <= 64 else 2,
        32,
        num_warps=4,
        num_stages=2,
    )
