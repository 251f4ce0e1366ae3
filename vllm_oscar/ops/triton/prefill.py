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


@triton.jit
def prefill_kernel(
    out,
    query,
    key,
    value,
    key_table_ptr,
    value_table_ptr,
    step,
    cache,
    softmax,
    F: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MIN_QUERY: tl.constexpr,  # requests with fewer tokens are left out
    BLOCK_N: tl.constexpr,
):
    DIM_PAD: tl.constexpr = F.DIM_PAD
    HALF_PAD: tl.constexpr = F.HALF_PAD
    program = tl.program_id(0)
    head = tl.program_id(1)
    request = find_request(step, program, BLOCK_Q)
    tokens = step_tokens(step, request)
    block = program - first_block(tokens.begin, request, BLOCK_Q)
    if (tokens.length < MIN_QUERY) | (block < 0) | (block * BLOCK_Q >= tokens.length):
        return
    span = visible_span(step, softmax, request, tokens.context, block * BLOCK_Q, M)

    tile = query_tile(tokens, block, head, GROUP, BLOCK_M, BLOCK_Q)
    q = load_query(query, tile, F, M)
    channel = tl.arange(0, DIM_PAD)
    column = tl.arange(0, HALF_PAD)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)

    if span.pages > 0:
        key_table = key_table_ptr + channel[:, None] * HALF_PAD + column[None, :]
        q0 = tl.dot(q, tl.load(key_table).to(M.DOT), input_precision="ieee")
        q1 = tl.dot(q, tl.load(key_table + DIM_PAD * HALF_PAD).to(M.DOT), input_precision="ieee")
        q2 = q1
        if F.KEY_BITS > 2:
            exchanged = key_table + (DIM_PAD * HALF_PAD + (column ^ 1) - column)[None, :]
            q2 = tl.dot(q, tl.load(exchanged).to(M.DOT), input_precision="ieee")
        table = page_row(step, request)
        end = span.page + span.pages
        position = row_positions(tile, tokens.context)
        peak, total, out0, out1 = attend_pages(
            q0, q1, q2, cache, softmax, table, head.to(tl.int64), span.page, end, span, position, F, M
        )
        # rotate back relative to the total, whose size fp16 cannot be trusted with
        norm = (1.0 / tl.maximum(total, 1.0e-30))[:, None]
        value_table = value_table_ptr + column[:, None] * DIM_PAD + channel[None, :]
        acc = unrotate(out0 * norm, tl.load(value_table), acc, M.PRECISE)
        acc = unrotate(out1 * norm, tl.load(value_table + HALF_PAD * DIM_PAD), acc, M.PRECISE)
        acc = acc * (total * F.ROTATION_SCALE)[:, None]

    sums = attend_tail(
        q,
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
        Sums(peak, total, acc),
        F,
        M,
        BLOCK_N,
    )
    total = sums.total
    if M.SINKS:
        total = add_sink(total, sums.peak, softmax, tile.head)
    target = out.data + (tile.row * out.token + tile.head * out.head)[:, None] + channel[None, :]
    result = sums.acc / tl.where(tile.is_row, total, 1.0)[:, None]
    in_row = tile.is_row[:, None] & (channel < F.DIM)[None, :]
    tl.store(target, result.to(out.data.dtype.element_ty), mask=in_row)


@triton.jit
def unrotate(part, signs, acc, PRECISE: tl.constexpr):
    """``acc + part @ signs``. tf32 keeps the range of float32 and as many bits as fp16."""
    if PRECISE:
        return tl.dot(part, signs.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(part, signs.to(tl.float32), acc)


def prefill(
    step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    *, min_query: int,
) -> None:
    """Attention of the requests with at least ``min_query`` tokens."""
    tokens, query_heads, dim = query.shape
    heads, device = cache.kv_heads, query.device
    group = query_heads // heads
    small = dim > 128 or query.dtype == torch.float32 or layout.is_interpreted()
    block_m = max(32 if small else 64, triton.next_power_of_2(2 * group))
    block_q = block_m // group
    prefill_kernel[(tokens // block_q + step.requests, heads)](
        token_args("out", out),
        token_args("query", query),
        token_args("key", key),
        token_args("value", value),
        layout.rotation(dim, "key", device),
        layout.rotation(dim, "value", device),
        step_args(step),
        cache_args(cache),
        softmax_args(cache, query_heads),
        layout.page_layout(cache.fmt, key.element_size()),
        layout.mode(query.dtype, 4 if cache.fmt.config.key_group <= 64 else 2, cache.softmax),
        group,
        block_m,
        block_q,
        min_query,
        32,
        num_warps=4,
        num_stages=2,
    )
