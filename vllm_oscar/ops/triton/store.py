# SPDX-License-Identifier: Apache-2.0
"""Quantizing full blocks into pages, and writing the ring.

A store program handles one block of one KV head, keys or values: it gathers 128 tokens
from ring and new tokens, rotates them by a product with the Hadamard matrix, and encodes
them as the reference does, so that the bytes are the reference's up to the order of
summation. The grid depends on shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.ops.step import Cache, Step
from vllm_oscar.ops.triton import layout
from vllm_oscar.ops.triton.encode import divide, largest, store_keys, store_values, to_fp16, to_int8
from vllm_oscar.ops.triton.tokens import (
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


@triton.jit
def load_block(new, cache, row, head, position, tokens, F: tl.constexpr, DOT: tl.constexpr, VALUES: tl.constexpr):
    """Tokens at ``position``: from the ring before the context's end, else of ``new``.

    Returns ``[128, DIM_PAD]`` in DOT, and ``[128]`` float32 factors of its rows. Bytes of an int8 ring
    are exact in every DOT.
    """
    channel = tl.arange(0, F.DIM_PAD)
    is_channel = channel < F.DIM
    held = position < tokens.context
    element: tl.constexpr = new.data.dtype.element_ty
    at = ring_tokens(cache, row, head, position, held, element, F)
    old_ptr = at.data + F.DIM if VALUES else at.data
    old = tl.load(old_ptr[:, None] + channel[None, :], mask=held[:, None] & is_channel[None, :], other=0)
    source = (tokens.begin + position - tokens.context).to(tl.int64)
    fresh = tl.load(
        new.data + head * new.head + (source * new.token)[:, None] + channel[None, :],
        mask=(position >= tokens.context)[:, None] & is_channel[None, :],
        other=0.0,
    )
    factor = tl.full([128], 1.0, tl.float32)
    if F.RING_INT8:
        scale = tl.load(at.scale + 1 if VALUES else at.scale, mask=held, other=1.0).to(tl.float32)
        factor = tl.where(held, scale, factor)
    return tl.where(held[:, None], old.to(DOT), fresh.to(DOT)), factor


@triton.jit
def rotate_block(block, factor, signs, F: tl.constexpr, DOT: tl.constexpr):
    """``[128, DIM_PAD]`` rotated, float32; ``signs``: the Hadamard matrix."""
    rotated = tl.dot(block, signs.to(DOT), input_precision="ieee")
    return rotated * (factor * F.ROTATION_SCALE)[:, None]


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
        raw, factor = load_block(key, cache, ring, head, position, tokens, F, DOT, False)
        rotated = rotate_block(raw, factor, signs, F, DOT)
        square = tl.zeros([128], tl.float32)
        if F.JOINT_NORM:
            for other in range(0, heads):
                part, factor = load_block(key, cache, ring, other, position, tokens, F, DOT, False)
                part = part.to(tl.float32) * factor[:, None]
                square += tl.sum(part * part, 1)
            mean = tl.div_rn(square, tl.zeros_like(square) + heads * F.DIM)
        else:
            square = tl.sum(rotated * rotated, 1)
            mean = tl.div_rn(square, tl.zeros_like(square) + F.DIM)
        store_keys(page, rotated, mean, block, key_clip, F)
    else:
        raw, factor = load_block(value, cache, ring, head, position, tokens, F, DOT, True)
        store_values(page, rotate_block(raw, factor, signs, F, DOT), block, value_clip, F)
        if F.PADDING < F.PAGE_BYTES:
            spare = F.PADDING + tl.arange(0, 128)
            tl.store(page + spare, tl.zeros([128], tl.uint8), mask=spare < F.PAGE_BYTES)


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
    element: tl.constexpr = key.data.dtype.element_ty
    at = ring_tokens(cache, ring_row(step, request), head, tokens.context + token, True, element, F)
    source = row.to(tl.int64)
    for part in tl.static_range(2):
        new = value if part else key
        mask = (head < heads) & (channel < F.DIM)
        x = tl.load(new.data + source * new.token + head * new.head + channel, mask=mask, other=0.0)
        if F.RING_INT8:
            x = x.to(tl.float32)
            top = largest(x, 1)[:, None]
            scale = to_fp16(tl.div_rn(top, tl.zeros_like(top) + 127.0))
            tl.store(at.scale + part, scale, mask=head < heads)
            x = to_int8(divide(x, scale.to(tl.float32)))
        tl.store(at.data + part * F.DIM + channel, x, mask=mask)


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
        layout.mode(key.dtype, 1, cache.softmax).DOT,
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
