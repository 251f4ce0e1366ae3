# SPDX-License-Identifier: Apache-2.0
"""Random cache states for checking and timing the kernels, with everything unused poisoned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_oscar.core import reference
from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.ring import ring_slots, write_tokens
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.ops import reference as reference_ops
from vllm_oscar.ops.step import Cache, Step

POISON = 0xFF  # NaN as fp16, bf16 and e4m3
NO_BLOCK = 2**31 - 1


@dataclass
class Case:
    """The arguments of one step; see :mod:`vllm_oscar.ops.step`."""

    step: Step
    cache: Cache
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def fmt(self) -> PageFormat:
        return self.cache.fmt

    def attention(self, kernels, **options) -> torch.Tensor:
        """Run the attention of ``kernels`` into a poisoned output."""
        out = torch.full_like(self.query, float("nan"))
        kernels.attention(self.step, self.cache, self.query, self.key, self.value, out, **options)
        return out

    def exact_attention(self) -> torch.Tensor:
        """The reference with float64 products and softmax."""
        query = self.query.double()
        out = torch.full_like(query, float("nan"))
        reference_ops.attention(self.step, self.cache, query, self.key, self.value, out)
        return out

    def store(self, kernels) -> torch.Tensor:
        """Pages after ``kernels.store_pages``."""
        cache = replace(self.cache, pages=self.cache.pages.clone())
        kernels.store_pages(self.step, cache, self.key, self.value)
        return cache.pages

    def write_ring(self, kernels) -> torch.Tensor:
        """Ring after ``kernels.write_ring``."""
        cache = replace(self.cache, ring=self.cache.ring.clone())
        kernels.write_ring(self.step, cache, self.key, self.value)
        return cache.ring


def random_tokens(tokens: int, heads: int, fmt: PageFormat, dtype, generator, device):
    """Keys with outlier channels and varying norms, values with some scale; ``[tokens, H, D]``."""
    shape = (tokens, heads, fmt.head_dim)
    key = torch.randn(shape, generator=generator, device=device)
    key[..., :: fmt.head_dim // 4] *= 4
    key *= torch.rand((tokens, heads, 1), generator=generator, device=device) + 0.5
    value = torch.randn(shape, generator=generator, device=device) * 0.5
    return key.to(dtype), value.to(dtype)


def random_ring(blocks: int, heads: int, fmt: PageFormat, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Ring blocks whose every slot holds a random token: uint8 ``[blocks, H, page_bytes]``."""
    ring = torch.empty(blocks, heads, fmt.page_bytes, dtype=torch.uint8, device=device)
    tokens = fmt.ring_tokens_per_page(dtype.itemsize)
    for part in ring.split(256):
        block = torch.arange(len(part), device=device).repeat_interleave(tokens)
        key, value = torch.randn(2, len(block), heads, fmt.head_dim, device=device).to(dtype)
        write_tokens(part, fmt, block, torch.arange(tokens, device=device).repeat(len(part)), key, value)
    return ring


def make_case(
    fmt: PageFormat,
    requests: list[tuple[int, int]],
    *,
    kv_heads: int = 2,
    group: int = 4,
    dtype: torch.dtype = torch.float16,
    window: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    lookahead: int = 16,
    seed: int = 0,
    device: str = "cuda",
) -> Case:
    """A step of ``requests``, each ``(context, query_len)``.

    ``window``: every second request reads its newest tokens from the ring although
    their pages exist (recent window); the others only what no page holds yet. Pages, table
    entries and ring tokens before ``sliding_window`` are poison, too, and tokens around its start
    have large keys, so that a window off by one shows. ``sinks``: random ones.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sink = torch.randn(kv_heads * group, generator=generator, device=device) * 2 if sinks else None
    softmax = Softmax(fmt.head_dim**-0.5, sliding_window, soft_cap, sink)
    ring_pages = fmt.ring_pages(dtype.itemsize, lookahead)
    blocks_of = [-(-(context + length) // PAGE_TOKENS) for context, length in requests]
    blocks, count = sum(blocks_of) + 3, len(requests)
    order = torch.randperm(blocks, generator=generator, device=device).int()
    ring_order = torch.randperm(count * ring_pages + 2, generator=generator, device=device).int()
    pages = torch.full((blocks, kv_heads, fmt.page_bytes), POISON, dtype=torch.uint8, device=device)
    ring = torch.full((len(ring_order), kv_heads, fmt.page_bytes), POISON, dtype=torch.uint8, device=device)
    page_table = torch.full((count, max(blocks_of) + 2), NO_BLOCK, dtype=torch.int32, device=device)
    ring_table = torch.full((count, ring_pages + 1), NO_BLOCK, dtype=torch.int32, device=device)
    tokens_per_page = fmt.ring_tokens_per_page(dtype.itemsize)
    capacity = tokens_per_page * ring_pages

    ring_start, used = [], 0
    for r, (context, length) in enumerate(requests):
        page_table[r, : blocks_of[r]] = order[used : used + blocks_of[r]]
        used += blocks_of[r]
        ring_table[r, :ring_pages] = ring_order[r * ring_pages : (r + 1) * ring_pages]
        key, value = random_tokens(context, kv_heads, fmt, dtype, generator, device)
        full, first = context // PAGE_TOKENS, softmax.first_visible(context)
        hidden = first // PAGE_TOKENS
        if sliding_window:
            key[max(0, first - 1) : first + length] *= 2
        page_table[r, :hidden] = NO_BLOCK
        if full > hidden:
            numbers = torch.arange(hidden, full, device=device)
            paged = (x[hidden * PAGE_TOKENS : full * PAGE_TOKENS].unflatten(0, (-1, PAGE_TOKENS)) for x in (key, value))
            pages[page_table[r, hidden:full].long()] = reference.encode_pages(*paged, fmt, numbers == 0)
        positions = torch.arange(max(first, context - capacity), context, device=device)
        at = ring_slots(ring_table[r].expand(len(positions), -1), positions, tokens_per_page, ring_pages)
        write_tokens(ring, fmt, *at, key[positions], value[positions])
        newest = max(0, context - (fmt.config.window or PAGE_TOKENS))
        ring_start.append(newest if window and r % 2 == 0 else full * PAGE_TOKENS)

    lengths = torch.tensor([length for _, length in requests])
    tokens = int(lengths.sum())
    key, value = random_tokens(tokens, kv_heads, fmt, dtype, generator, device)
    query = torch.randn((tokens, kv_heads * group, fmt.head_dim), generator=generator, device=device) * 1.5

    def int32(values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    step = Step(
        query_start_loc=int32([0, *lengths.cumsum(0).tolist()]),
        seq_lens=int32([context + length for context, length in requests]),
        page_table=page_table,
        ring_table=ring_table,
        ring_start=int32(ring_start),
        max_query_len=int(lengths.max()),
    )
    return Case(step, Cache(pages, ring, ring_pages, fmt, softmax), query.to(dtype), key, value)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest ``|out - expected| / |expected|`` of any output row; NaN and inf stay visible."""
    difference = (out.double() - expected.double()).norm(dim=-1)
    return (difference / expected.double().norm(dim=-1).clamp_min(1e-6)).max().item()
