# SPDX-License-Identifier: Apache-2.0
"""The three cache operations in plain PyTorch: the definition the native kernels share.

Every backend in this package offers these functions with the same arguments:

* :func:`store_pages`  quantize the blocks that this step completes,
* :func:`attention`    attend over pages, ring and the step's own tokens,
* :func:`write_ring`   keep the step's newest tokens in 16 bit.

They run in this order for a whole batch, because a request may find in the prefix
cache a block that another request of the same step is completing, and because the
ring slots of new tokens still hold tokens that the step reads.

Arguments, for ``T`` tokens of ``R`` requests with ``H`` KV heads and ``Hq`` query heads:

=================  =========================================================================
key, value         ``[T, H, D]`` model dtype, keys after RoPE
pages, ring        uint8 ``[blocks, H, page_bytes]``, last dimension contiguous; the ring
                   has its own block numbers and may be another tensor
block_table        int32 ``[R, M]``: page of tokens ``128*i .. 128*i + 127``
ring_table         int32 ``[R, >= ring_pages]``
query_start_loc    int32 ``[R + 1]``: the step's tokens of request r are rows
                   ``query_start_loc[r] .. query_start_loc[r+1] - 1``; may be none
seq_lens           int32 ``[R]``: tokens including the step's own
ring_start         int32 ``[R]``: positions ``ring_start .. context - 1`` are read from the
                   ring, those before from pages (the last one possibly in part);
                   ``context = seq_len - query_len``
ring_pages         pages of one request's ring; capacity is
                   ``ring_pages * fmt.ring_tokens_per_page(itemsize)``, position p is in
                   slot ``p % capacity``
max_query_len      host-side upper bound on the tokens of a request, for kernels whose launch
                   depends on it; None means ``T``
tables_ready       promise that the operation before this one on the stream writes no table and
                   no length, so that they may be read while it still runs
=================  =========================================================================

Table entries beyond a request's need, page bytes never written, and requests without
tokens in this step may hold anything; nothing of them reaches an output.
"""

from __future__ import annotations

import torch

from vllm_oscar.core import reference
from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.format import PageFormat


def available() -> tuple[bool, str]:
    """Always usable; every kernel module has this function, with the reason when it is not."""
    return True, ""


def _requests(query_start_loc: torch.Tensor, seq_lens: torch.Tensor):
    """(request, first row, one past the last row, context) of requests with tokens."""
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lens):
        begin, end = starts[request], starts[request + 1]
        if end > begin:
            yield request, begin, end, length - (end - begin)


def _read_ring(ring, ring_table, request: int, positions: torch.Tensor, ring_pages: int, fmt: PageFormat, dtype):
    """Keys and values ``[n, H, D]`` of sequence positions held in a request's ring."""
    view = reference.ring_view(ring, fmt, dtype)
    table = ring_table[request].expand(positions.numel(), -1)
    page, offset = reference.ring_slots(table, positions, view.shape[2], ring_pages)
    tokens = view[page, :, offset]  # [n, H, 2, D]
    return tokens[:, :, 0], tokens[:, :, 1]


def store_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    ring: torch.Tensor,
    block_table: torch.Tensor,
    ring_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ring_pages: int,
    fmt: PageFormat,
    max_query_len: int | None = None,
) -> None:
    """Quantize every block that becomes full in this step, from ring and new tokens."""
    keys, values, blocks, first = [], [], [], []
    for request, begin, end, context in _requests(query_start_loc, seq_lens):
        start = context // PAGE_TOKENS * PAGE_TOKENS
        count = (context + end - begin - start) // PAGE_TOKENS
        if not count:
            continue
        held = torch.arange(start, context, device=key.device)
        old_key, old_value = _read_ring(ring, ring_table, request, held, ring_pages, fmt, key.dtype)
        rows = slice(begin, begin + count * PAGE_TOKENS - (context - start))
        keys.append(torch.cat([old_key, key[rows]]).unflatten(0, (count, PAGE_TOKENS)))
        values.append(torch.cat([old_value, value[rows]]).unflatten(0, (count, PAGE_TOKENS)))
        index = torch.arange(count, device=key.device) + start // PAGE_TOKENS
        blocks.append(block_table[request, index])
        first.append(index == 0)
    if blocks:
        pages[torch.cat(blocks).long()] = reference.encode_pages(
            torch.cat(keys), torch.cat(values), fmt, torch.cat(first)
        )


def attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    ring: torch.Tensor,
    block_table: torch.Tensor,
    ring_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ring_start: torch.Tensor,
    ring_pages: int,
    scale: float,
    fmt: PageFormat,
    max_query_len: int | None = None,
    tables_ready: bool = False,
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``."""
    starts = ring_start.tolist()
    for request, begin, end, context in _requests(query_start_loc, seq_lens):
        held = torch.arange(starts[request], context, device=key.device)
        ring_key, ring_value = _read_ring(ring, ring_table, request, held, ring_pages, fmt, key.dtype)
        count = -(-starts[request] // PAGE_TOKENS)
        rows = slice(begin, end)
        out[rows] = reference.attention(
            query[rows],
            key[rows],
            value[rows],
            pages[block_table[request, :count].long()],
            ring_key,
            ring_value,
            context,
            starts[request],
            scale,
            fmt,
        )


def write_ring(
    key: torch.Tensor,
    value: torch.Tensor,
    ring: torch.Tensor,
    ring_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ring_pages: int,
    fmt: PageFormat,
    max_query_len: int | None = None,
) -> None:
    """Write the newest tokens of each request, at most the ring's capacity."""
    view = reference.ring_view(ring, fmt, key.dtype)
    capacity = view.shape[2] * ring_pages
    rows, positions, requests = [], [], []
    for request, begin, end, context in _requests(query_start_loc, seq_lens):
        kept = torch.arange(max(begin, end - capacity), end, device=key.device)
        rows.append(kept)
        positions.append(kept - begin + context)
        requests.append(torch.full_like(kept, request))
    if rows:
        row, position, request = torch.cat(rows), torch.cat(positions), torch.cat(requests)
        page, offset = reference.ring_slots(ring_table[request], position, view.shape[2], ring_pages)
        view[page, :, offset] = torch.stack([key[row], value[row]], 2)
