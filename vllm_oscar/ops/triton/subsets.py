# SPDX-License-Identifier: Apache-2.0
"""Device code: products of token subsets with the code planes, see :mod:`vllm_oscar.ops.triton.layout`."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_oscar.ops.triton.codes import codes_to_half, half_dot, slot_codes


class Subset(NamedTuple):
    """Where the tokens of a subset are, each ``[tokens]``, from the subset's first 16-token tile and slot on."""

    g: tl.tensor
    r: tl.tensor
    j: tl.tensor
    tile16: tl.tensor
    quad: tl.tensor  # b, half in v_scale and v_zero


@triton.jit
def load_columns(pointer, is_column, F: tl.constexpr):
    """Load with a mask only where tiles have padding."""
    if F.DIM == F.DIM_PAD:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=is_column, other=0)


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
    high,  # words of the high plane; of 3-bit values already shifted so that the token's own bit is the lower
    crossed,  # VALUE_GROUPS > 1: the same of the words' other halves
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
        if F.VALUE_BITS > 2:
            acc0, acc1 = add_high_values(high, weight, subset, acc0, acc1, F, M, R, J)
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
            if F.VALUE_BITS > 2:
                code += upper_codes(high, crossed, subset, F, M, R, J, j0) << 2
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
def add_high_values(
    high, weight, subset, acc0, acc1, F: tl.constexpr, M: tl.constexpr, R: tl.constexpr, J: tl.constexpr
):
    """The high plane's part of :func:`add_subset_values`, as :func:`high_scores` has it for keys.

    The plane's slot (r, j, j0) = (1, 1, 1) lies in the word of the token beside.
    """
    FIELD: tl.constexpr = 2 ** (F.VALUE_BITS - 2) - 1
    if M.FOLD == 1:
        acc0 = half_dot(weight, slot_codes(high, 8 * R, FIELD << (4 * J + 2), 0, M.CODES), acc0, M.PRECISE)
        if R == 1 and J == 1:
            acc1 = half_dot(exchange(weight), slot_codes(high, 0, FIELD, 8, M.CODES), acc1, M.PRECISE)
        else:
            acc1 = half_dot(weight, slot_codes(high, 8 * R, FIELD << (4 * J + 4), 0, M.CODES), acc1, M.PRECISE)
    else:
        upper = (high >> (8 * (subset.r + R) + 4 * subset.j).to(tl.uint16)[:, None]).to(tl.uint16)
        acc0 = half_dot(weight, slot_codes(upper, 0, FIELD << 2, 0, M.CODES), acc0, M.PRECISE)
        # a shift by 12 leaves zeros where the slot is in the other half
        acc1 = half_dot(weight, slot_codes(upper, 0, FIELD << 4, 0, M.CODES), acc1, M.PRECISE)
        if M.FOLD == 4 or R == 1:
            wrapped = high & ((subset.r + R) * subset.j * FIELD).to(tl.uint16)[:, None]
            acc1 = half_dot(exchange(weight), codes_to_half((wrapped << 4).to(tl.uint16), M.CODES), acc1, M.PRECISE)
    return acc0, acc1


@triton.jit
def exchange(x):
    """``x [rows, tokens]`` with even and odd tokens exchanged."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(odd, even), [x.shape[0], x.shape[1]])


@triton.jit
def upper_codes(
    high,
    crossed,
    subset,
    F: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    J0: tl.constexpr,
):
    """Upper bits of value codes ``[tokens, HALF_PAD]``."""
    FIELD: tl.constexpr = 2 ** (F.VALUE_BITS - 2) - 1
    r = subset.r + R
    j = subset.j + J
    upper = (high >> (8 * r + 4 * j).to(tl.uint16)[:, None]).to(tl.uint16)
    upper = (upper >> (2 + 2 * J0)) & FIELD
    if J0:
        upper |= crossed & (r * j * FIELD).to(tl.uint16)[:, None]
    return upper.to(tl.uint16)
