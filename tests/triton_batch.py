# SPDX-License-Identifier: Apache-2.0
"""Cache states for the Triton kernels' tests."""

import os

import torch

from vllm_oscar.core import reference
from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.ring import ring_slots, write_tokens
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.ops.step import Cache, Step

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


class Batch:
    """Requests with history in shuffled pages and rings; all memory that is not theirs is poison."""

    def __init__(
        self, fmt, requests, heads=2, group=2, dtype=torch.float32, seed=0, pad_tokens=0, spread=1.0,
        sliding_window=None, soft_cap=None, sinks=False,
    ):  # fmt: skip
        """``requests``: (context, query length, tokens before the context that the ring provides).

        With a sliding window, tokens around its start have large keys, so that one off by one shows.
        """
        random = torch.Generator().manual_seed(seed)
        dim = fmt.head_dim
        sinks = 2 * torch.randn(heads * group, generator=random).to(DEVICE) if sinks else None
        self.softmax = Softmax(dim**-0.5, sliding_window, soft_cap, sinks)
        self.fmt, self.dtype = fmt, dtype
        self.ring_pages = fmt.ring_pages(dtype.itemsize, drafts=16)
        blocks = sum(-(-(c + q) // PAGE_TOKENS) for c, q, _ in requests) + 2
        most = max(-(-(c + q) // PAGE_TOKENS) for c, q, _ in requests) + 1
        rings = len(requests) * self.ring_pages + 1
        self.pages = torch.full((blocks, heads, fmt.page_bytes), 255, dtype=torch.uint8)
        self.ring = torch.full((rings, heads, fmt.page_bytes), 255, dtype=torch.uint8)
        self.page_table = torch.full((len(requests), most), 2**31 - 1, dtype=torch.int32)
        self.ring_table = torch.empty(len(requests), self.ring_pages + 1, dtype=torch.int32)
        free = torch.randperm(blocks, generator=random).tolist()
        free_ring = torch.randperm(rings, generator=random).tolist()
        per_page = fmt.ring_tokens_per_page(dtype.itemsize)
        capacity = per_page * self.ring_pages
        bias = torch.randn(2, heads, dim, generator=random)
        tokens = sum(q for _, q, _ in requests) + pad_tokens
        self.key, self.value = torch.full((2, tokens, heads, dim), float("nan"), dtype=dtype)
        self.query = (spread * torch.randn(tokens, heads * group, dim, generator=random)).to(dtype)
        starts, lens, ring_starts = [0], [], []
        for r, (context, length, in_ring) in enumerate(requests):
            key = (torch.randn(context + length, heads, dim, generator=random) + bias[0]).to(dtype)
            value = (torch.randn(context + length, heads, dim, generator=random) + 0.3 * bias[1]).to(dtype)
            full, first = context // PAGE_TOKENS, self.softmax.first_visible(context)
            hidden = first // PAGE_TOKENS
            if sliding_window:
                key[max(0, first - 1) : first + length] *= 2
            if length:
                needed = -(-(context + length) // PAGE_TOKENS)
                self.page_table[r, hidden:needed] = torch.tensor([free.pop() for _ in range(needed - hidden)])
                self.ring_table[r] = torch.tensor([free_ring.pop() for _ in range(self.ring_pages)] + [2**31 - 1])
                if full > hidden:
                    rows, numbers = slice(hidden * PAGE_TOKENS, full * PAGE_TOKENS), torch.arange(hidden, full)
                    paged = (x[rows].unflatten(0, (-1, PAGE_TOKENS)) for x in (key, value))
                    self.pages[self.page_table[r, hidden:full].long()] = reference.encode_pages(
                        *paged, fmt, numbers == 0
                    )
                in_ring = max(min(in_ring, context, capacity), context - full * PAGE_TOKENS)
                position = torch.arange(max(first, context - in_ring), context)
                at = ring_slots(self.ring_table[r].expand(len(position), -1), position, per_page, self.ring_pages)
                write_tokens(self.ring, fmt, *at, key[position], value[position])
                self.key[starts[-1] : starts[-1] + length] = key[context:]
                self.value[starts[-1] : starts[-1] + length] = value[context:]
                lens.append(context + length)
                ring_starts.append(context - in_ring)
            else:  # a request without tokens in this step: anything
                self.ring_table[r] = 2**31 - 1
                lens.append(977)
                ring_starts.append(333)
            starts.append(starts[-1] + length)
        self.query_start_loc = torch.tensor(starts, dtype=torch.int32)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32)
        self.ring_start = torch.tensor(ring_starts, dtype=torch.int32)
        self.max_query_len = max(length for _, length, _ in requests)
        for name, tensor in vars(self).items():
            if isinstance(tensor, torch.Tensor):
                setattr(self, name, tensor.to(DEVICE))

    @property
    def step(self):
        return Step(
            self.query_start_loc,
            self.seq_lens,
            self.page_table,
            self.ring_table,
            self.ring_start,
            self.max_query_len,
        )

    def cache(self, pages=None, ring=None):
        pages, ring = self.pages if pages is None else pages, self.ring if ring is None else ring
        return Cache(pages, ring, self.ring_pages, self.fmt, self.softmax)

    def attention(self, module):
        out = torch.full_like(self.query, 7.0)
        module.attention(self.step, self.cache(), self.query, self.key, self.value, out)
        return out

    def store(self, module):
        pages = self.pages.clone()
        module.store_pages(self.step, self.cache(pages=pages), self.key, self.value)
        return pages

    def write_ring(self, module):
        ring = self.ring.clone()
        module.write_ring(self.step, self.cache(ring=ring), self.key, self.value)
        return ring
