# SPDX-License-Identifier: Apache-2.0
"""Quantizing full blocks into pages, and writing the ring.

A store program handles one block of one KV head, keys or values: it gathers 128 tokens
from ring and new tokens, rotates them by a product with the Hadamard matrix, and
follows ``reference.encode_pages`` operation by operation, with IEEE divisions and
without fused multiply-adds, so that the bytes are the reference's up to the order of
summation inside the rotation. The grid depends on shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.ops.step import Cache, Step
from vllm_oscar.ops.triton import layout
from vllm_oscar.ops.triton.codes import e4m3_to_half
from vllm_oscar.ops.triton.tokens import (
    as_pointer,
    cache_args,
    find_request,
    first_block,
    page_row,
    ring_row,
    ring_tokens,
    step_args,
    step_tokens,
    token_args,
)

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 to an integer, ties to even


@triton.jit
def round_even(x):
    """Nearest integer of ``|x| < 2**22``, ties to even."""
    return (x + _ROUND) - _ROUND


@triton.jit
def to_fp16(x):
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


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
def affine_params(low, high, LEVELS: tl.constexpr, clip, F: tl.constexpr, FP16: tl.constexpr):
    """Bits and float32 values of scale and zero of the clipped range (reference._affine_params)."""
    middle = (low + high) * 0.5
    half = (high - low) * 0.5 * clip
    scale = tl.div_rn(2 * half, tl.zeros_like(half) + LEVELS)
    zero = middle - half
    if FP16:
        scale_bits = to_fp16(scale)
        scale = scale_bits.to(tl.float32)
    else:
        scale_bits = to_e4m3(scale)
        scale = e4m3_to_half(scale_bits).to(tl.float32)
    if F.INTEGER_ZERO:
        code = round_even(tl.minimum(tl.maximum(tl.div_rn(-low, tl.where(scale > 0, scale, 1.0)), -1.0), LEVELS + 1.0))
        code = tl.minimum(tl.maximum(code, 0.0), LEVELS)
        zero = tl.where(scale > 0, code, 0.0) * scale * -1.0
    if FP16:
        zero_bits = to_fp16(zero)
        zero = zero_bits.to(tl.float32)
    else:
        zero_bits = to_e4m3(zero)
        zero = e4m3_to_half(zero_bits).to(tl.float32)
    return scale_bits, zero_bits, scale, zero


@triton.jit
def quantize(x, scale, zero, LEVELS: tl.constexpr):
    """Nearest code of stored parameters, int32."""
    code = tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0))
    code = tl.where((scale > 0) & (code == code), code, 0.0)
    return round_even(tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0)).to(tl.int32)


@triton.jit
def load_block(new, cache, row, head, position, tokens, F: tl.constexpr, VALUES: tl.constexpr):
    """Tokens at ``position`` as ``[128, DIM_PAD]``: from the ring before the context's end, else of ``new``."""
    channel = tl.arange(0, F.DIM_PAD)
    is_channel = channel < F.DIM
    held = position < tokens.context
    element: tl.constexpr = new.data.dtype.element_ty
    old_ptr = ring_tokens(cache, row, head, position, held, element, F)
    old_ptr += F.DIM if VALUES else 0
    old = tl.load(old_ptr[:, None] + channel[None, :], mask=held[:, None] & is_channel[None, :], other=0.0)
    source = (tokens.begin + position - tokens.context).to(tl.int64)
    fresh = tl.load(
        new.data + head * new.head + (source * new.token)[:, None] + channel[None, :],
        mask=(position >= tokens.context)[:, None] & is_channel[None, :],
        other=0.0,
    )
    return tl.where(held[:, None], old, fresh)


@triton.jit
def store_kernel(
    key,
    value,
    table_ptr,  # int8 signs of the Hadamard matrix [DIM_PAD, DIM_PAD]
    step,
    cache,
    heads,
    key_clip,
    value_clip,
    F: tl.constexpr,
    DOT: tl.constexpr,
):
    DIM: tl.constexpr = F.DIM
    DIM_PAD: tl.constexpr = F.DIM_PAD
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    request = find_request(step, program, 128)
    tokens = step_tokens(step, request)
    if tokens.length <= 0:
        return
    block = tokens.context // 128 + program - first_block(tokens.begin, request, 128)
    if (block + 1) * 128 > tokens.context + tokens.length:
        return
    position = block * 128 + tl.arange(0, 128)
    page_id = tl.load(page_row(step, request) + block).to(tl.int64)
    page = cache.pages + page_id * cache.page_block + head * cache.page_head
    ring = ring_row(step, request)
    channel = tl.arange(0, DIM_PAD)
    signs = tl.load(table_ptr + channel[:, None] * DIM_PAD + channel[None, :])
    if tl.program_id(2) == 0:
        raw = load_block(key, cache, ring, head, position, tokens, F, False)
        rotated = tl.dot(raw.to(DOT), signs.to(DOT), input_precision="ieee") * F.ROTATION_SCALE
        if F.HAS_NORM:
            if F.JOINT_NORM:
                square = tl.zeros([128], tl.float32)
                for other in range(0, heads):
                    part = load_block(key, cache, ring, other, position, tokens, F, False).to(tl.float32)
                    square += tl.sum(part * part, 1)
                mean = tl.div_rn(square, tl.zeros_like(square) + heads * DIM)
            else:
                square = tl.sum(rotated * rotated, 1)
                mean = tl.div_rn(square, tl.zeros_like(square) + DIM)
            norm_bits = to_fp16(tl.sqrt_rn(mean))
            norm = norm_bits.to(tl.float32)
            token = tl.arange(0, 128)
            slot = token // 16 * 16 + token % 8 * 2 + token // 8 % 2
            tl.store(as_pointer(page, F.NORMS, tl.float16) + slot, norm_bits)
            rotated = tl.div_rn(rotated, tl.where(norm > 0, norm, 1.0)[:, None])
            rotated = tl.where((norm > 0)[:, None], rotated, 0.0)
        store_keys(page, rotated, block, key_clip, F)
    else:
        raw = load_block(value, cache, ring, head, position, tokens, F, True)
        store_values(page, tl.dot(raw.to(DOT), signs.to(DOT), input_precision="ieee") * F.ROTATION_SCALE, value_clip, F)
        if F.PADDING < F.PAGE_BYTES:
            spare = F.PADDING + tl.arange(0, 128)
            tl.store(page + spare, tl.zeros([128], tl.uint8), mask=spare < F.PAGE_BYTES)


@triton.jit
def rotate_left_two(words):
    return (words << 2) | (words >> 30)


@triton.jit
def store_keys(page, key, block_index, clip, F: tl.constexpr):
    """Sections k_codes, k_high and k_params of normalised, rotated keys ``[128, DIM_PAD]``."""
    DIM: tl.constexpr = F.DIM
    DIM_PAD: tl.constexpr = F.DIM_PAD
    TILES: tl.constexpr = F.DIM // 16
    TILES_PAD: tl.constexpr = F.DIM_PAD // 16
    GROUPS: tl.constexpr = 128 // F.KEY_GROUP
    LEVELS: tl.constexpr = 2**F.KEY_BITS - 1
    token = tl.arange(0, 128)
    channel = tl.arange(0, DIM_PAD)
    grouped = tl.reshape(key, [GROUPS, F.KEY_GROUP, DIM_PAD])
    low = tl.min(grouped, 1)
    high = tl.max(grouped, 1)
    if F.EXACT_FIRST:
        if block_index == 0:  # all tokens but the first shape all groups alike
            is_sink = (token == 0)[:, None]
            low = tl.broadcast_to(tl.min(tl.where(is_sink, float("inf"), key), 0)[None, :], [GROUPS, DIM_PAD])
            high = tl.broadcast_to(tl.max(tl.where(is_sink, float("-inf"), key), 0)[None, :], [GROUPS, DIM_PAD])
    scale_bits, zero_bits, scale, zero = affine_params(low, high, LEVELS, clip, F, F.FP16_PARAMS)

    t = channel % 8 // 2
    spot = (t * TILES + channel // 16) * 4 + channel % 16 // 8 * 2 + channel % 2
    group = tl.arange(0, GROUPS)
    is_param = (channel < DIM)[None, :] & (group >= 0)[:, None]
    if F.EXACT_FIRST:
        # in a first page the bytes of group 1 hold the exact key
        is_param = is_param & (group + 128 * block_index != 1)[:, None]
    param_spot = (2 * DIM * group)[:, None] + spot[None, :]
    if F.FP16_PARAMS:
        param_ptr = as_pointer(page, F.K_PARAMS, tl.float16)
    else:
        param_ptr = page + F.K_PARAMS
    tl.store(param_ptr + param_spot, scale_bits, mask=is_param)
    tl.store(param_ptr + param_spot + DIM, zero_bits, mask=is_param)
    if F.EXACT_FIRST:
        if block_index == 0:
            exact = to_fp16(tl.sum(tl.where((token == 0)[:, None], key, 0.0), 0))
            first_ptr = as_pointer(page, F.K_PARAMS + 2 * DIM * (2 if F.FP16_PARAMS else 1), tl.float16)
            tl.store(first_ptr + spot, exact, mask=channel < DIM)

    codes = quantize(grouped, scale[:, None, :], zero[:, None, :], LEVELS)
    codes = tl.reshape(codes, [128, DIM_PAD]).to(tl.uint32)
    # bit 16*half + 8*r + 2*(2*j1 + j0) of lane (g, t)
    shift = (8 * (token // 16 % 2) + 2 * (token // 8 % 2))[:, None]
    shift = (shift + (16 * (channel % 2) + 4 * (channel // 8 % 2))[None, :]).to(tl.uint32)
    words = pack_key_slots((codes & 3) << shift, TILES_PAD)
    block = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    tile = tl.arange(0, TILES_PAD)[None, None, :, None]
    lane_t = tl.arange(0, 4)[None, None, None, :]
    width = tl.minimum(TILES - tile // 4 * 4, 4)
    spot4 = block * (32 * TILES) + tile // 4 * 128 + (4 * g + lane_t) * width + tile % 4
    is_word = (tile < TILES) & (spot4 >= 0)
    tl.store(as_pointer(page, 0, tl.uint32) + spot4, words, mask=is_word)
    if F.KEY_BITS == 4:
        words = rotate_left_two(pack_key_slots((codes >> 2) << shift, TILES_PAD))
        tl.store(as_pointer(page, F.K_HIGH, tl.uint32) + spot4, words, mask=is_word)
    if F.KEY_BITS == 3:  # blocks 2i and 2i + 1 in bits 0 and 1 of the slots
        shift += (token // 32 % 2).to(tl.uint32)[:, None]
        words = pack_key_slots((codes >> 2) << shift, TILES_PAD)
        words = tl.sum(tl.reshape(words, [2, 2, 8, TILES_PAD, 4]), 1)
        pair = tl.arange(0, 2)[:, None, None, None]
        spot2 = pair * (32 * TILES) + tile // 4 * 128 + (4 * g + lane_t) * width + tile % 4
        is_word = (tile < TILES) & (spot2 >= 0)
        tl.store(as_pointer(page, F.K_HIGH, tl.uint32) + spot2, rotate_left_two(words), mask=is_word)


@triton.jit
def pack_key_slots(fields, TILES_PAD: tl.constexpr):
    """Shifted fields ``[128, DIM_PAD]`` to words ``[block, g, tile, t]``."""
    words = tl.reshape(fields, [4, 4, 8, TILES_PAD, 2, 4, 2])  # block, (r, j0), g, tile, j1, t, half
    return tl.sum(tl.sum(tl.sum(words, 6), 4), 1)


@triton.jit
def store_values(page, value, clip, F: tl.constexpr):
    """Sections v_codes, v_scale and v_zero of rotated values ``[128, DIM_PAD]``."""
    DIM: tl.constexpr = F.DIM
    DIM_PAD: tl.constexpr = F.DIM_PAD
    TILES: tl.constexpr = F.DIM // 16
    TILES_PAD: tl.constexpr = F.DIM_PAD // 16
    SIZE: tl.constexpr = F.VALUE_GROUP if F.VALUE_GROUP < F.DIM_PAD else F.DIM_PAD
    GROUPS: tl.constexpr = F.DIM_PAD // SIZE  # some may be padding
    USED: tl.constexpr = F.VALUE_GROUPS
    token = tl.arange(0, 128)
    channel = tl.arange(0, DIM_PAD)
    is_channel = (channel < DIM)[None, :]
    low = tl.min(tl.reshape(tl.where(is_channel, value, float("inf")), [128, GROUPS, SIZE]), 2)
    high = tl.max(tl.reshape(tl.where(is_channel, value, float("-inf")), [128, GROUPS, SIZE]), 2)
    group = tl.arange(0, GROUPS)
    is_group = (group < USED)[None, :] & (token >= 0)[:, None]
    low = tl.where(is_group, low, 0.0)
    high = tl.where(is_group, high, 0.0)
    scale_bits, zero_bits, scale, zero = affine_params(low, high, 3, clip, F, True)
    quad = token // 8 % 2 * 2 + token % 2
    t = token % 8 // 2
    tile16 = token // 16
    scale_spot = ((tile16 * 4 + t) * (4 * USED) + quad)[:, None] + 4 * group[None, :]
    zero_spot = (tile16 * (16 * USED) + t * 4 + quad)[:, None] + 16 * group[None, :]
    tl.store(as_pointer(page, F.V_SCALE, tl.float16) + scale_spot, scale_bits, mask=is_group)
    tl.store(as_pointer(page, F.V_ZERO, tl.float16) + zero_spot, zero_bits, mask=is_group)

    codes = quantize(tl.reshape(value, [128, GROUPS, SIZE]), scale[:, :, None], zero[:, :, None], 3)
    codes = tl.reshape(codes, [128, DIM_PAD]).to(tl.uint32)
    shift = (8 * (token // 16 % 2) + 4 * (token // 8 % 2) + 16 * (token % 2))[:, None]
    shift = (shift + (2 * (channel // 8 % 2))[None, :]).to(tl.uint32)
    fields = tl.reshape(codes << shift, [4, 4, 4, 2, TILES_PAD, 2, 8])  # block, (r, j1), t, half, tile, j0, g
    words = tl.sum(tl.sum(tl.sum(fields, 5), 3), 1)  # [block, t, tile, g]
    block = tl.arange(0, 4)[:, None, None, None]
    lane_t = tl.arange(0, 4)[None, :, None, None]
    tile = tl.arange(0, TILES_PAD)[None, None, :, None]
    g = tl.arange(0, 8)[None, None, None, :]
    width = tl.minimum(TILES - tile // 4 * 4, 4)
    spot4 = block * (32 * TILES) + tile // 4 * 128 + (4 * g + lane_t) * width + tile % 4
    tl.store(as_pointer(page, F.V_CODES, tl.uint32) + spot4, words, mask=(tile < TILES) & (spot4 >= 0))


@triton.jit
def write_ring_kernel(key, value, step, cache, heads, F: tl.constexpr, BLOCK_H: tl.constexpr):
    """One new token of all heads."""
    row = tl.program_id(0)
    request = find_request(step, row, 1)
    tokens = step_tokens(step, request)
    token = row - tokens.begin
    if (token >= tokens.length) | (token < tokens.length - F.RING_TOKENS * cache.ring_pages):
        return
    head = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    channel = tl.arange(0, F.DIM_PAD)[None, :]
    mask = (head < heads) & (channel < F.DIM)
    source = row.to(tl.int64)
    keys = tl.load(key.data + source * key.token + head * key.head + channel, mask=mask)
    values = tl.load(value.data + source * value.token + head * value.head + channel, mask=mask)
    element: tl.constexpr = key.data.dtype.element_ty
    target = ring_tokens(cache, ring_row(step, request), head, tokens.context + token, True, element, F) + channel
    tl.store(target, keys, mask=mask)
    tl.store(target + F.DIM, values, mask=mask)


# ---- host -------------------------------------------------------------------------
def store_pages(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """See :class:`vllm_oscar.ops.step.Kernels`."""
    tokens, heads, dim = key.shape
    config = cache.fmt.config
    store_kernel[(tokens // PAGE_TOKENS + step.requests, heads, 2)](
        token_args("key", key),
        token_args("value", value),
        layout.rotation(dim, "natural", key.device),
        step_args(step),
        cache_args(cache),
        heads,
        config.key_clip,
        config.value_clip,
        layout.page_layout(cache.fmt, key.element_size()),
        layout.mode(key.dtype, 1).DOT,
        num_warps=8,
        num_stages=1,
        enable_fp_fusion=False,
    )


def write_ring(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """See :class:`vllm_oscar.ops.step.Kernels`."""
    tokens, heads, _ = key.shape
    write_ring_kernel[(tokens,)](
        token_args("key", key),
        token_args("value", value),
        step_args(step),
        cache_args(cache),
        heads,
        layout.page_layout(cache.fmt, key.element_size()),
        triton.next_power_of_2(heads),
        num_warps=4,
    )
