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
from vllm_oscar.ops.triton import page as common
from vllm_oscar.ops.triton.page import as_pointer, find_request, ring_tokens

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
        scale = common.e4m3_to_half(scale_bits).to(tl.float32)
    if F.INTEGER_ZERO:
        code = round_even(tl.minimum(tl.maximum(tl.div_rn(-low, tl.where(scale > 0, scale, 1.0)), -1.0), LEVELS + 1.0))
        code = tl.minimum(tl.maximum(code, 0.0), LEVELS)
        zero = tl.where(scale > 0, code, 0.0) * scale * -1.0
    if FP16:
        zero_bits = to_fp16(zero)
        zero = zero_bits.to(tl.float32)
    else:
        zero_bits = to_e4m3(zero)
        zero = common.e4m3_to_half(zero_bits).to(tl.float32)
    return scale_bits, zero_bits, scale, zero


@triton.jit
def quantize(x, scale, zero, LEVELS: tl.constexpr):
    """Nearest code of stored parameters, int32."""
    code = tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0))
    code = tl.where((scale > 0) & (code == code), code, 0.0)
    return round_even(tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0)).to(tl.int32)


@triton.jit
def load_block(
    new_ptr,  # head added
    new_stride,
    ring_ptr,  # head added, byte pointer
    ring_stride,
    ring_table_ptr,
    ring_pages,
    position,
    context,
    begin,
    F: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Tokens at ``position`` as float-typed ``[128, DIM_PAD]``: from the ring before ``context``, else new ones."""
    channel = tl.arange(0, F.DIM_PAD)
    is_channel = channel < F.DIM
    held = position < context
    element: tl.constexpr = new_ptr.dtype.element_ty
    old_ptr = ring_tokens(ring_ptr, ring_stride, ring_table_ptr, position, held, ring_pages, element, F)
    old_ptr += F.DIM if VALUES else 0
    old = tl.load(old_ptr[:, None] + channel[None, :], mask=held[:, None] & is_channel[None, :], other=0.0)
    row = (begin + position - context).to(tl.int64)
    new = tl.load(
        new_ptr + (row * new_stride)[:, None] + channel[None, :],
        mask=(position >= context)[:, None] & is_channel[None, :],
        other=0.0,
    )
    return tl.where(held[:, None], old, new)


@triton.jit
def store_kernel(
    key_ptr,
    value_ptr,
    pages_ptr,
    ring_ptr,
    table_ptr,  # int8 signs of the Hadamard matrix [DIM_PAD, DIM_PAD]
    block_table_ptr,
    ring_table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    requests,
    ring_pages,
    heads,
    key_clip,
    value_clip,
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
    DOT: tl.constexpr,
):
    DIM: tl.constexpr = F.DIM
    DIM_PAD: tl.constexpr = F.DIM_PAD
    index = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    request = find_request(query_start_ptr, index, requests, 128)
    begin = tl.load(query_start_ptr + request)
    length = tl.load(query_start_ptr + request + 1) - begin
    if length <= 0:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    context = seq_len - length
    block = context // 128 + index - (begin // 128 + request)
    if (block + 1) * 128 > seq_len:
        return
    position = block * 128 + tl.arange(0, 128)
    page_id = tl.load(block_table_ptr + request.to(tl.int64) * block_table_stride + block).to(tl.int64)
    page = pages_ptr + page_id * page_stride + head * page_head_stride
    ring_table = ring_table_ptr + request.to(tl.int64) * ring_table_stride
    ring_head = ring_ptr + head * ring_head_stride
    channel = tl.arange(0, DIM_PAD)
    signs = tl.load(table_ptr + channel[:, None] * DIM_PAD + channel[None, :])
    if tl.program_id(2) == 0:
        raw = load_block(
            key_ptr + head * key_head_stride, key_stride, ring_head, ring_stride, ring_table, ring_pages,
            position, context, begin, F, False,
        )  # fmt: skip
        key = tl.dot(raw.to(DOT), signs.to(DOT), input_precision="ieee") * F.ROTATION_SCALE
        if F.HAS_NORM:
            if F.JOINT_NORM:
                square = tl.zeros([128], tl.float32)
                for other in range(0, heads):
                    part = load_block(
                        key_ptr + other * key_head_stride, key_stride, ring_ptr + other * ring_head_stride,
                        ring_stride, ring_table, ring_pages, position, context, begin, F, False,
                    ).to(tl.float32)  # fmt: skip
                    square += tl.sum(part * part, 1)
                mean = tl.div_rn(square, tl.zeros_like(square) + heads * DIM)
            else:
                square = tl.sum(key * key, 1)
                mean = tl.div_rn(square, tl.zeros_like(square) + DIM)
            norm_bits = to_fp16(tl.sqrt_rn(mean))
            norm = norm_bits.to(tl.float32)
            token = tl.arange(0, 128)
            slot = token // 16 * 16 + token % 8 * 2 + token // 8 % 2
            tl.store(as_pointer(page, F.NORMS, tl.float16) + slot, norm_bits)
            key = tl.div_rn(key, tl.where(norm > 0, norm, 1.0)[:, None])
            key = tl.where((norm > 0)[:, None], key, 0.0)
        store_keys(page, key, block, key_clip, F)
    else:
        raw = load_block(
            value_ptr + head * value_head_stride, value_stride, ring_head, ring_stride, ring_table, ring_pages,
            position, context, begin, F, True,
        )  # fmt: skip
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
def write_ring_kernel(
    key_ptr,
    value_ptr,
    ring_ptr,
    ring_table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    requests,
    ring_pages,
    heads,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    ring_stride,
    ring_head_stride,
    ring_table_stride,
    F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One new token of all heads."""
    row = tl.program_id(0)
    request = find_request(query_start_ptr, row, requests, 1)
    end = tl.load(query_start_ptr + request + 1)
    if (row >= end) | (row < end - F.RING_TOKENS * ring_pages):
        return
    element: tl.constexpr = key_ptr.dtype.element_ty
    position = tl.load(seq_lens_ptr + request) - end + row
    slot = position % (F.RING_TOKENS * ring_pages)
    page = tl.load(ring_table_ptr + request.to(tl.int64) * ring_table_stride + slot // F.RING_TOKENS).to(tl.int64)
    head = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    channel = tl.arange(0, F.DIM_PAD)[None, :]
    mask = (head < heads) & (channel < F.DIM)
    source = row.to(tl.int64)
    key = tl.load(key_ptr + source * key_stride + head * key_head_stride + channel, mask=mask)
    value = tl.load(value_ptr + source * value_stride + head * value_head_stride + channel, mask=mask)
    offset = page * ring_stride + slot % F.RING_TOKENS * (2 * F.DIM * (element.primitive_bitwidth // 8))
    target = as_pointer(ring_ptr, offset + head * ring_head_stride, element) + channel
    tl.store(target, key, mask=mask)
    tl.store(target + F.DIM, value, mask=mask)


# ---- host -------------------------------------------------------------------------
def store_pages(
    key, value, pages, ring, block_table, ring_table, query_start_loc, seq_lens, ring_pages, fmt
) -> None:
    """See :func:`vllm_oscar.ops.reference.store_pages`."""
    tokens, heads, dim = key.shape
    requests = seq_lens.shape[0]
    F = common.layout(fmt, key.element_size())
    store_kernel[(tokens // PAGE_TOKENS + requests, heads, 2)](
        key,
        value,
        pages,
        ring,
        common.rotation(dim, "natural", key.device, torch.int8),
        block_table,
        ring_table,
        query_start_loc,
        seq_lens,
        requests,
        ring_pages,
        heads,
        fmt.config.key_clip,
        fmt.config.value_clip,
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
        common.dot_dtype(key.dtype),
        num_warps=8,
        num_stages=1,
        enable_fp_fusion=False,
    )


def write_ring(key, value, ring, ring_table, query_start_loc, seq_lens, ring_pages, fmt) -> None:
    """See :func:`vllm_oscar.ops.reference.write_ring`."""
    tokens, heads, _ = key.shape
    write_ring_kernel[(tokens,)](
        key,
        value,
        ring,
        ring_table,
        query_start_loc,
        seq_lens,
        seq_lens.shape[0],
        ring_pages,
        heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        ring.stride(0),
        ring.stride(1),
        ring_table.stride(0),
        common.layout(fmt, key.element_size()),
        triton.next_power_of_2(heads),
        num_warps=4,
    )
