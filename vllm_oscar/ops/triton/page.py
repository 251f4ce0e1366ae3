# SPDX-License-Identifier: Apache-2.0
"""Attention over quantized pages, shared by decode and prefill: code words to logits and weighted values."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_oscar.ops.triton.codes import codes_to_half, e4m3_to_half, half_dot, slot_codes
from vllm_oscar.ops.triton.tokens import LOG2E, as_pointer


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


class Subset(NamedTuple):
    """Where the tokens of a subset are, each ``[tokens]``, from the subset's first 16-token tile and slot on."""

    g: tl.tensor
    r: tl.tensor
    j: tl.tensor
    tile16: tl.tensor
    quad: tl.tensor  # b, half in v_scale and v_zero


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
def load_columns(pointer, is_column, F: tl.constexpr):
    """Load with a mask only where tiles have padding."""
    if F.DIM == F.DIM_PAD:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=is_column, other=0)


@triton.jit
def dot_vector(q, x0, x1, F: tl.constexpr, M: tl.constexpr):
    """Logits with one key ``x0, x1 [HALF_PAD]``; as a product, it needs the queries in no second layout."""
    acc = tl.zeros([q.q0.shape[0], 8], tl.float32)
    acc = half_dot(q.q0, tl.broadcast_to(x0[:, None], [F.HALF_PAD, 8]), acc, M.PRECISE)
    acc = half_dot(q.q1, tl.broadcast_to(x1[:, None], [F.HALF_PAD, 8]), acc, M.PRECISE)
    return tl.max(acc, 1) * q.scale


@triton.jit
def column_offsets(F: tl.constexpr):
    """Of every column: chunk, position in it, tiles of the chunk."""
    HALF_PAD: tl.constexpr = F.HALF_PAD
    column = tl.arange(0, HALF_PAD)
    chunk = column // 32
    if F.DIM % 64 == 0:
        width = tl.full([HALF_PAD], 4, tl.int32)
    else:
        width = tl.maximum(tl.minimum(F.DIM // 16 - 4 * chunk, 4), 1)
    return chunk, column % 32, width


@triton.jit
def slot_of(tile16, FOLD: tl.constexpr, PART: tl.constexpr):
    """16-token tile and slot j at which a subset starts, ``tile16`` being its group's first tile."""
    if FOLD == 1:
        return tile16 + PART // 2, PART % 2
    else:
        return tile16 + PART, 0


@triton.jit
def subset_scores(
    words,  # [HALF_PAD, tokens]
    high,  # words of the high plane; of 3-bit keys: [HALF_PAD, tokens / 2] for two blocks each
    q,  # RotatedQuery times key scales
    subset,
    group,
    F: tl.constexpr,
    M: tl.constexpr,
    PART: tl.constexpr,
):
    """``q * scale @ codes`` of one token subset, ``[rows, tokens]``, in units of ``4**-J`` and CODES."""
    R: tl.constexpr = PART // 2 if M.FOLD == 1 else PART
    J: tl.constexpr = PART % 2 if M.FOLD == 1 else 0
    ROWS: tl.constexpr = q.q0.shape[0]
    s = tl.zeros([ROWS, words.shape[1]], tl.float32)
    if M.FOLD == 1:
        s = half_dot(q.q0, slot_codes(words, 8 * R, 0x3 << (2 * J), 0, M.CODES), s, M.PRECISE)
        s = half_dot(q.q1, slot_codes(words, 8 * R, 0x30 << (2 * J), 0, M.CODES), s, M.PRECISE)
    else:
        low = (words >> (8 * (subset.r + R) + 2 * subset.j).to(tl.uint16)[None, :]).to(tl.uint16)
        s = half_dot(q.q0, slot_codes(low, 0, 0x3, 0, M.CODES), s, M.PRECISE)
        s = half_dot(q.q1, slot_codes(low, 0, 0x30, 0, M.CODES), s, M.PRECISE)
    if F.KEY_BITS == 4:
        s += high_scores(high, q, subset, F, M, R, J, 3, 0)
    if F.KEY_BITS == 3:
        if F.KEY_GROUP == 32:
            own = (high >> (group % 2).to(tl.uint16)).to(tl.uint16)
            s += high_scores(own, q, subset, F, M, R, J, 1, 0)
        else:
            SLOTS: tl.constexpr = 8 * M.FOLD
            even = high_scores(high, q, subset, F, M, R, J, 1, 0)
            odd = high_scores(high, q, subset, F, M, R, J, 1, 1)
            both = tl.join(even, odd)  # [rows, (pair, slot), block of the pair]
            both = tl.permute(tl.reshape(both, [ROWS, high.shape[1] // SLOTS, SLOTS, 2]), [0, 1, 3, 2])
            s += tl.reshape(both, [ROWS, words.shape[1]])
    return s


@triton.jit
def high_scores(
    high,
    q,
    subset,
    F: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    FIELD: tl.constexpr,  # bits of the block in a field of the high plane
    B: tl.constexpr,  # and their position in it
):
    """The high plane's part of :func:`subset_scores`. Its fields lie two bits above those of the codes.

    A product of its own lets both planes go from memory to the operands unmixed. The plane
    is rotated by two bits: its slot (r, j, j1) = (1, 1, 1) lies in the other half.
    """
    s = tl.zeros([q.q0.shape[0], high.shape[1]], tl.float32)
    if M.FOLD == 1:
        s = half_dot(q.q0, slot_codes(high, 8 * R + B, FIELD << (2 * J + 2), 0, M.CODES), s, M.PRECISE)
        if R == 1 and J == 1:
            s = half_dot(q.q2, slot_codes(high, B, FIELD, 6, M.CODES), s, M.PRECISE)
        else:
            s = half_dot(q.q1, slot_codes(high, 8 * R + B, FIELD << (2 * J + 6), 0, M.CODES), s, M.PRECISE)
    else:
        j = subset.j
        r = subset.r
        if F.KEY_BITS == 3 and F.KEY_GROUP > 32:  # tokens of both blocks share the tile
            token = tl.arange(0, high.shape[1])
            j = token // 8 % 2
            r = token // 16 % 2 if M.FOLD == 4 else 0 * token
        upper = (high >> (8 * (r + R) + 2 * j + B).to(tl.uint16)[None, :]).to(tl.uint16)
        s = half_dot(q.q0, slot_codes(upper, 0, FIELD << 2, 0, M.CODES), s, M.PRECISE)
        # a shift by 10 leaves zeros where the slot is in the other half
        s = half_dot(q.q1, slot_codes(upper, 0, FIELD << 6, 0, M.CODES), s, M.PRECISE)
        if M.FOLD == 4 or R == 1:
            wrapped = (high >> B) & ((r + R) * j * FIELD).to(tl.uint16)[None, :]
            s = half_dot(q.q2, codes_to_half((wrapped << 6).to(tl.uint16), M.CODES), s, M.PRECISE)
    return s


@triton.jit
def add_subset_values(
    words,  # [tokens, HALF_PAD]
    p,  # [rows, tokens]
    valid,
    vscale_ptr,
    vzero_ptr,
    subset,
    offsets,  # [rows, tokens]: sum of p * value zero over subsets
    acc0,
    acc1,
    F: tl.constexpr,
    M: tl.constexpr,
    PART: tl.constexpr,
):
    """``p @ values`` of one token subset into the accumulators of :func:`attend_group`."""
    R: tl.constexpr = PART // 2 if M.FOLD == 1 else PART
    J: tl.constexpr = PART % 2 if M.FOLD == 1 else 0
    VGROUPS: tl.constexpr = F.VALUE_GROUPS
    t = subset.g // 2
    if M.FOLD > 1:
        words = (words >> (8 * (subset.r + R) + 4 * subset.j).to(tl.uint16)[:, None]).to(tl.uint16)
    SHIFT: tl.constexpr = 8 * R if M.FOLD == 1 else 0
    if VGROUPS == 1:
        index = (subset.tile16 * 4 + t) * 4 + subset.quad
        vscale = tl.load(vscale_ptr + index, mask=valid, other=0.0).to(tl.float32)
        vzero = tl.load(vzero_ptr + index, mask=valid, other=0.0).to(tl.float32)
        offsets += p * vzero[None, :]
        # slots of token subset j = 1 hold code * 16
        weight = p * (vscale * (0.0625 if J else 1.0))[None, :]
        acc0 = half_dot(weight, slot_codes(words, SHIFT, 0x3 << (4 * J), 0, M.CODES), acc0, M.PRECISE)
        acc1 = half_dot(weight, slot_codes(words, SHIFT, 0xC << (4 * J), 0, M.CODES), acc1, M.PRECISE)
    else:  # scales and zeros vary along the channels: dequantize
        chunk, rest, width = column_offsets(F)
        is_column = tl.arange(0, F.HALF_PAD) < F.DIM // 2
        in_page = valid[:, None] & is_column[None, :]
        for j0 in tl.static_range(2):
            vgroup = (16 * (4 * chunk + rest % width) + 8 * j0 + rest // width) // F.VALUE_GROUP
            scale_index = ((subset.tile16 * 4 + t) * (4 * VGROUPS) + subset.quad)[:, None] + 4 * vgroup[None, :]
            zero_index = (subset.tile16 * (16 * VGROUPS) + t * 4 + subset.quad)[:, None] + 16 * vgroup[None, :]
            vscale = tl.load(vscale_ptr + scale_index, mask=in_page, other=0.0).to(tl.float32)
            vzero = tl.load(vzero_ptr + zero_index, mask=in_page, other=0.0).to(tl.float32)
            code = (words >> (SHIFT + 4 * J + 2 * j0)) & 3
            value = code.to(tl.float32) * vscale + vzero
            rounded = value.to(tl.float16)
            left = half_dot(p, rounded, tl.zeros_like(acc0), M.PRECISE)
            if M.PRECISE:
                left = half_dot(p, (value - rounded.to(tl.float32)).to(tl.float16), left, M.PRECISE)
            if j0 == 0:
                acc0 += left
            else:
                acc1 += left
    return offsets, acc0, acc1


@triton.jit
def attend_group(
    q,  # RotatedQuery
    sums,  # PageSums
    cache,
    table,  # the request's row of the page table
    head,  # int64
    index,  # of the key group in the sequence
    end,  # tokens of the sequence that are read from pages, > the group's first
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
    limit = end - page_index * 128
    page = cache.pages + head * cache.page_head + tl.load(table + page_index).to(tl.int64) * cache.page_block
    exact_page = page_index == 0

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

    if F.EXACT_FIRST:
        exact = tl.zeros_like(q.scale)
        has_exact = exact_page & (group == 0)
        if has_exact:
            first_ptr = as_pointer(page, F.K_PARAMS + 2 * DIM * (2 if F.FP16_PARAMS else 1), tl.float16)
            first0 = load_columns(first_ptr + 4 * cell + half, is_column, F)
            first1 = load_columns(first_ptr + 4 * cell + 2 + half, is_column, F)
            exact = dot_vector(q, first0, first1, F, M)

    param_base = group * 2 * DIM
    if F.EXACT_FIRST:
        param_base = tl.where(exact_page, 0, param_base)
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
        if F.EXACT_FIRST:
            if part == 0:
                s = tl.where((has_exact & (token == 0))[None, :], exact[:, None], s)
        first16, first8 = slot_of(group * 2 * BLOCKS, M.FOLD, part)
        valid = position < limit - 16 * first16 - 8 * first8
        if F.HAS_NORM:
            norm = tl.load(norm_ptr + (16 * first16 + first8) + norm_offset, mask=valid, other=0.0)
            s = s * norm.to(tl.float32)[None, :]
        s = tl.where(valid[None, :], s, float("-inf"))
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

    value_words = load_columns(value_ptr + group * (BLOCKS * 64 * TILES) + value_offset, is_column[None, :], F)
    weights = tl.zeros([q.q0.shape[0], TOKENS], tl.float32)
    offsets = tl.zeros([q.q0.shape[0], TOKENS], tl.float32)
    for part in tl.static_range(PARTS):
        p = tl.exp2(scores[part] - pivot[:, None])
        weights += p
        first16, first8 = slot_of(group * 2 * BLOCKS, M.FOLD, part)
        valid = position < limit - 16 * first16 - 8 * first8
        first = 16 * F.VALUE_GROUPS * first16 + 2 * first8
        offsets, acc0, acc1 = add_subset_values(
            value_words, p, valid, vscale_ptr + first, vzero_ptr + first, subset, offsets, acc0, acc1, F, M, part
        )
    total += tl.sum(weights, 1)
    if F.VALUE_GROUPS == 1:
        zero += tl.sum(offsets, 1)
    return PageSums(peak, total, zero, acc0, acc1)


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
    table,  # the request's row of the page table
    head,  # int64
    low,  # pages low .. high - 1
    high,
    end,  # tokens of the sequence that are read from pages
    F: tl.constexpr,
    M: tl.constexpr,
):
    """Pages: peak, total and the two halves of :func:`rotated_output`."""
    ROWS: tl.constexpr = q0.shape[0]
    logit_scale = cache.scale * LOG2E
    q = normalise_rows(q0, q1, q2, logit_scale * F.ROTATION_SCALE, M.PRECISE)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, F.HALF_PAD], tl.float32)
    sums = PageSums(peak, zero, zero, acc, acc)
    GROUPS: tl.constexpr = 128 // F.KEY_GROUP
    for index in range(low * GROUPS, tl.minimum(high * GROUPS, (end + F.KEY_GROUP - 1) // F.KEY_GROUP)):
        sums = attend_group(q, sums, cache, table, head, index, end, F, M)
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
