# SPDX-License-Identifier: Apache-2.0
"""The cache operations in plain PyTorch: the definition that the native kernels share.

See :class:`vllm_oscar.ops.step.Kernels`. Clear before fast: one request after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm_oscar.core import reference
from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.ring import read_tokens, ring_slots, write_tokens
from vllm_oscar.ops.step import Cache, Limits, Step


def available() -> tuple[bool, str]:
    """Always usable."""
    return True, ""


def reserve(fmt, limits: Limits) -> None:
    """Nothing to reserve."""


def _requests(step: Step) -> Iterator[tuple[int, int, int, int]]:
    """(request, first row, one past the last row, context) of requests with tokens."""
    starts, lens = step.query_start_loc.tolist(), step.seq_lens.tolist()
    for request, length in enumerate(lens):
        begin, end = starts[request], starts[request + 1]
        if end > begin:
            yield request, begin, end, length - (end - begin)


def _read_ring(step: Step, cache: Cache, request: int, positions: torch.Tensor, dtype: torch.dtype):
    """Keys and values ``[n, H, D]`` of sequence positions held in a request's ring."""
    table = step.ring_table[request].expand(positions.numel(), -1)
    at = ring_slots(table, positions, cache.fmt.ring_tokens_per_page(dtype.itemsize), cache.ring_pages)
    return read_tokens(cache.ring, cache.fmt, *at, dtype)


def store_pages(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Quantize every block that becomes full in this step, from ring and new tokens."""
    keys, values, blocks, first = [], [], [], []
    for request, begin, end, context in _requests(step):
        start = context // PAGE_TOKENS * PAGE_TOKENS
        count = (context + end - begin - start) // PAGE_TOKENS
        if not count:
            continue
        held = torch.arange(start, context, device=key.device)
        old_key, old_value = _read_ring(step, cache, request, held, key.dtype)
        rows = slice(begin, begin + count * PAGE_TOKENS - (context - start))
        keys.append(torch.cat([old_key, key[rows]]).unflatten(0, (count, PAGE_TOKENS)))
        values.append(torch.cat([old_value, value[rows]]).unflatten(0, (count, PAGE_TOKENS)))
        index = torch.arange(count, device=key.device) + start // PAGE_TOKENS
        blocks.append(step.page_table[request, index])
        first.append(index == 0)
    if blocks:
        cache.pages[torch.cat(blocks).long()] = reference.encode_pages(
            torch.cat(keys), torch.cat(values), cache.fmt, torch.cat(first)
        )


def attention(
    step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``."""
    starts = step.ring_start.tolist()
    for request, begin, end, context in _requests(step):
        first = cache.softmax.first_visible(context)
        start = min(max(starts[request], first), context)
        held = torch.arange(start, context, device=key.device)
        ring_key, ring_value = _read_ring(step, cache, request, held, key.dtype)
        # Blocks before the first visible token may be freed, and one that ends behind `start` open.
        numbers = slice(first // PAGE_TOKENS, -(-start // PAGE_TOKENS) if start > first else 0)
        rows = slice(begin, end)
        out[rows] = reference.attention(
            query[rows],
            key[rows],
            value[rows],
            cache.pages[step.page_table[request, numbers].long()],
            ring_key,
            ring_value,
            context,
            start,
            cache.softmax,
            cache.fmt,
        )


def write_ring(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Keep the newest tokens of each request, at most the ring's capacity."""
    tokens_per_page = cache.fmt.ring_tokens_per_page(key.dtype.itemsize)
    capacity = tokens_per_page * cache.ring_pages
    rows, positions, requests = [], [], []
    for request, begin, end, context in _requests(step):
        kept = torch.arange(max(begin, end - capacity), end, device=key.device)
        rows.append(kept)
        positions.append(kept - begin + context)
        requests.append(torch.full_like(kept, request))
    if rows:
        row, position, request = torch.cat(rows), torch.cat(positions), torch.cat(requests)
        at = ring_slots(step.ring_table[request], position, tokens_per_page, cache.ring_pages)
        write_tokens(cache.ring, cache.fmt, *at, key[row], value[row])
