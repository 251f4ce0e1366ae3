# SPDX-License-Identifier: Apache-2.0
"""What every kernel is called with, where a request's tokens are, and attention over unpacked tokens.

Arguments that belong together are one tuple: the step, the layer's cache, each of the
layer's tensors. Request arithmetic and ring addressing are here and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_oscar.ops.step import Cache, Step

LOG2E = tl.constexpr(1.4426950408889634)
_NAME = "triton"


# ---- arguments ---------------------------------------------------------------------
class StepArgs(NamedTuple):
    """A :class:`~vllm_oscar.ops.step.Step`; int32 pointers, rows in entries."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    ring_table: torch.Tensor
    ring_start: torch.Tensor
    page_table_row: int
    ring_table_row: int
    requests: int


class CacheArgs(NamedTuple):
    """A :class:`~vllm_oscar.ops.step.Cache`; byte pointers, strides in bytes."""

    pages: torch.Tensor
    ring: torch.Tensor
    page_block: int
    page_head: int
    ring_block: int
    ring_head: int
    ring_pages: int


class SoftmaxArgs(NamedTuple):
    """A :class:`~vllm_oscar.core.softmax.Softmax`; of what it has not, anything, which is not read: ``layout.Mode``."""

    scale: float
    sliding_window: int
    soft_cap: float
    sinks: torch.Tensor | None


class TokenArgs(NamedTuple):
    """One of the layer's tensors ``[tokens, heads, head_dim]``; strides in elements."""

    data: torch.Tensor
    token: int
    head: int


def require(condition: bool, message: str) -> None:
    """``ValueError`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"OScaR Triton kernels: {message}")


def step_args(step: Step) -> StepArgs:
    """Converted once per step."""
    args = step.native.get(_NAME)
    if args is None:
        for name in ("query_start_loc", "seq_lens", "page_table", "ring_table", "ring_start"):
            x = getattr(step, name)
            require(x.dtype == torch.int32, f"{name} is {x.dtype}, not int32")
            require(x.stride(-1) == 1 or x.shape[-1] <= 1, f"{name} must be contiguous in its last dimension")
        args = step.native[_NAME] = StepArgs(
            step.query_start_loc,
            step.seq_lens,
            step.page_table,
            step.ring_table,
            step.ring_start,
            step.page_table.stride(0),
            step.ring_table.stride(0),
            step.requests,
        )
    return args


def cache_args(cache: Cache) -> CacheArgs:
    """Converted once per layer."""
    args = cache.native.get(_NAME)
    if args is None:
        for name in ("pages", "ring"):
            require(getattr(cache, name).stride(-1) == 1, f"the bytes of a page of {name} must be contiguous")
        args = cache.native[_NAME] = CacheArgs(
            cache.pages,
            cache.ring,
            *cache.pages.stride()[:2],
            *cache.ring.stride()[:2],
            cache.ring_pages,
        )
    return args


def softmax_args(cache: Cache, query_heads: int) -> SoftmaxArgs:
    """Converted once per layer."""
    args = cache.native.get((_NAME, query_heads))
    if args is None:
        softmax, sinks = cache.softmax, cache.softmax.sinks
        if sinks is not None:
            plain = sinks.dtype == torch.float32 and sinks.is_contiguous() and sinks.shape == (query_heads,)
            require(plain, f"sinks are {sinks.dtype} {list(sinks.shape)}, not contiguous float32 [{query_heads}]")
        args = cache.native[_NAME, query_heads] = SoftmaxArgs(
            softmax.scale, softmax.sliding_window or 0, softmax.soft_cap or 1.0, sinks
        )
    return args


def token_args(name: str, x: torch.Tensor) -> TokenArgs:
    """``x [tokens, heads, head_dim]``; its channels must be contiguous, and nothing is copied to make them so."""
    token, head, channel = x.stride()
    require(channel == 1, f"the channels of {name} must be contiguous, but their stride is {channel}")
    return TokenArgs(x, token, head)


# ---- device: where a request's tokens are -------------------------------------------
class StepTokens(NamedTuple):
    """The step's tokens of one request: rows begin .. begin + length - 1 are positions context, context + 1, ..."""

    begin: tl.tensor
    length: tl.tensor
    context: tl.tensor


@triton.jit
def step_tokens(step, request):
    """:class:`StepTokens` of a request. One that pads a batch may be shorter than its query: it has no context."""
    begin = tl.load(step.query_start_loc + request)
    length = tl.load(step.query_start_loc + request + 1) - begin
    return StepTokens(begin, length, tl.maximum(tl.load(step.seq_lens + request) - length, 0))


@triton.jit
def first_block(begin, request, BLOCK: tl.constexpr):
    """First block of BLOCK tokens of the request whose rows start at ``begin``.

    With BLOCK > 1 a request owns enough blocks for its tokens, and one more: so shapes
    alone say how many blocks a batch has at most, and its rows need not be aligned.
    """
    if BLOCK > 1:
        return begin // BLOCK + request
    else:
        return begin


@triton.jit
def find_request(step, block, BLOCK: tl.constexpr):
    """Last request whose :func:`first_block` is not behind ``block``."""
    low = 0
    high = step.requests
    while high - low > 1:
        middle = (low + high) // 2
        if first_block(tl.load(step.query_start_loc + middle), middle, BLOCK) <= block:
            low = middle
        else:
            high = middle
    return low


class Span(NamedTuple):
    """What a token of the step, and later ones, may see of the context."""

    first: tl.tensor  # position of the first such token; without a sliding window, the number 0
    ring: tl.tensor  # first position that is read from the ring; those before it come from pages
    page: tl.tensor  # first page
    pages: tl.tensor  # number of pages; none of the others' table entries may be read


@triton.jit
def visible_span(step, softmax, request, context, token, M: tl.constexpr):
    """:class:`Span` of the step's token ``token`` of a request."""
    start = tl.minimum(tl.maximum(tl.load(step.ring_start + request), 0), context)
    pages = (start + 127) // 128
    if M.SLIDING:
        first = tl.maximum(context + token + 1 - softmax.sliding_window, 0)
        return Span(first, tl.maximum(start, first), first // 128, tl.where(start > first, pages - first // 128, 0))
    else:
        return Span(0, start, 0, pages)


@triton.jit
def page_row(step, request):
    """The request's row of the page table."""
    return step.page_table + request.to(tl.int64) * step.page_table_row


@triton.jit
def ring_row(step, request):
    """The request's row of the ring table."""
    return step.ring_table + request.to(tl.int64) * step.ring_table_row


@triton.jit
def as_pointer(base, offset, element: tl.constexpr):
    """Byte pointer ``base + offset`` as a pointer to ``element``."""
    return (base + offset).to(tl.pointer_type(element), bitcast=True)


class QueryTile(NamedTuple):
    """Query rows of a program: tokens of one request x the query heads of one KV head."""

    token: tl.tensor  # [rows] of the request in the step
    head: tl.tensor  # [rows] query head
    row: tl.tensor  # [rows] int64 row of the step's tensors
    is_row: tl.tensor  # [rows]


@triton.jit
def query_tile(tokens, block, head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """:class:`QueryTile` of the ``block``-th BLOCK_Q tokens of a request."""
    row = tl.arange(0, BLOCK_M)
    token = block * BLOCK_Q + row // GROUP
    query_head = head * GROUP + row % GROUP
    is_row = (row < BLOCK_Q * GROUP) & (token < tokens.length)
    return QueryTile(token, query_head, (tokens.begin + token).to(tl.int64), is_row)


@triton.jit
def row_positions(tile, context):
    """``[rows]`` positions of the tile's tokens in the sequence; -1 where there is none."""
    return tl.where(tile.is_row, context + tile.token, -1)


@triton.jit
def load_query(query, tile, F: tl.constexpr, M: tl.constexpr):
    """The tile's rows ``[rows, DIM_PAD]`` in DOT type, zeros where there is none."""
    channel = tl.arange(0, F.DIM_PAD)
    spot = (tile.row * query.token + tile.head * query.head)[:, None] + channel[None, :]
    return tl.load(query.data + spot, mask=tile.is_row[:, None] & (channel < F.DIM)[None, :], other=0.0).to(M.DOT)


class RingTokens(NamedTuple):
    """Where tokens of the ring are."""

    data: tl.tensor  # pointers to keys; the value is DIM elements behind
    scale: tl.tensor  # INT8: pointers to fp16 key scales; the value's is one behind


@triton.jit
def ring_tokens(cache, row, head, position, is_token, MODEL: tl.constexpr, F: tl.constexpr):
    """:class:`RingTokens` at ``position`` in the ring of table row ``row``.

    ``position`` and ``head`` (int64) broadcast against each other. ``MODEL``: the model's element type.
    """
    slot = position % (F.RING_TOKENS * cache.ring_pages)
    block = tl.load(row + slot // F.RING_TOKENS, mask=is_token, other=0).to(tl.int64)
    token = slot % F.RING_TOKENS
    page = cache.ring + head * cache.ring_head + block * cache.ring_block
    if F.RING_INT8:
        data = as_pointer(page, token * (2 * F.DIM), tl.int8)
        return RingTokens(data, as_pointer(page, F.RING_SCALES + 4 * token, tl.float16))
    else:
        data = as_pointer(page, token * (2 * F.DIM * (MODEL.primitive_bitwidth // 8)), MODEL)
        return RingTokens(data, data)


# ---- device: from logits to weights ----------------------------------------------------
@triton.jit
def soft_capped(s, softmax):
    """``soft_cap * tanh(s / soft_cap)`` of logits times log2(e), which the result is, too."""
    limit = softmax.soft_cap * LOG2E
    return limit - 2 * limit / (1 + tl.exp2(s * (2 / softmax.soft_cap)))


@triton.jit
def add_sink(total, peak, softmax, head):
    """``total``, relative to ``peak``, with the weight of the sink of query head ``head``."""
    return total + tl.exp2(tl.load(softmax.sinks + head) * LOG2E - peak)


# ---- device: attention over ring and new tokens ---------------------------------------
class Sums(NamedTuple):
    """Online softmax of query rows."""

    peak: tl.tensor  # [rows] running maximum
    total: tl.tensor  # [rows] running sum
    acc: tl.tensor  # [rows, DIM_PAD] weighted values


@triton.jit
def attend_tokens(
    q,  # [rows, DIM_PAD] DOT type, not rotated
    key,  # [DIM_PAD, tokens] DOT type
    value,  # [tokens, DIM_PAD] DOT type
    key_factor,  # [tokens] or 1
    value_factor,
    visible,  # [rows, tokens]
    softmax,
    sums,
    M: tl.constexpr,
):
    """Logits, online softmax and weighted values. Invisible tokens must be finite."""
    s = tl.dot(q, key, input_precision="ieee") * (key_factor * (softmax.scale * LOG2E))
    if M.SOFT_CAP:
        s = soft_capped(s, softmax)
    s = tl.where(visible, s, float("-inf"))
    best = tl.maximum(sums.peak, tl.max(s, 1))
    pivot = tl.where(best == float("-inf"), 0.0, best)
    shrink = tl.exp2(sums.peak - pivot)
    p = tl.exp2(s - pivot[:, None])
    total = sums.total * shrink + tl.sum(p, 1)
    acc = tl.dot((p * value_factor).to(M.DOT), value, sums.acc * shrink[:, None], input_precision="ieee")
    return Sums(best, total, acc)


@triton.jit
def attend_tail(
    q,  # [rows, DIM_PAD] DOT type, not rotated
    tile,  # QueryTile
    tokens,  # StepTokens
    span,
    last,  # one past the last position any row sees
    key,
    value,
    cache,
    softmax,
    row,  # of the ring table
    head,  # int64
    sums,
    F: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The ring's tokens from ``span.ring`` on, then the step's own up to ``last - 1``.

    Bytes of an int8 ring are multiplied as they are, exact in every type, and logits and weights by
    the scales. The values' bytes count in units of 1/64, which keeps the weights in fp16's normal range.
    """
    row_position = row_positions(tile, tokens.context)
    channel = tl.arange(0, F.DIM_PAD)
    is_channel = channel < F.DIM
    key_ptr = key.data + head * key.head
    value_ptr = value.data + head * value.head
    element: tl.constexpr = key.data.dtype.element_ty
    for start in range(span.ring, tokens.context, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        is_token = position < tokens.context
        at = ring_tokens(cache, row, head, position, is_token, element, F)
        keys = tl.load(at.data[None, :] + channel[:, None], mask=is_token[None, :] & is_channel[:, None], other=0)
        values = tl.load(
            at.data[:, None] + F.DIM + channel[None, :], mask=is_token[:, None] & is_channel[None, :], other=0
        ).to(M.DOT)
        key_factor = 1.0
        value_factor = 1.0
        if F.RING_INT8:
            key_factor = tl.load(at.scale, mask=is_token, other=0.0).to(tl.float32)[None, :]
            value_factor = (tl.load(at.scale + 1, mask=is_token, other=0.0).to(tl.float32) * 64)[None, :]
            values = values * 0.015625
        visible = is_token[None, :] & (row_position >= 0)[:, None]
        if M.SLIDING:
            visible &= (row_position - softmax.sliding_window)[:, None] < position[None, :]
        sums = attend_tokens(q, keys.to(M.DOT), values.to(M.DOT), key_factor, value_factor, visible, softmax, sums, M)
    for start in range(tl.maximum(tokens.context, span.first), last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        is_token = position < last
        source = (tokens.begin + position - tokens.context).to(tl.int64)
        keys = tl.load(
            key_ptr + source[None, :] * key.token + channel[:, None],
            mask=is_token[None, :] & is_channel[:, None],
            other=0.0,
        )
        values = tl.load(
            value_ptr + source[:, None] * value.token + channel[None, :],
            mask=is_token[:, None] & is_channel[None, :],
            other=0.0,
        )
        visible = is_token[None, :] & (position[None, :] <= row_position[:, None])
        if M.SLIDING:
            visible &= (row_position - softmax.sliding_window)[:, None] < position[None, :]
        sums = attend_tokens(q, keys.to(M.DOT), values.to(M.DOT), 1.0, 1.0, visible, softmax, sums, M)
    return sums
