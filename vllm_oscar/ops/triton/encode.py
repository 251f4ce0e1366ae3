# SPDX-License-Identifier: Apache-2.0
"""Device code: rotated keys and values of a block to the sections of a page.

Follows the docstring of :mod:`vllm_oscar.core.reference` line by line, with IEEE divisions;
to be compiled without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_oscar.ops.triton.codes import e4m3_to_half
from vllm_oscar.ops.triton.tokens import as_pointer

_ROUND = tl.constexpr(8388608.0)  # 2**23: from here on, every float32 is an integer


# ---- numbers ------------------------------------------------------------------------
@triton.jit
def round_even(x):
    """Nearest integer, ties to even; zeros keep the sign."""
    size = tl.abs(x)
    whole = tl.where(size < _ROUND, (size + _ROUND) - _ROUND, size)
    sign = x.to(tl.int32, bitcast=True) ^ size.to(tl.int32, bitcast=True)
    return (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def to_fp16(x):
    """Saturating; NaN stays."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -65504.0), 65504.0), x).to(tl.float16)


@triton.jit
def to_e4m3(x):
    """Bits of the nearest float8 e4m3 number, saturating."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, round_even(size * 512.0).to(tl.int32), normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """``max|x|``; NaN where there is one: as integers, sizes have the order of the floats, and NaN is above all."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(size, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def divide(x, y):
    """``x / y`` correctly rounded, 0 where ``y`` is not above 0."""
    return tl.where(y > 0, tl.div_rn(x, tl.where(y > 0, y, 1.0)), 0.0)


@triton.jit
def to_int8(x):
    """Nearest of -127..127, ties to even, 0 for NaN; int8."""
    return round_even(tl.where(x == x, tl.minimum(tl.maximum(x, -127.0), 127.0), 0.0)).to(tl.int32).to(tl.int8)


@triton.jit
def stored_param(x, FP16: tl.constexpr):
    """Bits and float32 value of a stored scale or zero."""
    if FP16:
        bits = to_fp16(x)
        value = bits.to(tl.float32)
    else:
        bits = to_e4m3(x)
        value = e4m3_to_half(bits).to(tl.float32)
    return bits, value


@triton.jit
def affine_params(low, high, levels, clip, F: tl.constexpr, FP16: tl.constexpr):
    """Bits and float32 values of scale and zero of the clipped range; ``clip`` may be a scalar."""
    middle = (low + high) * 0.5
    half = (high - low) * 0.5 * clip
    zero = middle - half
    scale_bits, scale = stored_param(tl.div_rn(2 * half, levels), FP16)
    if F.INTEGER_ZERO:
        # a minus sign would be a subtraction from 0, which has no -0
        zero = tl.where(scale > 0, round_even(divide(low * -1.0, scale)) * -1.0 * scale, low)
    zero_bits, zero = stored_param(zero, FP16)
    return scale_bits, zero_bits, scale, zero


@triton.jit
def quantize(x, scale, zero, levels):
    """Nearest code of stored parameters, float32."""
    code = divide(x - zero, scale)
    code = tl.where(code == code, code, 0.0)
    return round_even(tl.minimum(tl.maximum(code, 0.0), levels))


@triton.jit
def gain(x, coded, AXIS: tl.constexpr):
    """What undoes the shrinkage of ``coded`` along ``x``."""
    product = tl.sum(x * coded, AXIS)
    ratio = tl.where(product > 0, divide(tl.sum(x * x, AXIS), product), 1.0)
    return tl.where(ratio == ratio, tl.minimum(tl.maximum(ratio, 0.5), 2.0), 1.0)


# ---- code planes ---------------------------------------------------------------------
@triton.jit
def pack_slots(fields, TILES_PAD: tl.constexpr, VALUES: tl.constexpr):
    """Shifted fields ``[128, DIM_PAD]`` to words ``[block, g, tile, t]``, of values ``[block, t, tile, g]``."""
    if VALUES:
        words = tl.reshape(fields, [4, 4, 4, 2, TILES_PAD, 2, 8])  # block, (r, j1), t, half, tile, j0, g
        return tl.sum(tl.sum(tl.sum(words, 5), 3), 1)
    else:
        words = tl.reshape(fields, [4, 4, 8, TILES_PAD, 2, 4, 2])  # block, (r, j0), g, tile, j1, t, half
        return tl.sum(tl.sum(tl.sum(words, 6), 4), 1)


@triton.jit
def store_words(target, words, F: tl.constexpr, VALUES: tl.constexpr):
    """``words [n, 8, tile, 4]`` as :func:`pack_slots` has them, ``[n, 4, tile, 8]`` of values, to the page."""
    TILES: tl.constexpr = F.DIM // 16
    block = tl.arange(0, words.shape[0])[:, None, None, None]
    first = tl.arange(0, words.shape[1])[None, :, None, None]
    tile = tl.arange(0, words.shape[2])[None, None, :, None]
    last = tl.arange(0, words.shape[3])[None, None, None, :]
    lane = 4 * last + first if VALUES else 4 * first + last
    width = tl.minimum(TILES - tile // 4 * 4, 4)
    spot = block * (32 * TILES) + tile // 4 * 128 + lane * width + tile % 4
    tl.store(target + spot, words, mask=(tile < TILES) & (spot >= 0))


@triton.jit
def store_codes(
    page,
    codes,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BITS: tl.constexpr,
    F: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Both planes of ``codes [128, DIM_PAD]``, at offsets LOW and HIGH of the page."""
    TILES_PAD: tl.constexpr = F.DIM_PAD // 16
    token = tl.arange(0, 128)[:, None]
    channel = tl.arange(0, F.DIM_PAD)[None, :]
    codes = codes.to(tl.int32).to(tl.uint32)
    # bit 16*half + 8*r + 2*(2*j1 + j0) of lane (g, t)
    if VALUES:
        shift = 8 * (token // 16 % 2) + 4 * (token // 8 % 2) + 16 * (token % 2) + 2 * (channel // 8 % 2)
    else:
        shift = 8 * (token // 16 % 2) + 2 * (token // 8 % 2) + 16 * (channel % 2) + 4 * (channel // 8 % 2)
    shift = shift.to(tl.uint32)
    store_words(as_pointer(page, LOW, tl.uint32), pack_slots((codes & 3) << shift, TILES_PAD, VALUES), F, VALUES)
    if BITS > 2:
        if BITS == 3:  # blocks 2i and 2i + 1 in bits 0 and 1 of the slots
            shift += (token // 32 % 2).to(tl.uint32)
        words = pack_slots((codes >> 2) << shift, TILES_PAD, VALUES)
        if BITS == 3:
            words = tl.sum(tl.reshape(words, [2, 2, words.shape[1], TILES_PAD, words.shape[3]]), 1)
        words = (words << 2) | (words >> 30)
        store_words(as_pointer(page, HIGH, tl.uint32), words, F, VALUES)


# ---- keys ------------------------------------------------------------------------------
@triton.jit
def first_row(x):
    """Row 0 of ``x [128, n]``."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == 0)[:, None], x, 0), 0)


@triton.jit
def store_keys(page, key, mean_square, block_index, clip, F: tl.constexpr):
    """Sections k_codes, k_high, k_params (with first_key) and norms of rotated keys ``[128, DIM_PAD]``.

    ``mean_square [128]``: what the norms are the roots of.
    """
    DIM: tl.constexpr = F.DIM
    DIM_PAD: tl.constexpr = F.DIM_PAD
    TILES: tl.constexpr = F.DIM // 16
    GROUPS: tl.constexpr = 128 // F.KEY_GROUP
    token = tl.arange(0, 128)
    channel = tl.arange(0, DIM_PAD)
    is_sink = (token == 0) & (block_index == 0)
    norm = tl.zeros([128], tl.float32)
    if F.HAS_NORM:
        norm = tl.sqrt_rn(mean_square)
        if F.FIRST_TOKEN:
            top = largest(key, 1)
            norm = tl.where(is_sink, tl.div_rn(top, tl.zeros_like(top) + 127.0), norm)
        norm = to_fp16(norm).to(tl.float32)
        key = divide(key, norm[:, None])
    grouped = tl.reshape(key, [GROUPS, F.KEY_GROUP, DIM_PAD])
    low = tl.min(grouped, 1)
    high = tl.max(grouped, 1)
    if F.FIRST_TOKEN:
        if block_index == 0:  # all tokens but the first shape all groups alike
            low = tl.broadcast_to(tl.min(tl.where(is_sink[:, None], float("inf"), key), 0)[None, :], [GROUPS, DIM_PAD])
            high = tl.broadcast_to(
                tl.max(tl.where(is_sink[:, None], float("-inf"), key), 0)[None, :], [GROUPS, DIM_PAD]
            )
    levels = tl.zeros_like(low) + (2**F.KEY_BITS - 1)
    scale_bits, zero_bits, scale, zero = affine_params(low, high, levels, clip, F, F.FP16_PARAMS)

    t = channel % 8 // 2
    spot = (t * TILES + channel // 16) * 4 + channel % 16 // 8 * 2 + channel % 2
    group = tl.arange(0, GROUPS)
    is_scale = (channel < DIM)[None, :] & (group >= 0)[:, None]
    is_zero = is_scale
    if F.FIRST_TOKEN:  # in a first page, key and value of token 0 lie in the first bytes of group 1
        is_scale = is_scale & (group + 128 * block_index != 1)[:, None]
        if not F.FP16_PARAMS:
            is_zero = is_scale
    param_spot = (2 * DIM * group)[:, None] + spot[None, :]
    if F.FP16_PARAMS:
        param_ptr = as_pointer(page, F.K_PARAMS, tl.float16)
    else:
        param_ptr = page + F.K_PARAMS
    tl.store(param_ptr + param_spot, scale_bits, mask=is_scale)
    tl.store(param_ptr + param_spot + DIM, zero_bits, mask=is_zero)

    codes = quantize(grouped, scale[:, None, :], zero[:, None, :], 2**F.KEY_BITS - 1.0)
    if F.KEY_GAIN:
        coded = tl.reshape(scale[:, None, :] * codes + zero[:, None, :], [128, DIM_PAD])
        gained = norm * gain(key, coded, 1)
        norm = tl.where(is_sink & F.FIRST_TOKEN, norm, gained)
    codes = tl.reshape(codes, [128, DIM_PAD])
    if F.FIRST_TOKEN:
        if block_index == 0:
            byte = to_int8(first_row(key))
            tl.store(as_pointer(page, F.FIRST_KEY, tl.int8) + spot, byte, mask=channel < DIM)
        codes = tl.where(is_sink[:, None], 0.0, codes)
    if F.HAS_NORM:
        slot = token // 16 * 16 + token % 8 * 2 + token // 8 % 2
        tl.store(as_pointer(page, F.NORMS, tl.float16) + slot, to_fp16(norm))
    store_codes(page, codes, 0, F.K_HIGH, F.KEY_BITS, F, False)


# ---- values ------------------------------------------------------------------------------
@triton.jit
def store_values(page, value, block_index, clip, F: tl.constexpr):
    """Sections v_codes, v_high, v_scale and v_zero, and first_value, of rotated values ``[128, DIM_PAD]``."""
    DIM: tl.constexpr = F.DIM
    DIM_PAD: tl.constexpr = F.DIM_PAD
    SIZE: tl.constexpr = F.VALUE_GROUP if F.VALUE_GROUP < F.DIM_PAD else F.DIM_PAD
    GROUPS: tl.constexpr = F.DIM_PAD // SIZE  # some may be padding
    USED: tl.constexpr = F.VALUE_GROUPS
    LEVELS: tl.constexpr = 2**F.VALUE_BITS - 1.0
    token = tl.arange(0, 128)
    channel = tl.arange(0, DIM_PAD)
    is_channel = (channel < DIM)[None, :]
    low = tl.min(tl.reshape(tl.where(is_channel, value, float("inf")), [128, GROUPS, SIZE]), 2)
    high = tl.max(tl.reshape(tl.where(is_channel, value, float("-inf")), [128, GROUPS, SIZE]), 2)
    group = tl.arange(0, GROUPS)
    is_group = (group < USED)[None, :] & (token >= 0)[:, None]
    low = tl.where(is_group, low, 0.0)
    high = tl.where(is_group, high, 0.0)
    is_sink = (token == 0) & (block_index == 0) & F.FIRST_TOKEN
    levels = tl.where(is_sink[:, None], 255.0, tl.zeros_like(low) + LEVELS)
    clips = tl.where(is_sink[:, None], 1.0, tl.zeros_like(low) + clip)
    scale_bits, zero_bits, scale, zero = affine_params(low, high, levels, clips, F, True)
    grouped = tl.reshape(value, [128, GROUPS, SIZE])
    codes = quantize(grouped, scale[:, :, None], zero[:, :, None], levels[:, :, None])
    if F.VALUE_GAIN:
        factor = gain(grouped, scale[:, :, None] * codes + zero[:, :, None], 2)
        factor = tl.where(is_sink[:, None], 1.0, factor)
        scale_bits = to_fp16(scale * factor)
        zero_bits = to_fp16(zero * factor)

    quad = token // 8 % 2 * 2 + token % 2
    t = token % 8 // 2
    tile16 = token // 16
    scale_spot = ((tile16 * 4 + t) * (4 * USED) + quad)[:, None] + 4 * group[None, :]
    zero_spot = (tile16 * (16 * USED) + t * 4 + quad)[:, None] + 16 * group[None, :]
    tl.store(as_pointer(page, F.V_SCALE, tl.float16) + scale_spot, scale_bits, mask=is_group)
    tl.store(as_pointer(page, F.V_ZERO, tl.float16) + zero_spot, zero_bits, mask=is_group)
    codes = tl.reshape(codes, [128, DIM_PAD])
    if F.FIRST_TOKEN:
        if block_index == 0:
            spot = channel % 8 * (2 * (DIM // 16)) + channel // 16 * 2 + channel // 8 % 2
            byte = first_row(codes).to(tl.int32).to(tl.uint8)
            tl.store(page + F.FIRST_VALUE + spot, byte, mask=channel < DIM)
        codes = tl.where(is_sink[:, None], 0.0, codes)
    store_codes(page, codes, F.V_CODES, F.V_HIGH, F.VALUE_BITS, F, True)
