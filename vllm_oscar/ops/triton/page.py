# SPDX-License-Identifier: Apache-2.0
"""Attention over quantized pages, shared by decode and prefill: code words to logits and weighted values."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_oscar.ops.triton.codes import e4m3_to_half, half_dot
from vllm_oscar.ops.triton.subsets import (
    Subset,
    add_subset_values,
    column_offsets,
    load_columns,
    slot_of,
    subset_scores,
)
from vllm_oscar.ops.triton.tokens import LOG2E, as_pointer, soft_capped


class RotatedQuery(NamedTuple):
    """Rotated query rows of at most 1, key columns ``[rows, HALF_PAD]``; fp16 or (PRECISE) float32."""

    q0: tl.tensor  # key columns j1 = 0
    q1: tl.tensor  # j1 = 1
    q2: tl.tensor  # q1 with even and odd columns exchanged (keys of more than 2 bits)
    scale: tl.tensor  # [rows]: factor of the logits, in powers of two


class PageSums(NamedTuple):
    """Online softmax of query rows over pages, in the rotated space."""

    peak: tl.tensor  # [rows] running maximum
    total: tl.tensor  # [rows] running sum
    zero: tl.tensor  # [rows] sum of p * value zero
    acc0: tl.tensor  # [rows, HALF_PAD] value columns j0 = 0, scaled as in rotated_output
    acc1: tl.tensor  # j0 = 1


@triton.jit
def load_key_params(page, base, cell, half, F: tl.constexpr, mask):
    """Of the parameter row at element ``base``: key columns j1 = 0, j1 = 1, and the latter exchanged.

    ``cell``, ``half``: of every column, (t, tile) and half. fp16, which is exact.
    """
    if F.FP16_PARAMS:
        row = as_pointer(page, F.K_PARAMS, tl.float16) + base + 4 * cell
        first = load_columns(row + half, mask, F)
        second = load_columns(row + 2 + half, mask, F)
        exchanged = load_columns(row + 3 - half, mask, F)
        return first, second, exchanged
    else:  # one word holds both halves of both columns
        words = load_columns(as_pointer(page + base, F.K_PARAMS, tl.uint32) + cell, mask, F)
        shift = (8 * half).to(tl.uint32)
        return (
            e4m3_to_half((words >> shift) & 0xFF),
            e4m3_to_half((words >> (shift + 16)) & 0xFF),
            e4m3_to_half((words >> (24 - shift)) & 0xFF),
        )


@triton.jit
def dot_vector(q, x0, x1, F: tl.constexpr, M: tl.constexpr):
    """Logits with one key ``x0, x1 [HALF_PAD]``; as a product, it needs the queries in no second layout."""
    acc = tl.zeros([q.q0.shape[0], 8], tl.float32)
    acc = half_dot(q.q0, tl.broadcast_to(x0[:, None], [F.HALF_PAD, 8]), acc, M.PRECISE)
    acc = half_dot(q.q1, tl.broadcast_to(x1[:, None], [F.HALF_PAD, 8]), acc, M.PRECISE)
    return tl.max(acc, 1) * q.scale


@triton.jit
def attend_group(
    q,  # RotatedQuery
    sums,  # PageSums
    cache,
    softmax,
    table,  # the request's row of the page table
    head,  # int64
    index,  # of the key group in the sequence
    span,  # of its tokens, one is in the group
    row_first,  # [rows] with a sliding window: first position that each row sees, not before that of the span
    F: tl.constexpr,
    M: tl.constexpr,
):
    """One key group: logits, online softmax and weighted values, in the rotated space. Returns the new sums."""
    DIM: tl.constexpr = F.DIM
    HALF: tl.constexpr = F.DIM // 2
    HALF_PAD: tl.constexpr = F.HALF_PAD
    TILES: tl.constexpr = F.DIM // 16
    PARTS: tl.constexpr = 4 // M.FOLD
    BLOCKS: tl.constexpr = F.KEY_GROUP // 32
    TOKENS: tl.constexpr = 8 * BLOCKS * M.FOLD  # of a subset
    GROUPS: tl.constexpr = 128 // F.KEY_GROUP
    UNIT: tl.constexpr = 16777216.0 if M.CODES else 1.0
    group = index % GROUPS
    page_index = index // GROUPS
    limit = span.ring - page_index * 128
    page = cache.pages + head * cache.page_head + tl.load(table + page_index).to(tl.int64) * cache.page_block
    first_page = page_index == 0

    column = tl.arange(0, HALF_PAD)
    is_column = column < HALF
    chunk, rest, width = column_offsets(F)
    # keys: word halves are [chunk][g][t, tile, half]; parameters are [t][tile][j1][half]
    key_step = 8 * width
    key_column = 256 * chunk + rest
    t = rest // (2 * width)
    tile = 4 * chunk + rest % (2 * width) // 2
    cell = t * TILES + tile
    half = rest % 2
    # values: word halves are [chunk][g][t][tile][half]
    g_of_column = rest // width
    value_column = 256 * chunk + g_of_column * 8 * width + 2 * (rest % width)
    value_step = 2 * width

    # tokens of a subset; what depends on group and part alone is added to scalars, which saves registers
    token = tl.arange(0, TOKENS)
    g = token % 8
    j = token // 8 % 2 if M.FOLD > 1 else 0 * token
    r = token // 16 % 2 if M.FOLD == 4 else 0 * token
    block = token // (8 * M.FOLD)
    tile16 = 2 * block + r
    position = 16 * tile16 + 8 * j + g
    norm_offset = 16 * tile16 + 2 * g + j
    subset = Subset(g, r, j, tile16, 2 * j + g % 2)
    word_offset = (block * 64 * TILES)[None, :] + key_column[:, None] + key_step[:, None] * g[None, :]
    value_offset = (
        (block * 64 * TILES + g % 2)[:, None] + value_column[None, :] + (g // 2)[:, None] * value_step[None, :]
    )
    high_offset = word_offset
    if F.KEY_BITS == 3 and BLOCKS > 1:  # a word serves two blocks
        pair_token = tl.arange(0, TOKENS // 2)
        high_offset = (pair_token // (8 * M.FOLD) * 64 * TILES)[None, :] + key_column[:, None]
        high_offset += key_step[:, None] * (pair_token % 8)[None, :]
    low_ptr = as_pointer(page, 0, tl.uint16)
    high_ptr = as_pointer(page, F.K_HIGH, tl.uint16)
    value_ptr = as_pointer(page, F.V_CODES, tl.uint16)
    norm_ptr = as_pointer(page, F.NORMS, tl.float16)
    vscale_ptr = as_pointer(page, F.V_SCALE, tl.float16)
    vzero_ptr = as_pointer(page, F.V_ZERO, tl.float16)

    param_base = group * 2 * DIM
    if F.FIRST_TOKEN:
        first_score = tl.zeros_like(q.scale)
        has_first = first_page & (group == 0)
        param_base = tl.where(first_page, 0, param_base)
        if has_first:
            byte_ptr = as_pointer(page, F.FIRST_KEY, tl.int8) + 4 * cell + half
            byte0 = load_columns(byte_ptr, is_column, F).to(tl.float16)
            byte1 = load_columns(byte_ptr + 2, is_column, F).to(tl.float16)
            first_score = dot_vector(q, byte0, byte1, F, M)

    scale0, scale1, scale2 = load_key_params(page, param_base, cell, half, F, is_column)
    zero0, zero1, _ = load_key_params(page, param_base + DIM, cell, half, F, is_column)
    key_zero = dot_vector(q, zero0, zero1, F, M)
    qs0 = q.q0 * scale0.to(q.q0.dtype)[None, :]
    qs1 = q.q1 * (scale1.to(q.q0.dtype) * 0.0625)[None, :]  # slots j1 = 1 hold code * 16

    words = load_columns(low_ptr + group * (BLOCKS * 64 * TILES) + word_offset, is_column[:, None], F)
    high = words
    qs2 = qs1
    if F.KEY_BITS > 2:
        high_block = (group * BLOCKS) // 2 if F.KEY_BITS == 3 else group * BLOCKS
        high = load_columns(high_ptr + high_block * (64 * TILES) + high_offset, is_column[:, None], F)
        # the wrapped slot is read as high * 64, in units of 4 * 4**j
        qs2 = q.q2 * (scale2.to(q.q0.dtype) * (0.25 if M.FOLD == 1 else 0.0625))[None, :]

    # logits of the four (or fewer) subsets
    scaled = RotatedQuery(qs0, qs1, qs2, q.scale)
    scores = ()
    best = tl.full([q.q0.shape[0], TOKENS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        s = subset_scores(words, high, scaled, subset, group, F, M, part)
        unit = q.scale * (UNIT / (4 ** (part % 2) if M.FOLD == 1 else 1))
        s = s * unit[:, None] + key_zero[:, None]
        if F.FIRST_TOKEN:
            if part == 0:
                s = tl.where((has_first & (token == 0))[None, :], first_score[:, None], s)
        first16, first8 = slot_of(group * 2 * BLOCKS, M.FOLD, part)
        valid = position < limit - 16 * first16 - 8 * first8
        if F.HAS_NORM:
            norm = tl.load(norm_ptr + (16 * first16 + first8) + norm_offset, mask=valid, other=0.0)
            s = s * norm.to(tl.float32)[None, :]
        if M.SOFT_CAP:
            s = soft_capped(s, softmax)
        visible = valid[None, :]
        if M.SLIDING:
            start = page_index * 128 + 16 * first16 + 8 * first8
            visible = visible & (position[None, :] >= (row_first - start)[:, None])
        s = tl.where(visible, s, float("-inf"))
        best = tl.maximum(best, s)
        scores = scores + (s,)
    peak = tl.maximum(sums.peak, tl.max(best, 1))

    # a whole group may lie beyond the limit before any token was seen
    pivot = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp2(sums.peak - pivot)
    total = sums.total * shrink
    acc0 = sums.acc0 * shrink[:, None]
    acc1 = sums.acc1 * shrink[:, None]
    zero = sums.zero
    if F.VALUE_GROUPS == 1:
        zero = zero * shrink

    if F.FIRST_TOKEN:
        if has_first:
            weight = tl.sum(tl.where((token == 0)[None, :], tl.exp2(scores[0] - pivot[:, None]), 0.0), 1)
            acc0, acc1 = add_first_value(page, weight, vscale_ptr, acc0, acc1, F, M)

    value_words = load_columns(value_ptr + group * (BLOCKS * 64 * TILES) + value_offset, is_column[None, :], F)
    value_high = value_words
    value_crossed = value_words
    if F.VALUE_BITS > 2:
        vhigh_ptr = as_pointer(page, F.V_HIGH, tl.uint16) + value_offset
        if F.VALUE_BITS == 3:  # a word serves two blocks: each of its tokens loads it and moves its own bit down
            vhigh_ptr += (group * BLOCKS) // 2 * (64 * TILES) - ((block - block // 2) * (64 * TILES))[:, None]
            own = ((group * BLOCKS + block) % 2).to(tl.uint16)[:, None]
        else:
            vhigh_ptr += group * (BLOCKS * 64 * TILES)
            own = tl.zeros([TOKENS, 1], tl.uint16)
        value_high = (load_columns(vhigh_ptr, is_column[None, :], F) >> own).to(tl.uint16)
        if F.VALUE_GROUPS > 1:
            vhigh_ptr += (1 - 2 * (g % 2))[:, None]
            value_crossed = (load_columns(vhigh_ptr, is_column[None, :], F) >> own).to(tl.uint16)
    weights = tl.zeros([q.q0.shape[0], TOKENS], tl.float32)
    offsets = tl.zeros([q.q0.shape[0], TOKENS], tl.float32)
    for part in tl.static_range(PARTS):
        p = tl.exp2(scores[part] - pivot[:, None])
        weights += p
        first16, first8 = slot_of(group * 2 * BLOCKS, M.FOLD, part)
        valid = position < limit - 16 * first16 - 8 * first8
        if M.SLIDING:
            valid = valid & (position >= span.first - page_index * 128 - 16 * first16 - 8 * first8)
        first = 16 * F.VALUE_GROUPS * first16 + 2 * first8
        offsets, acc0, acc1 = add_subset_values(
            value_words,
            value_high,
            value_crossed,
            p,
            valid,
            vscale_ptr + first,
            vzero_ptr + first,
            subset,
            offsets,
            acc0,
            acc1,
            F,
            M,
            part,
        )
    total += tl.sum(weights, 1)
    if F.VALUE_GROUPS == 1:
        zero += tl.sum(offsets, 1)
    return PageSums(peak, total, zero, acc0, acc1)


@triton.jit
def add_first_value(page, weight, vscale_ptr, acc0, acc1, F: tl.constexpr, M: tl.constexpr):
    """The sequence's first value, whose codes are 0: ``weight * scale * byte``; its zero is added as any other's."""
    chunk, rest, width = column_offsets(F)
    is_column = tl.arange(0, F.HALF_PAD) < F.DIM // 2
    tile = 4 * chunk + rest % width
    byte_ptr = page + F.FIRST_VALUE + rest // width * (2 * (F.DIM // 16)) + 2 * tile
    byte0 = load_columns(byte_ptr, is_column, F).to(tl.float32)
    byte1 = load_columns(byte_ptr + 1, is_column, F).to(tl.float32)
    if F.VALUE_GROUPS == 1:
        UNIT: tl.constexpr = 1.0 / 16777216.0 if M.CODES else 1.0
        weight = weight * (tl.load(vscale_ptr).to(tl.float32) * UNIT)
        byte1 = byte1 * 4
    else:
        channel = 16 * tile + rest // width
        byte0 = byte0 * load_columns(vscale_ptr + 4 * (channel // F.VALUE_GROUP), is_column, F).to(tl.float32)
        byte1 = byte1 * load_columns(vscale_ptr + 4 * ((channel + 8) // F.VALUE_GROUP), is_column, F).to(tl.float32)
    return acc0 + weight[:, None] * byte0[None, :], acc1 + weight[:, None] * byte1[None, :]


@triton.jit
def rotated_output(sums, F: tl.constexpr, M: tl.constexpr):
    """The weighted values of :class:`PageSums` as unnormalised outputs in value columns j0 = 0, 1."""
    UNIT: tl.constexpr = 16777216.0 if M.CODES else 1.0
    if F.VALUE_GROUPS == 1:
        column = tl.arange(0, F.HALF_PAD)
        offset = tl.where((column < F.DIM // 2)[None, :], sums.zero[:, None], 0.0)
        return sums.acc0 * UNIT + offset, sums.acc1 * (UNIT / 4) + offset
    else:
        return sums.acc0, sums.acc1


@triton.jit
def attend_pages(
    q0,  # [rows, HALF_PAD] rotated query as key columns j1 = 0, unnormalised
    q1,  # j1 = 1
    q2,  # q1 with even and odd columns exchanged
    cache,
    softmax,
    table,  # the request's row of the page table
    head,  # int64
    low,  # pages low .. high - 1
    high,
    span,
    row_position,  # [rows] of each row's token
    F: tl.constexpr,
    M: tl.constexpr,
):
    """Pages: peak, total and the two halves of :func:`rotated_output`."""
    ROWS: tl.constexpr = q0.shape[0]
    logit_scale = softmax.scale * LOG2E
    q = normalise_rows(q0, q1, q2, logit_scale * F.ROTATION_SCALE, M.PRECISE)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, F.HALF_PAD], tl.float32)
    sums = PageSums(peak, zero, zero, acc, acc)
    GROUPS: tl.constexpr = 128 // F.KEY_GROUP
    row_first = row_position
    begin = low * GROUPS
    if M.SLIDING:
        row_first = tl.maximum(row_position + 1 - softmax.sliding_window, span.first)
        begin = tl.maximum(begin, span.first // F.KEY_GROUP)
    for index in range(begin, tl.minimum(high * GROUPS, (span.ring + F.KEY_GROUP - 1) // F.KEY_GROUP)):
        sums = attend_group(q, sums, cache, softmax, table, head, index, span, row_first, F, M)
    out0, out1 = rotated_output(sums, F, M)
    return sums.peak, sums.total, out0, out1


@triton.jit
def normalise_rows(q0, q1, q2, logit_scale, PRECISE: tl.constexpr):
    """:class:`RotatedQuery` with rows of at most 1, which keeps ``q * key scale`` inside fp16."""
    top = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
    top = tl.where(top > 0, top, 1.0)
    q0 = q0 / top[:, None]
    q1 = q1 / top[:, None]
    q2 = q2 / top[:, None]
    if not PRECISE:
        q0 = q0.to(tl.float16)
        q1 = q1.to(tl.float16)
        q2 = q2.to(tl.float16)
    return RotatedQuery(q0, q1, q2, top * logit_scale)
