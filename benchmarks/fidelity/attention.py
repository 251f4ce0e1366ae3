# SPDX-License-Identifier: Apache-2.0
"""Attention with decode-time numerics inside a transformers model.

At decode time a query at position ``i`` reads from the cache every full 128-token block
before its own block, and only the rest, and the window, as the ring has it. A teacher-forced forward pass through
this attention gives each query just that view, so one pass over a document measures what
decoding it token by token would give. Every layer also feeds on the quantized layers
below it, as in decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.softmax import Softmax

from .methods import Method

NAME = "fidelity"


@dataclass
class _State:
    """What the patched attention does now; one per process, set by the context managers."""

    method: Method | None = None
    only: tuple[int, int] | None = None  # (layer, KV head) that alone has the method; None: all
    probe: Callable | None = None  # called as probe(layer, query, key, value, softmax)
    blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # per layer, dequantized


_state = _State()


@contextmanager
def quantized(method: Method | None, only: tuple[int, int] | None = None):
    """Inside, models attend over caches of ``method``, ``only`` those of one layer and KV head; None is exact."""
    global _state
    before, _state = _state, _State(method=method, only=only)
    try:
        yield
    finally:
        _state = before


@contextmanager
def probed(probe: Callable):
    """Inside, models attend exactly and ``probe`` sees every layer's query, key and value."""
    global _state
    before, _state = _state, _State(probe=probe)
    try:
        yield
    finally:
        _state = before


def quantize_history(method: Method, key: torch.Tensor, value: torch.Tensor, begin: int = 0):
    """What the cache gives back for the full blocks of ``[B, H, T, D]``, from block ``begin`` on.

    Returns float tensors ``[B, H, 128 * blocks, D]``.
    """
    batch, heads, tokens, dim = key.shape
    rows = slice(begin * PAGE_TOKENS, tokens // PAGE_TOKENS * PAGE_TOKENS)
    count = tokens // PAGE_TOKENS - begin
    if count <= 0:
        return key[:, :, :0], value[:, :, :0]

    def blocks(x):  # [B * count, 128, H, D]
        return x[:, :, rows].transpose(1, 2).reshape(batch * count, PAGE_TOKENS, heads, dim)

    first = (torch.arange(count, device=key.device) + begin == 0).repeat(batch)
    out = method.quantize(blocks(recent(method, key)), blocks(recent(method, value)), first)
    return tuple(
        x.to(key.dtype).reshape(batch, count * PAGE_TOKENS, heads, dim).transpose(1, 2).contiguous() for x in out
    )


def recent(method: Method | None, x: torch.Tensor) -> torch.Tensor:
    """What the ring gives back for keys or values ``x``."""
    return x if method is None or method.recent is None else method.recent(x).to(x.dtype)


def attention_rows(
    query, own_key, own_value, key, value, old_key, old_value, method: Method | None, softmax: Softmax, start: int
):
    """Attention of query rows that lie in one block, with the weights.

    Args:
        query: ``[B, Hq, Q, D]`` at positions ``start .. start + Q - 1``.
        own_key, own_value: exact, ``[B, H, T, D]``: what a token reads of itself.
        key, value: the same from the ring; old_key, old_value: from pages, full blocks.

    Returns:
        output ``[B, Hq, Q, D]``, weights ``[B, Hq, Q, start + Q]``; the weight of a sink comes last, if there is one.
    """
    batch, q_heads, rows, dim = query.shape
    heads, end = key.shape[1], start + rows
    block = start // PAGE_TOKENS * PAGE_TOKENS  # tokens in the blocks before the queries' own
    query = query.reshape(batch, heads, -1, dim)  # query heads of one KV head side by side
    position = torch.arange(start, end, device=query.device)[:, None]
    column = torch.arange(end, device=query.device)[None]

    def by_row(mask):  # [Q, n] to the row order of query
        return mask.repeat(q_heads // heads, 1)

    mixed = 0  # columns mixed..block are quantized for some rows and exact for others
    if method is None:
        scores = query @ key[:, :, :end].transpose(2, 3)
    else:
        reach = max(method.key_window, method.value_window)
        mixed = max(0, block - -(-reach // PAGE_TOKENS) * PAGE_TOKENS)
        scores = query @ torch.cat([old_key[:, :, :block], key[:, :, block:end]], 2).transpose(2, 3)
        if method.key_window and mixed < block:
            exact = query @ key[:, :, mixed:block].transpose(2, 3)
            near = by_row(position - column[:, mixed:block] <= method.key_window)
            scores[..., mixed:block] = torch.where(near, exact, scores[..., mixed:block])
    if own_key is not key:
        exact = (query.unflatten(2, (-1, rows)) * own_key[:, :, None, start:end]).sum(-1).flatten(2)
        scores = torch.where(by_row(column == position), exact[..., None], scores)
    scores, distance = scores * softmax.scale, position - column
    if softmax.soft_cap is not None:
        scores = softmax.soft_cap * (scores / softmax.soft_cap).tanh()
    visible = (distance >= 0) & (distance < (softmax.sliding_window or end + 1))
    scores = scores.masked_fill(~by_row(visible), float("-inf"))
    if softmax.sinks is not None:
        sinks = softmax.sinks.to(scores).view(1, heads, -1, 1).repeat_interleave(rows, 2)
        scores = torch.cat([scores, sinks.expand(batch, -1, -1, -1)], 3)
    all_weights = scores.float().softmax(-1).to(value.dtype)
    weights = all_weights[..., :end]
    if method is None:
        out = weights @ value[:, :, :end]
    else:
        out = weights @ torch.cat([old_value[:, :, :block], value[:, :, block:end]], 2)
        if method.value_window and mixed < block:
            near = by_row(position - column[:, mixed:block] <= method.value_window)
            change = value[:, :, mixed:block] - old_value[:, :, mixed:block]
            out = out + (weights[..., mixed:block] * near) @ change
    if own_value is not value:
        own = weights.unflatten(2, (-1, rows))[..., start:end].diagonal(dim1=-2, dim2=-1)  # [B, H, group, Q]
        change = (own_value - value)[:, :, None, start:end]
        out = out + (own[..., None] * change).flatten(2, 3)
    return out.reshape(batch, q_heads, rows, dim), all_weights.reshape(batch, q_heads, rows, -1)


def row_blocks(start: int, end: int):
    """Ranges of query positions that do not cross a block boundary."""
    while start < end:
        stop = min(end, (start // PAGE_TOKENS + 1) * PAGE_TOKENS)
        yield start, stop
        start = stop


def attention(query, key, value, old, method: Method | None, softmax: Softmax) -> torch.Tensor:
    """Causal attention of the last ``Q`` positions: ``[B, Hq, Q, D]``."""
    offset = key.shape[2] - query.shape[2]
    ring = recent(method, key), recent(method, value)
    return torch.cat(
        [
            attention_rows(query[:, :, a - offset : b - offset], key, value, *ring, *old, method, softmax, a)[0]
            for a, b in row_blocks(offset, key.shape[2])
        ],
        2,
    )


def in_layer(method: Method | None, softmax: Softmax) -> Method | None:
    """``method``, if it is that of a layer with this softmax; None: the layer is exact."""
    kind = "full" if softmax.sliding_window is None else "sliding"
    return method if method is not None and method.layers in ("all", kind) else None


def _forward(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, s_aux=None,
    **kwargs,
):  # fmt: skip
    """The transformers attention interface. Batches without padding, causal."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softmax = Softmax(scaling, sliding_window, softcap, s_aux)
    if _state.probe is not None:
        _state.probe(module.layer_idx, query, key, value, softmax)
    method, old, only = in_layer(_state.method, softmax), (None, None), _state.only
    if only is not None and only[0] != module.layer_idx:
        method = None
    if method is not None:
        # Blocks never change once full, so a sequence that grows quantizes each only once.
        old = _state.blocks.get(module.layer_idx)
        if query.shape[2] == key.shape[2] or old is None:
            old = (key[:, :, :0], value[:, :, :0])
        new = quantize_history(method, key, value, old[0].shape[2] // PAGE_TOKENS)
        old = tuple(torch.cat(pair, 2) if pair[1].shape[2] else pair[0] for pair in zip(old, new, strict=True))
        _state.blocks[module.layer_idx] = old
    out = attention(query, key, value, old, method, softmax)
    if method is not None and only is not None:
        group = query.shape[1] // key.shape[1]
        heads = slice(only[1] * group, (only[1] + 1) * group)
        exact = attention(query, key, value, (None, None), None, softmax)
        exact[:, heads] = out[:, heads]
        out = exact
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the attention known to transformers as ``attn_implementation="fidelity"``."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
