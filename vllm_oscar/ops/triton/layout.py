# SPDX-License-Identifier: Apache-2.0
"""What the host knows before a launch: the page layout, rotation tables, how to multiply.

A slot ``(r, j)`` of the code words selects 8 tokens ``32*block + 16*r + 8*j + g`` of every
32-token block, for keys and for values alike, so one tile of key words gives the
logits of a *token subset* and one tile of value words consumes exactly these
probabilities. The words are read as 16-bit halves:

* keys: tile ``[columns, tokens]``; column ``c`` is word half ``(t, tile, half)`` of a
  chunk in storage order, and holds channel ``16*tile + 8*j1 + 2*t + half`` in its
  slots ``j1``: two products per subset, with the query gathered in the same order;
* values: tile ``[tokens, columns]``; column ``c`` is ``(g, tile)`` of a chunk, and holds
  channel ``16*tile + 8*j0 + g``: two accumulators, ``j0`` in {0, 1}.

Words of the high planes are read alike and multiplied on their own. As these planes are
rotated by two bits, one slot lies in the other half of its word: for keys that is the
column beside it, for values the token beside it, and so that slot's product takes the
query, or the weights, with neighbours exchanged.

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
from vllm_oscar.core.ring import RingType
from vllm_oscar.core.softmax import Softmax


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
    VALUE_BITS: tl.constexpr
    KEY_GROUP: tl.constexpr
    FP16_PARAMS: tl.constexpr
    VALUE_GROUPS: tl.constexpr
    VALUE_GROUP: tl.constexpr
    HAS_NORM: tl.constexpr
    JOINT_NORM: tl.constexpr
    KEY_GAIN: tl.constexpr
    VALUE_GAIN: tl.constexpr
    FIRST_TOKEN: tl.constexpr
    INTEGER_ZERO: tl.constexpr
    K_HIGH: tl.constexpr
    V_CODES: tl.constexpr
    V_HIGH: tl.constexpr
    K_PARAMS: tl.constexpr
    FIRST_KEY: tl.constexpr  # in the first page of a sequence, if FIRST_TOKEN
    FIRST_VALUE: tl.constexpr
    V_SCALE: tl.constexpr
    V_ZERO: tl.constexpr
    NORMS: tl.constexpr
    PADDING: tl.constexpr
    PAGE_BYTES: tl.constexpr
    RING_INT8: tl.constexpr
    RING_TOKENS: tl.constexpr  # tokens per ring page
    RING_SCALES: tl.constexpr  # behind the tokens of a ring page, if RING_INT8
    ROTATION_SCALE: tl.constexpr  # 1 / sqrt(DIM): the tables hold signs


@lru_cache(maxsize=None)
def page_layout(fmt: PageFormat, itemsize: int) -> Layout:
    """``fmt`` for a model whose elements have ``itemsize`` bytes."""
    config, sections = fmt.config, {name: section.offset for name, section in fmt.sections.items()}
    fields = dict(
        DIM=fmt.head_dim,
        DIM_PAD=padded(fmt.head_dim),
        HALF_PAD=padded(fmt.head_dim // 2),
        KEY_BITS=config.key_bits,
        VALUE_BITS=config.value_bits,
        KEY_GROUP=config.key_group,
        FP16_PARAMS=config.key_param is ParamType.FP16,
        VALUE_GROUPS=fmt.value_groups,
        VALUE_GROUP=config.value_group,
        HAS_NORM=config.norm is not NormScope.NONE,
        JOINT_NORM=config.norm is NormScope.JOINT,
        KEY_GAIN=config.key_gain,
        VALUE_GAIN=config.value_gain,
        FIRST_TOKEN=config.first_token,
        INTEGER_ZERO=config.integer_zero,
        K_HIGH=sections["k_high"],
        V_CODES=sections["v_codes"],
        V_HIGH=sections["v_high"],
        K_PARAMS=sections["k_params"],
        FIRST_KEY=fmt.first_key.offset,
        FIRST_VALUE=fmt.first_value.offset,
        V_SCALE=sections["v_scale"],
        V_ZERO=sections["v_zero"],
        NORMS=sections["norms"],
        PADDING=fmt.sections["norms"].end,
        PAGE_BYTES=fmt.page_bytes,
        RING_INT8=config.ring is RingType.INT8,
        RING_TOKENS=fmt.ring_tokens_per_page(itemsize),
        RING_SCALES=fmt.ring_tokens_per_page(itemsize) * 2 * fmt.head_dim,
        ROTATION_SCALE=fmt.head_dim**-0.5,
    )
    return Layout(**{name: _constant(value) for name, value in fields.items()})


class Mode(NamedTuple):
    """How a kernel multiplies, and what of :class:`~vllm_oscar.core.softmax.Softmax` it needs, at compile time."""

    DOT: tl.constexpr  # operand type of products of the model's tensors
    CODES: tl.constexpr  # how codes become fp16, see codes.slot_codes
    PRECISE: tl.constexpr  # float32 in products with codes, as two fp16 halves
    FOLD: tl.constexpr  # how many of the four slots (r, j) one tile of tokens covers: 1, 2 or 4
    SLIDING: tl.constexpr  # a sliding window
    SOFT_CAP: tl.constexpr
    SINKS: tl.constexpr


def mode(dtype: torch.dtype, fold: int, softmax: Softmax) -> Mode:
    """The :class:`Mode` for a layer of a model in ``dtype``."""
    used = (x is not None for x in (softmax.sliding_window, softmax.soft_cap, softmax.sinks))
    return _mode(dtype, codes_mode(), fold, *used)


@lru_cache(maxsize=None)
def _mode(dtype: torch.dtype, codes: int, fold: int, *used: bool) -> Mode:
    return Mode(*map(_constant, (dot_dtype(dtype), codes, dtype == torch.float32, fold, *used)))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand type of products of model tensors. The interpreter has no bf16 product."""
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and not is_interpreted() else tl.float32


def codes_mode() -> int:
    """0 portable, 1 subnormals, 2 subnormals two at a time: AMD's matrix units may flush subnormals."""
    if torch.version.hip is not None:
        return 0
    return 1 if is_interpreted() else 2


def _constant(value):
    # In the interpreter an expression of a constexpr on the left of a tensor is no tensor.
    return value if is_interpreted() else tl.constexpr(value)


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
def rotation(dim: int, order: str, device: torch.device) -> torch.Tensor:
    """The unnormalised Hadamard matrix (entries 1, -1, padding 0) in the order of a kernel, int8.

    ``"natural"``: ``[DIM_PAD, DIM_PAD]``. ``"key"``: ``[2, DIM_PAD, HALF_PAD]``, columns are
    key columns. ``"value"``: ``[2, HALF_PAD, DIM_PAD]``, the inverse from value columns.
    """
    signs, full, half = _signs(dim), padded(dim), padded(dim // 2)
    with torch.device("cpu"):  # vLLM makes its layers under another default
        if order == "natural":
            table = _pad(signs, full, full)
        elif order == "key":
            table = _pad(signs[:, key_channels(dim)].transpose(0, 1), full, half)
        else:
            table = _pad(signs.T[value_channels(dim)], half, full)
    return table.to(torch.int8).contiguous().to(device)
