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

from vllm_oscar.core.config import NormScope, ParamType
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.hadamard import hadamard

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
    PADDING: tl.constexpr
    PAGE_BYTES: tl.constexpr
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
        PADDING=fmt.sections["norms"].end,
        PAGE_BYTES=fmt.page_bytes,
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


def codes_mode() -> int:
    """CODES of :func:`slot_codes`: AMD's matrix units may flush fp16 subnormals."""
    if torch.version.hip is not None:
        return 0
    return 1 if is_interpreted() else 2


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
def e4m3_to_half(byte):
    """Bits of a float8 e4m3 number (not NaN) to fp16, on every architecture."""
    bits = byte.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


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
def slot_codes(words, SHIFT: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr, CODES: tl.constexpr):
    """``((words >> SHIFT) & MASK) << UP`` as fp16: that integer, times 2**-24 if CODES is not 0.

    CODES: 0 portable, 1 subnormals, 2 subnormals, two at a time in PTX.
    """
    if CODES == 2:
        # bits that cross from one half into the other are masked
        WIDE_MASK: tl.constexpr = MASK * 65537
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 t, t, {WIDE_MASK}; shl.b32 $0, t, {UP}; }}",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        bits = words >> SHIFT if SHIFT else words
        bits = bits & MASK
        bits = bits << UP if UP else bits
        return codes_to_half(bits.to(tl.uint16), CODES)


@triton.jit
def codes_to_half(bits, CODES: tl.constexpr):
    """Masked 16-bit halves to fp16, see :func:`slot_codes`."""
    if CODES:
        return bits.to(tl.float16, bitcast=True)
    else:
        return (bits | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def half_dot(a, b, acc, PRECISE: tl.constexpr):
    """``acc + a @ b`` with fp16 ``b``; PRECISE splits a float32 ``a`` in two halves."""
    high = a.to(tl.float16)
    acc = tl.dot(high, b, acc)
    if PRECISE:
        acc = tl.dot((a - high.to(tl.float32)).to(tl.float16), b, acc)
    return acc


@triton.jit
def load_columns(pointer, is_column, F: tl.constexpr):
    """Load with a mask only where tiles have padding."""
    if F.DIM == F.DIM_PAD:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=is_column, other=0)


@triton.jit
def dot_vector(q0, q1, x0, x1, HALF_PAD: tl.constexpr, PRECISE: tl.constexpr):
    """``q0 @ x0 + q1 @ x1`` with vectors x; as a product, it needs the queries in no second layout."""
    acc = tl.zeros([q0.shape[0], 8], tl.float32)
    acc = half_dot(q0, tl.broadcast_to(x0[:, None], [HALF_PAD, 8]), acc, PRECISE)
    acc = half_dot(q1, tl.broadcast_to(x1[:, None], [HALF_PAD, 8]), acc, PRECISE)
    return tl.max(acc, 1)


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
    qs0,
    qs1,
    qs2,
    r,
    j,
    group,
    F: tl.constexpr,
    FOLD: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    CODES: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """``q * scale @ codes`` of one token subset, ``[rows, tokens]``, in units of ``4**-J`` and CODES."""
    ROWS: tl.constexpr = qs0.shape[0]
    s = tl.zeros([ROWS, words.shape[1]], tl.float32)
    if FOLD == 1:
        s = half_dot(qs0, slot_codes(words, 8 * R, 0x3 << (2 * J), 0, CODES), s, PRECISE)
        s = half_dot(qs1, slot_codes(words, 8 * R, 0x30 << (2 * J), 0, CODES), s, PRECISE)
    else:
        low = (words >> (8 * (r + R) + 2 * j).to(tl.uint16)[None, :]).to(tl.uint16)
        s = half_dot(qs0, slot_codes(low, 0, 0x3, 0, CODES), s, PRECISE)
        s = half_dot(qs1, slot_codes(low, 0, 0x30, 0, CODES), s, PRECISE)
    if F.KEY_BITS == 4:
        s += high_scores(high, qs0, qs1, qs2, r, j, F, FOLD, R, J, 3, 0, CODES, PRECISE)
    if F.KEY_BITS == 3:
        if F.KEY_GROUP == 32:
            own = (high >> (group % 2).to(tl.uint16)).to(tl.uint16)
            s += high_scores(own, qs0, qs1, qs2, r, j, F, FOLD, R, J, 1, 0, CODES, PRECISE)
        else:
            SLOTS: tl.constexpr = 8 * FOLD
            even = high_scores(high, qs0, qs1, qs2, r, j, F, FOLD, R, J, 1, 0, CODES, PRECISE)
            odd = high_scores(high, qs0, qs1, qs2, r, j, F, FOLD, R, J, 1, 1, CODES, PRECISE)
            both = tl.join(even, odd)  # [rows, (pair, slot), block of the pair]
            both = tl.permute(tl.reshape(both, [ROWS, high.shape[1] // SLOTS, SLOTS, 2]), [0, 1, 3, 2])
            s += tl.reshape(both, [ROWS, words.shape[1]])
    return s


@triton.jit
def high_scores(
    high,
    qs0,
    qs1,
    qs2,
    r,
    j,
    F: tl.constexpr,
    FOLD: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    FIELD: tl.constexpr,  # bits of the block in a field of the high plane
    B: tl.constexpr,  # and their position in it
    CODES: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The high plane's part of :func:`subset_scores`. Its fields lie two bits above those of the codes.

    A product of its own lets both planes go from memory to the operands unmixed. The plane
    is rotated by two bits: its slot (r, j, j1) = (1, 1, 1) lies in the other half.
    """
    s = tl.zeros([qs0.shape[0], high.shape[1]], tl.float32)
    if FOLD == 1:
        s = half_dot(qs0, slot_codes(high, 8 * R + B, FIELD << (2 * J + 2), 0, CODES), s, PRECISE)
        if R == 1 and J == 1:
            s = half_dot(qs2, slot_codes(high, B, FIELD, 6, CODES), s, PRECISE)
        else:
            s = half_dot(qs1, slot_codes(high, 8 * R + B, FIELD << (2 * J + 6), 0, CODES), s, PRECISE)
    else:
        if F.KEY_BITS == 3 and F.KEY_GROUP > 32:  # tokens of both blocks share the tile
            token = tl.arange(0, high.shape[1])
            j = token // 8 % 2
            r = token // 16 % 2 if FOLD == 4 else 0 * token
        upper = (high >> (8 * (r + R) + 2 * j + B).to(tl.uint16)[None, :]).to(tl.uint16)
        s = half_dot(qs0, slot_codes(upper, 0, FIELD << 2, 0, CODES), s, PRECISE)
        # a shift by 10 leaves zeros where the slot is in the other half
        s = half_dot(qs1, slot_codes(upper, 0, FIELD << 6, 0, CODES), s, PRECISE)
        if FOLD == 4 or R == 1:
            wrapped = (high >> B) & ((r + R) * j * FIELD).to(tl.uint16)[None, :]
            s = half_dot(qs2, codes_to_half((wrapped << 6).to(tl.uint16), CODES), s, PRECISE)
    return s


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
    offsets,  # [rows, tokens]: sum of p * value zero over subsets
    acc0,
    acc1,
    F: tl.constexpr,
    FOLD: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    CODES: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """``p @ values`` of one token subset into the accumulators of :func:`attend_group`."""
    VGROUPS: tl.constexpr = F.VALUE_GROUPS
    if FOLD > 1:
        words = (words >> (8 * (r + R) + 4 * j).to(tl.uint16)[:, None]).to(tl.uint16)
    SHIFT: tl.constexpr = 8 * R if FOLD == 1 else 0
    if VGROUPS == 1:
        index = (tile16 * 4 + t) * 4 + quad
        vscale = tl.load(vscale_ptr + index, mask=valid, other=0.0).to(tl.float32)
        vzero = tl.load(vzero_ptr + index, mask=valid, other=0.0).to(tl.float32)
        offsets += p * vzero[None, :]
        # slots of token subset j = 1 hold code * 16
        weight = p * (vscale * (0.0625 if J else 1.0))[None, :]
        acc0 = half_dot(weight, slot_codes(words, SHIFT, 0x3 << (4 * J), 0, CODES), acc0, PRECISE)
        acc1 = half_dot(weight, slot_codes(words, SHIFT, 0xC << (4 * J), 0, CODES), acc1, PRECISE)
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
            code = (words >> (SHIFT + 4 * J + 2 * j0)) & 3
            value = code.to(tl.float32) * vscale + vzero
            rounded = value.to(tl.float16)
            left = half_dot(p, rounded, tl.zeros_like(acc0), PRECISE)
            if PRECISE:
                left = half_dot(p, (value - rounded.to(tl.float32)).to(tl.float16), left, PRECISE)
            if j0 == 0:
                acc0 += left
            else:
                acc1 += left
    return offsets, acc0, acc1


@triton.jit
def attend_group(
    pages_ptr,  # byte pointer, head added
    page_stride,
    table_ptr,  # block table of the request
    index,  # of the key group in the sequence
    end,  # tokens of the sequence that are read from pages, > the group's first
    q0,  # [rows, HALF_PAD] fp16 (PRECISE: float32) rotated query, key columns j1 = 0, |q| <= 1
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
    CODES: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One key group: logits, online softmax and weighted values, in the rotated space."""
    DIM: tl.constexpr = F.DIM
    HALF: tl.constexpr = F.DIM // 2
    HALF_PAD: tl.constexpr = F.HALF_PAD
    TILES: tl.constexpr = F.DIM // 16
    PARTS: tl.constexpr = 4 // FOLD
    BLOCKS: tl.constexpr = F.KEY_GROUP // 32
    SUBSET: tl.constexpr = 8 * BLOCKS * FOLD
    GROUPS: tl.constexpr = 128 // F.KEY_GROUP
    UNIT: tl.constexpr = 16777216.0 if CODES else 1.0
    group = index % GROUPS
    page_index = index // GROUPS
    limit = end - page_index * 128
    page = pages_ptr + tl.load(table_ptr + page_index).to(tl.int64) * page_stride
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
    token = tl.arange(0, SUBSET)
    g = token % 8
    j = token // 8 % 2 if FOLD > 1 else 0 * token
    r = token // 16 % 2 if FOLD == 4 else 0 * token
    block = token // (8 * FOLD)
    tile16 = 2 * block + r
    position = 16 * tile16 + 8 * j + g
    norm_offset = 16 * tile16 + 2 * g + j
    quad = 2 * j + g % 2
    word_offset = (block * 64 * TILES)[None, :] + key_column[:, None] + key_step[:, None] * g[None, :]
    value_offset = (
        (block * 64 * TILES + g % 2)[:, None] + value_column[None, :] + (g // 2)[:, None] * value_step[None, :]
    )
    high_offset = word_offset
    if F.KEY_BITS == 3 and BLOCKS > 1:  # a word serves two blocks
        pair_token = tl.arange(0, SUBSET // 2)
        high_offset = (pair_token // (8 * FOLD) * 64 * TILES)[None, :] + key_column[:, None]
        high_offset += key_step[:, None] * (pair_token % 8)[None, :]
    low_ptr = as_pointer(page, 0, tl.uint16)
    high_ptr = as_pointer(page, F.K_HIGH, tl.uint16)
    value_ptr = as_pointer(page, F.V_CODES, tl.uint16)
    norm_ptr = as_pointer(page, F.NORMS, tl.float16)
    vscale_ptr = as_pointer(page, F.V_SCALE, tl.float16)
    vzero_ptr = as_pointer(page, F.V_ZERO, tl.float16)

    if F.EXACT_FIRST:
        exact = tl.zeros_like(row_scale)
        has_exact = exact_page & (group == 0)
        if has_exact:
            first_ptr = as_pointer(page, F.K_PARAMS + 2 * DIM * (2 if F.FP16_PARAMS else 1), tl.float16)
            first0 = load_columns(first_ptr + 4 * cell + half, is_column, F)
            first1 = load_columns(first_ptr + 4 * cell + 2 + half, is_column, F)
            exact = dot_vector(q0, q1, first0, first1, HALF_PAD, PRECISE) * row_scale

    param_base = group * 2 * DIM
    if F.EXACT_FIRST:
        param_base = tl.where(exact_page, 0, param_base)
    scale0, scale1, scale2 = load_key_params(page, param_base, cell, half, F, is_column)
    zero0, zero1, _ = load_key_params(page, param_base + DIM, cell, half, F, is_column)
    key_zero = dot_vector(q0, q1, zero0, zero1, HALF_PAD, PRECISE) * row_scale
    qs0 = q0 * scale0.to(q0.dtype)[None, :]
    qs1 = q1 * (scale1.to(q0.dtype) * 0.0625)[None, :]  # slots j1 = 1 hold code * 16

    words = load_columns(low_ptr + group * (BLOCKS * 64 * TILES) + word_offset, is_column[:, None], F)
    high = words
    qs2 = qs1
    if F.KEY_BITS > 2:
        high_block = (group * BLOCKS) // 2 if F.KEY_BITS == 3 else group * BLOCKS
        high = load_columns(high_ptr + high_block * (64 * TILES) + high_offset, is_column[:, None], F)
        # the wrapped slot is read as high * 64, in units of 4 * 4**j
        qs2 = q2 * (scale2.to(q0.dtype) * (0.25 if FOLD == 1 else 0.0625))[None, :]

    # logits of the four (or fewer) subsets
    scores = ()
    best = tl.full([q0.shape[0], SUBSET], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        s = subset_scores(
            words,
            high,
            qs0,
            qs1,
            qs2,
            r,
            j,
            group,
            F,
            FOLD,
            part // 2 if FOLD == 1 else part,
            part % 2 if FOLD == 1 else 0,
            CODES,
            PRECISE,
        )
        unit = row_scale * (UNIT / (4 ** (part % 2) if FOLD == 1 else 1))
        s = s * unit[:, None] + key_zero[:, None]
        if F.EXACT_FIRST:
            if part == 0:
                s = tl.where((has_exact & (token == 0))[None, :], exact[:, None], s)
        first16, first8 = slot_of(group * 2 * BLOCKS, FOLD, part)
        valid = position < limit - 16 * first16 - 8 * first8
        if F.HAS_NORM:
            norm = tl.load(norm_ptr + (16 * first16 + first8) + norm_offset, mask=valid, other=0.0)
            s = s * norm.to(tl.float32)[None, :]
        s = tl.where(valid[None, :], s, float("-inf"))
        best = tl.maximum(best, s)
        scores = scores + (s,)
    best = tl.maximum(peak, tl.max(best, 1))

    # a whole group may lie beyond the limit before any token was seen
    pivot = tl.where(best == float("-inf"), 0.0, best)
    shrink = tl.exp2(peak - pivot)
    peak = best
    total = total * shrink
    acc0 = acc0 * shrink[:, None]
    acc1 = acc1 * shrink[:, None]
    if F.VALUE_GROUPS == 1:
        zero = zero * shrink

    value_words = load_columns(value_ptr + group * (BLOCKS * 64 * TILES) + value_offset, is_column[None, :], F)
    weights = tl.zeros([q0.shape[0], SUBSET], tl.float32)
    offsets = tl.zeros([q0.shape[0], SUBSET], tl.float32)
    for part in tl.static_range(PARTS):
        p = tl.exp2(scores[part] - pivot[:, None])
        weights += p
        first16, first8 = slot_of(group * 2 * BLOCKS, FOLD, part)
        valid = position < limit - 16 * first16 - 8 * first8
        first = 16 * F.VALUE_GROUPS * first16 + 2 * first8
        offsets, acc0, acc1 = add_subset_values(
            value_words,
            p,
            valid,
            vscale_ptr + first,
            vzero_ptr + first,
            tile16,
            g // 2,
            quad,
            r,
            j,
            offsets,
            acc0,
            acc1,
            F,
            FOLD,
            part // 2 if FOLD == 1 else part,
            part % 2 if FOLD == 1 else 0,
            CODES,
            PRECISE,
        )
    total += tl.sum(weights, 1)
    if F.VALUE_GROUPS == 1:
        zero += tl.sum(offsets, 1)
    return peak, total, zero, acc0, acc1


@triton.jit
def rotated_output(zero, acc0, acc1, F: tl.constexpr, CODES: tl.constexpr):
    """Accumulators of :func:`attend_group` as unnormalised outputs in value columns j0 = 0, 1."""
    UNIT: tl.constexpr = 16777216.0 if CODES else 1.0
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
def normalise_rows(q0, q1, q2, logit_scale, PRECISE: tl.constexpr):
    """Scale rows to at most 1, which keeps ``q * key scale`` inside fp16.

    Returns the queries of :func:`attend_group` and the factors of the logits.
    """
    top = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
    top = tl.where(top > 0, top, 1.0)
    q0 = q0 / top[:, None]
    q1 = q1 / top[:, None]
    q2 = q2 / top[:, None]
    if not PRECISE:
        q0 = q0.to(tl.float16)
        q1 = q1.to(tl.float16)
        q2 = q2.to(tl.float16)
    return q0, q1, q2, top * logit_scale
