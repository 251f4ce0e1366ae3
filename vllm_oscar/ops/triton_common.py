# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: the page layout as constants, tables, the page attention step.

A slot ``(r, j)`` of the code words selects 8 tokens ``32*block + 16*r + 8*j + g`` of every
32-token block, for keys and for values alike, so one tile of key words gives the
logits of a *token subset* and one tile of value words consumes exactly these
probabilities. The words are read as 16-bit halves:

* keys: tile ``[columns, tokens]``; column ``c`` is word half ``(t, tile, half)`` of a
  chunk in storage order, and holds channel ``16*tile + 8*j1 + 2*t + half`` in its
  slots ``j1``: two products per subset, with the query gathered in the same order;
* values: tile ``[tokens, columns]``; column ``c`` is ``(g, tile)`` of a chunk, and holds
  channel ``16*tile + 8*j0 + g``: two accumulators, ``j0`` in {0, 1}.

A masked 16-bit half is an fp16 subnormal ``code * 4**slot * 2**-24``, exact on tensor
cores; where the matrix unit flushes subnormals, ``1024 + x`` minus 1024 is taken instead.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_oscar.config import NormScope, ParamType
from vllm_oscar.format import PageFormat
from vllm_oscar.hadamard import hadamard

LOG2E = tl.constexpr(1.4426950408889634)


def is_interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def padded(dim: int) -> int:
    """Channels of a tile: a power of two."""
    return triton.next_power_of_2(dim)


class Layout(NamedTuple):
    """A :class:`PageFormat` as compile-time constants; offsets are bytes."""

    DIM: tl.constexpr
    DIM_PAD: tl.constexpr  # power of two
    HALF_PAD: tl.constexpr  # columns of a tile: power of two not less than DIM / 2
    KEY_BITS: tl.constexpr
    KEY_GROUP: tl.constexpr
    FP16_PARAMS: tl.constexpr
    VALUE_GROUPS: tl.constexpr
    VALUE_GROUP: tl.constexpr
    HAS_NORM: tl.constexpr
    JOINT_NORM: tl.constexpr
    EXACT_FIRST: tl.constexpr
    INTEGER_ZERO: tl.constexpr
    K_HIGH: tl.constexpr
    V_CODES: tl.constexpr
    K_PARAMS: tl.constexpr
    V_SCALE: tl.constexpr
    V_ZERO: tl.constexpr
    NORMS: tl.constexpr
    RING_TOKENS: tl.constexpr  # tokens per ring page
    ROTATION_SCALE: tl.constexpr  # 1 / sqrt(DIM): the tables hold signs


@lru_cache(maxsize=None)
def layout(fmt: PageFormat, itemsize: int) -> Layout:
    config, sections = fmt.config, {name: section.offset for name, section in fmt.sections.items()}
    fields = dict(
        DIM=fmt.head_dim,
        DIM_PAD=padded(fmt.head_dim),
        HALF_PAD=padded(fmt.head_dim // 2),
        KEY_BITS=config.key_bits,
        KEY_GROUP=config.key_group,
        FP16_PARAMS=config.key_param is ParamType.FP16,
        VALUE_GROUPS=fmt.value_groups,
        VALUE_GROUP=config.value_group,
        HAS_NORM=config.norm is not NormScope.NONE,
        JOINT_NORM=config.norm is NormScope.JOINT,
        EXACT_FIRST=config.exact_first_key,
        INTEGER_ZERO=config.integer_zero,
        K_HIGH=sections["k_high"],
        V_CODES=sections["v_codes"],
        K_PARAMS=sections["k_params"],
        V_SCALE=sections["v_scale"],
        V_ZERO=sections["v_zero"],
        NORMS=sections["norms"],
        RING_TOKENS=fmt.ring_tokens_per_page(itemsize),
        ROTATION_SCALE=fmt.head_dim**-0.5,
    )
    # in the interpreter an expression of a constexpr on the left of a tensor is no tensor
    wrap = (lambda value: value) if is_interpreted() else tl.constexpr
    return Layout(**{name: wrap(value) for name, value in fields.items()})


# ---- the rotation in the column orders of the tiles --------------------------------
def _columns(dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunk, position in the chunk and tiles of the chunk, of every column."""
    column = torch.arange(dim // 2)
    chunk = column // 32
    return chunk, column % 32, (dim // 16 - 4 * chunk).clamp(max=4)


def key_channels(dim: int) -> torch.Tensor:
    """Channel of each key column: ``[2 (j1), dim / 2]``."""
    chunk, rest, width = _columns(dim)
    t, tile, half = rest // (2 * width), 4 * chunk + rest % (2 * width) // 2, rest % 2
    return (16 * tile + 2 * t + half) + torch.tensor([[0], [8]])


def value_channels(dim: int) -> torch.Tensor:
    """Channel of each value column: ``[2 (j0), dim / 2]``."""
    chunk, rest, width = _columns(dim)
    g, tile = rest // width, 4 * chunk + rest % width
    return (16 * tile + g) + torch.tensor([[0], [8]])


def _signs(dim: int) -> torch.Tensor:
    return torch.round(hadamard(dim) * dim**0.5)


def _pad(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = matrix.new_zeros(*matrix.shape[:-2], rows, columns)
    out[..., : matrix.shape[-2], : matrix.shape[-1]] = matrix
    return out


@lru_cache(maxsize=None)
def rotation(dim: int, order: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The unnormalised Hadamard matrix (entries 1, -1, padding 0) in the order of a kernel.

    ``"natural"``: ``[DIM_PAD, DIM_PAD]``. ``"key"``: ``[2, DIM_PAD, HALF_PAD]``, columns are
    key columns. ``"value"``: ``[2, HALF_PAD, DIM_PAD]``, the inverse from value columns.
    """
    signs, full, half = _signs(dim), padded(dim), padded(dim // 2)
    if order == "natural":
        table = _pad(signs, full, full)
    elif order == "key":
        table = _pad(signs[:, key_channels(dim)].transpose(0, 1), full, half)
    else:
        table = _pad(signs.T[value_channels(dim)], half, full)
    return table.to(device=device, dtype=dtype).contiguous()


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand type of products of model tensors. The interpreter has no bf16 product."""
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and not is_interpreted() else tl.float32


def has_subnormals() -> bool:
    """Whether fp16 subnormal operands survive the matrix unit."""
    return torch.version.hip is None


# ---- device code ----------------------------------------------------------------------
@triton.jit
def find_request(starts_ptr, index, requests, BLOCK: tl.constexpr):
    """Largest r with ``starts[r] // BLOCK + r <= index`` (BLOCK > 1) or ``starts[r] <= index`` (1).

    With BLOCK > 1, request r owns the block indices from ``starts[r] // BLOCK + r`` on: enough
    for its tokens in blocks of BLOCK, and one more.
    """
    low = 0
    high = requests
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(starts_ptr + middle)
        if BLOCK > 1:
            first = first // BLOCK + middle
        if first <= index:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def as_pointer(base, offset, element: tl.constexpr):
    """Byte pointer ``base + offset`` as a pointer to ``element``."""
    return (base + offset).to(tl.pointer_type(element), bitcast=True)


@triton.jit
def e4m3_to_float(byte):
    """Bits of a float8 e4m3 number (not NaN) to float32, on every architecture."""
    bits = byte.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def load_key_params(page, index, F: tl.constexpr, mask):
    """Element ``index`` of ``k_params``, as float32."""
    if F.FP16_PARAMS:
        value = tl.load(as_pointer(page, F.K_PARAMS, tl.float16) + index, mask=mask, other=0.0)
        return value.to(tl.float32)
    else:
        return e4m3_to_float(tl.load(page + F.K_PARAMS + index, mask=mask, other=0))


@triton.jit
def codes_to_half(bits, SUBNORMAL: tl.constexpr):
    """Masked 16-bit halves to fp16: ``bits * 2**-24``, or ``bits`` without subnormals."""
    if SUBNORMAL:
        return bits.to(tl.float16, bitcast=True)
    else:
        return (bits | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def half_dot(a, b, acc, PRECISE: tl.constexpr):
    """``acc + a @ b`` with float32 ``a`` and fp16 ``b``; PRECISE splits ``a`` in two halves."""
    high = a.to(tl.float16)
    acc = tl.dot(high, b, acc)
    if PRECISE:
        acc = tl.dot((a - high.to(tl.float32)).to(tl.float16), b, acc)
    return acc


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
def slot_of(r, j, FOLD: tl.constexpr, PART: tl.constexpr):
    """Slot coordinates (r, j) of the tokens of a subset; ``r``, ``j``: those that vary inside its tile."""
    if FOLD == 1:
        return r + PART // 2, j + PART % 2
    else:
        return r + PART, j


@triton.jit
def subset_scores(
    words,  # [HALF_PAD, tokens]
    high,  # the same of the high plane; 3-bit keys: already shifted to the block
    qs0,
    qs1,
    qs2,
    key_zero,
    r,
    j,
    F: tl.constexpr,
    FOLD: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """``q * scale @ codes + q @ zero`` of one token subset: ``[rows, tokens]``."""
    # bits of the high plane per code
    HIGH: tl.constexpr = 3 if F.KEY_BITS == 4 else 1
    if FOLD == 1:
        shifted = words >> (8 * R) if R else words
    else:
        shift = (8 * (r + R) + 2 * j).to(tl.uint16)[None, :]
        shifted = words >> shift
    bits0 = shifted & (0x3 << (2 * J))
    bits1 = shifted & (0x30 << (2 * J))
    if F.KEY_BITS > 2:
        if FOLD == 1:
            shifted = high >> (8 * R) if R else high
        else:
            shifted = high >> shift
        bits0 |= shifted & ((4 * HIGH) << (2 * J))
        bits1 |= shifted & ((4 * HIGH) << (2 * J + 4))
    s = tl.zeros([qs0.shape[0], words.shape[1]], tl.float32)
    s = half_dot(qs0, codes_to_half(bits0.to(tl.uint16), SUBNORMAL), s, PRECISE)
    s = half_dot(qs1, codes_to_half(bits1.to(tl.uint16), SUBNORMAL), s, PRECISE)
    if F.KEY_BITS > 2:
        # the high plane is rotated by two bits: its slot (r, j, j1) = (1, 1, 1) lies in the other half
        if FOLD == 1:
            if R == 1 and J == 1:
                bits2 = (high & HIGH) << 6
                s = half_dot(qs2, codes_to_half(bits2.to(tl.uint16), SUBNORMAL), s, PRECISE)
        elif FOLD == 4 or R == 1:
            wrapped = ((r + R) * j * HIGH).to(tl.uint16)[None, :]
            bits2 = (high & wrapped) << 6
            s = half_dot(qs2, codes_to_half(bits2.to(tl.uint16), SUBNORMAL), s, PRECISE)
    return s * ((16777216.0 if SUBNORMAL else 1.0) / 4**J) + key_zero[:, None]


@triton.jit
def add_subset_values(
    words,  # [tokens, HALF_PAD]
    p,  # [rows, tokens]
    valid,
    vscale_ptr,
    vzero_ptr,
    tile16,  # of every token: which 16 tokens of the page,
    t,  # lane,
    quad,  # and b, half in v_scale and v_zero
    r,
    j,
    zero,
    acc0,
    acc1,
    F: tl.constexpr,
    FOLD: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """``p @ values`` of one token subset into the accumulators of :func:`attend_page`."""
    VGROUPS: tl.constexpr = F.VALUE_GROUPS
    if FOLD == 1:
        shifted = words >> (8 * R) if R else words
    else:
        shifted = words >> (8 * (r + R) + 4 * j).to(tl.uint16)[:, None]
    bits0 = (shifted & (0x3 << (4 * J))).to(tl.uint16)
    bits1 = (shifted & (0xC << (4 * J))).to(tl.uint16)
    if VGROUPS == 1:
        index = (tile16 * 4 + t) * 4 + quad
        vscale = tl.load(vscale_ptr + index, mask=valid, other=0.0).to(tl.float32)
        vzero = tl.load(vzero_ptr + index, mask=valid, other=0.0).to(tl.float32)
        zero += tl.sum(p * vzero[None, :], 1)
        # slots of token subset j = 1 hold code * 16
        weight = p * (vscale * (0.0625 if J else 1.0))[None, :]
        acc0 = half_dot(weight, codes_to_half(bits0, SUBNORMAL), acc0, PRECISE)
        acc1 = half_dot(weight, codes_to_half(bits1, SUBNORMAL), acc1, PRECISE)
    else:  # scales and zeros vary along the channels: dequantize
        chunk, rest, width = column_offsets(F)
        is_column = tl.arange(0, F.HALF_PAD) < F.DIM // 2
        in_page = valid[:, None] & is_column[None, :]
        for j0 in tl.static_range(2):
            vgroup = (16 * (4 * chunk + rest % width) + 8 * j0 + rest // width) // F.VALUE_GROUP
            scale_index = ((tile16 * 4 + t) * (4 * VGROUPS) + quad)[:, None] + 4 * vgroup[None, :]
            zero_index = (tile16 * (16 * VGROUPS) + t * 4 + quad)[:, None] + 16 * vgroup[None, :]
            vscale = tl.load(vscale_ptr + scale_index, mask=in_page, other=0.0).to(tl.float32)
            vzero = tl.load(vzero_ptr + zero_index, mask=in_page, other=0.0).to(tl.float32)
            if j0 == 0:
                code = (bits0 >> (4 * J)).to(tl.float32)
            else:
                code = (bits1 >> (4 * J + 2)).to(tl.float32)
            value = code * vscale + vzero
            rounded = value.to(tl.float16)
            left = half_dot(p, rounded, tl.zeros_like(acc0), PRECISE)
            if PRECISE:
                left = half_dot(p, (value - rounded.to(tl.float32)).to(tl.float16), left, PRECISE)
            if j0 == 0:
                acc0 += left
            else:
                acc1 += left
    return zero, acc0, acc1


@triton.jit
def attend_page(
    page,  # byte pointer of this page and head
    page_index,  # of the sequence
    limit,  # tokens of this page that are read from it, >= 1
    q0,  # [rows, HALF_PAD] float32: rotated query, key columns j1 = 0, |q| <= 1
    q1,  # the same for j1 = 1
    q2,  # q1 with even and odd columns exchanged (keys of more than 2 bits)
    row_scale,  # [rows]: factor of the logits, in powers of two
    peak,  # [rows] running maximum
    total,  # [rows] running sum
    zero,  # [rows] sum of p * value zero
    acc0,  # [rows, HALF_PAD] value columns j0 = 0, scaled as in rotated_output
    acc1,
    F: tl.constexpr,
    FOLD: tl.constexpr,  # how many of the four slots (r, j) one tile covers: 1, 2 or 4
    SUBNORMAL: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One page: logits, online softmax and weighted values, in the rotated space."""
    DIM: tl.constexpr = F.DIM
    HALF: tl.constexpr = F.DIM // 2
    HALF_PAD: tl.constexpr = F.HALF_PAD
    TILES: tl.constexpr = F.DIM // 16
    PARTS: tl.constexpr = 4 // FOLD
    BLOCKS: tl.constexpr = F.KEY_GROUP // 32
    SUBSET: tl.constexpr = 8 * BLOCKS * FOLD
    GROUPS: tl.constexpr = 128 // F.KEY_GROUP
    exact_page = False
    if F.EXACT_FIRST:
        exact_page = page_index == 0

    column = tl.arange(0, HALF_PAD)
    is_column = column < HALF
    chunk, rest, width = column_offsets(F)
    # keys: word halves are [chunk][g][t, tile, half]; parameters are [t][tile][j1][half]
    key_step = 8 * width
    key_column = 256 * chunk + rest
    t = rest // (2 * width)
    tile = 4 * chunk + rest % (2 * width) // 2
    param = (t * TILES + tile) * 4 + rest % 2
    # values: word halves are [chunk][g][t][tile][half]
    g_of_column = rest // width
    value_column = 256 * chunk + g_of_column * 8 * width + 2 * (rest % width)
    value_step = 2 * width

    token = tl.arange(0, SUBSET)
    g = token % 8
    j = token // 8 % 2 if FOLD > 1 else 0 * token
    r = token // 16 % 2 if FOLD == 4 else 0 * token
    block_in_group = token // (8 * FOLD)
    low_ptr = as_pointer(page, 0, tl.uint16)
    high_ptr = as_pointer(page, F.K_HIGH, tl.uint16)
    value_ptr = as_pointer(page, F.V_CODES, tl.uint16)
    norm_ptr = as_pointer(page, F.NORMS, tl.float16)
    vscale_ptr = as_pointer(page, F.V_SCALE, tl.float16)
    vzero_ptr = as_pointer(page, F.V_ZERO, tl.float16)

    if F.EXACT_FIRST:
        exact = tl.zeros_like(row_scale)
        if exact_page:
            first_ptr = as_pointer(page, F.K_PARAMS + 2 * DIM * (2 if F.FP16_PARAMS else 1), tl.float16)
            first0 = tl.load(first_ptr + param, mask=is_column, other=0.0).to(tl.float32)
            first1 = tl.load(first_ptr + param + 2, mask=is_column, other=0.0).to(tl.float32)
            exact = tl.sum(q0 * first0[None, :] + q1 * first1[None, :], 1)

    for group in tl.static_range(GROUPS):
        param_base = group * 2 * DIM
        if F.EXACT_FIRST:
            param_base = tl.where(exact_page, 0, param_base)
        scale0 = load_key_params(page, param_base + param, F, is_column)
        scale1 = load_key_params(page, param_base + param + 2, F, is_column)
        zero0 = load_key_params(page, param_base + DIM + param, F, is_column)
        zero1 = load_key_params(page, param_base + DIM + param + 2, F, is_column)
        key_zero = tl.sum(q0 * zero0[None, :] + q1 * zero1[None, :], 1)
        qs0 = q0 * scale0[None, :]
        qs1 = q1 * (scale1 * 0.0625)[None, :]  # slots j1 = 1 hold code * 16

        block = group * BLOCKS + block_in_group
        words = tl.load(
            low_ptr + (block * 64 * TILES)[None, :] + key_column[:, None] + key_step[:, None] * g[None, :],
            mask=is_column[:, None],
            other=0,
        )
        high = words
        qs2 = qs1
        if F.KEY_BITS == 3:  # a word serves two blocks
            high = tl.load(
                high_ptr + (block // 2 * 64 * TILES)[None, :] + key_column[:, None] + key_step[:, None] * g[None, :],
                mask=is_column[:, None],
                other=0,
            )
            high = (high >> (block % 2).to(tl.uint16)[None, :]).to(tl.uint16)
        if F.KEY_BITS == 4:
            high = tl.load(
                high_ptr + (block * 64 * TILES)[None, :] + key_column[:, None] + key_step[:, None] * g[None, :],
                mask=is_column[:, None],
                other=0,
            )
        if F.KEY_BITS > 2:
            param2 = param_base + (t * TILES + tile) * 4 + 2 + (1 - rest % 2)
            # the wrapped slot is read as high * 64, in units of 4 * 4**j
            qs2 = q2 * (load_key_params(page, param2, F, is_column) * (0.25 if FOLD == 1 else 0.0625))[None, :]

        # logits of the four (or fewer) subsets
        scores = ()
        best = peak
        for part in tl.static_range(PARTS):
            s = subset_scores(
                words,
                high,
                qs0,
                qs1,
                qs2,
                key_zero,
                r,
                j,
                F,
                FOLD,
                part // 2 if FOLD == 1 else part,
                part % 2 if FOLD == 1 else 0,
                SUBNORMAL,
                PRECISE,
            )
            if F.EXACT_FIRST:
                if group == 0 and part == 0:
                    s = tl.where((exact_page & (token == 0))[None, :], exact[:, None], s)
            slot16, slot8 = slot_of(r, j, FOLD, part)
            valid = 32 * block + 16 * slot16 + 8 * slot8 + g < limit
            if F.HAS_NORM:
                norm = tl.load(norm_ptr + (2 * block + slot16) * 16 + 2 * g + slot8, mask=valid, other=0.0)
                s = s * norm.to(tl.float32)[None, :]
            s = tl.where(valid[None, :], s * row_scale[:, None], float("-inf"))
            best = tl.maximum(best, tl.max(s, 1))
            scores = scores + (s,)

        # a whole group may lie beyond the limit before any token was seen
        pivot = tl.where(best == float("-inf"), 0.0, best)
        shrink = tl.exp2(peak - pivot)
        peak = best
        total = total * shrink
        acc0 = acc0 * shrink[:, None]
        acc1 = acc1 * shrink[:, None]
        if F.VALUE_GROUPS == 1:
            zero = zero * shrink

        value_words = tl.load(
            value_ptr
            + (block * 64 * TILES + g % 2)[:, None]
            + value_column[None, :]
            + (g // 2)[:, None] * value_step[None, :],
            mask=is_column[None, :],
            other=0,
        )
        for part in tl.static_range(PARTS):
            p = tl.exp2(scores[part] - pivot[:, None])
            total += tl.sum(p, 1)
            slot16, slot8 = slot_of(r, j, FOLD, part)
            valid = 32 * block + 16 * slot16 + 8 * slot8 + g < limit
            zero, acc0, acc1 = add_subset_values(
                value_words,
                p,
                valid,
                vscale_ptr,
                vzero_ptr,
                2 * block + slot16,
                g // 2,
                slot8 * 2 + g % 2,
                r,
                j,
                zero,
                acc0,
                acc1,
                F,
                FOLD,
                part // 2 if FOLD == 1 else part,
                part % 2 if FOLD == 1 else 0,
                SUBNORMAL,
                PRECISE,
            )
    return peak, total, zero, acc0, acc1


@triton.jit
def rotated_output(zero, acc0, acc1, F: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Accumulators of :func:`attend_page` as unnormalised outputs in value columns j0 = 0, 1."""
    UNIT: tl.constexpr = 16777216.0 if SUBNORMAL else 1.0
    if F.VALUE_GROUPS == 1:
        column = tl.arange(0, F.HALF_PAD)
        offset = tl.where((column < F.DIM // 2)[None, :], zero[:, None], 0.0)
        return acc0 * UNIT + offset, acc1 * (UNIT / 4) + offset
    else:
        return acc0, acc1


@triton.jit
def attend_tokens(
    q,  # [rows, DIM_PAD] DOT type, not rotated
    key,  # [DIM_PAD, tokens]
    value,  # [tokens, DIM_PAD]
    visible,  # [rows, tokens]
    logit_scale,  # softmax scale * log2(e)
    peak,
    total,
    acc,  # [rows, DIM_PAD]
    DOT: tl.constexpr,
):
    """Unquantized tokens: logits, online softmax and weighted values. Invisible rows must be finite."""
    s = tl.dot(q, key, input_precision="ieee") * logit_scale
    s = tl.where(visible, s, float("-inf"))
    best = tl.maximum(peak, tl.max(s, 1))
    pivot = tl.where(best == float("-inf"), 0.0, best)
    shrink = tl.exp2(peak - pivot)
    p = tl.exp2(s - pivot[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(DOT), value, acc * shrink[:, None], input_precision="ieee")
    return best, total, acc


@triton.jit
def ring_tokens(
    ring_ptr,  # byte pointer, head added
    ring_stride,
    table_ptr,  # of this request
    position,  # [tokens]
    is_token,
    ring_pages,
    element: tl.constexpr,
    F: tl.constexpr,
):
    """Pointers ``[tokens]`` to keys in the ring; the value follows DIM elements behind."""
    BYTES: tl.constexpr = element.primitive_bitwidth // 8
    slot = position % (F.RING_TOKENS * ring_pages)
    page = tl.load(table_ptr + slot // F.RING_TOKENS, mask=is_token, other=0).to(tl.int64)
    offset = page * ring_stride + (slot % F.RING_TOKENS) * (2 * F.DIM * BYTES)
    return as_pointer(ring_ptr, offset, element)


@triton.jit
def attend_tail(
    q,
    row_position,  # [rows] position of each row's token; -1 where there is none
    begin,  # first row of the step's tokens of this request
    context,
    ring_begin,
    last,  # one past the last position any row sees
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    ring_ptr,
    ring_stride,
    ring_table_ptr,
    ring_pages,
    logit_scale,
    peak,
    total,
    acc,
    F: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Exact tokens: the ring's ``ring_begin .. context - 1``, then the step's own up to ``last - 1``."""
    DIM_PAD: tl.constexpr = F.DIM_PAD
    channel = tl.arange(0, DIM_PAD)
    is_channel = channel < F.DIM
    element: tl.constexpr = key_ptr.dtype.element_ty
    for start in range(ring_begin, context, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        is_token = position < context
        token_ptr = ring_tokens(
            ring_ptr, ring_stride, ring_table_ptr, position, is_token, ring_pages, element, F
        )
        key = tl.load(token_ptr[None, :] + channel[:, None], mask=is_token[None, :] & is_channel[:, None], other=0.0)
        value = tl.load(
            token_ptr[:, None] + F.DIM + channel[None, :], mask=is_token[:, None] & is_channel[None, :], other=0.0
        )
        visible = is_token[None, :] & (row_position >= 0)[:, None]
        peak, total, acc = attend_tokens(
            q, key.to(DOT), value.to(DOT), visible, logit_scale, peak, total, acc, DOT
        )
    for start in range(context, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        is_token = position < last
        row = (begin + position - context).to(tl.int64)
        key = tl.load(
            key_ptr + row[None, :] * key_stride + channel[:, None],
            mask=is_token[None, :] & is_channel[:, None],
            other=0.0,
        )
        value = tl.load(
            value_ptr + row[:, None] * value_stride + channel[None, :],
            mask=is_token[:, None] & is_channel[None, :],
            other=0.0,
        )
        visible = is_token[None, :] & (position[None, :] <= row_position[:, None])
        peak, total, acc = attend_tokens(
            q, key.to(DOT), value.to(DOT), visible, logit_scale, peak, total, acc, DOT
        )
    return peak, total, acc


@triton.jit
def normalise_rows(q0, q1, logit_scale):
    """Scale rows to at most 1, which keeps ``q * key scale`` inside fp16; returns the logit factors too."""
    top = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
    top = tl.where(top > 0, top, 1.0)
    return q0 / top[:, None], q1 / top[:, None], top * logit_scale


@triton.jit
def exchange_halves(q, HALF_PAD: tl.constexpr):
    """Exchange even and odd columns."""
    pairs = tl.reshape(q, [q.shape[0], HALF_PAD // 2, 2])
    even, odd = tl.split(pairs)
    return tl.reshape(tl.join(odd, even), [q.shape[0], HALF_PAD])
