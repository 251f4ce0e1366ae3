# SPDX-License-Identifier: Apache-2.0
"""``vllm-oscar verify``: the installed kernels against the reference, on random inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.ops import reference, select
from vllm_oscar.ops.step import Cache, Step

STORE_BOUND = 1e-3  # share of bytes that may differ: rounding ties
ATTENTION_BOUND = 1e-2  # bf16 inputs


@dataclass(frozen=True)
class Result:
    """One preset and head size. ``store_error``: share of differing page bytes;
    ``attention_error``: norm of the difference over the norm of the reference."""

    kernels: str
    preset: str
    head_dim: int
    store_error: float
    attention_error: float

    @property
    def passed(self) -> bool:
        return self.store_error <= STORE_BOUND and self.attention_error <= ATTENTION_BOUND


def _case(kernels, name: str, preset: str, head_dim: int, device: str, generator: torch.Generator) -> Result:
    """A prefill of three requests, then a decode step, through both implementations."""
    fmt = PageFormat.preset(preset, head_dim)
    heads, query_heads, lengths = 2, 8, torch.tensor([PAGE_TOKENS - 1, 300, 2 * PAGE_TOKENS])
    ring_pages = fmt.ring_pages(2)
    page_table = torch.randperm(32, generator=generator)[:12].view(3, 4).int()
    ring_table = torch.arange(3 * ring_pages).view(3, ring_pages).int()
    shape = (heads, fmt.page_bytes)
    sides = []
    for module, target in ((reference, "cpu"), (kernels, device)):
        pages = torch.full((32, *shape), 0xFF, dtype=torch.uint8, device=target)
        ring = torch.full((3 * ring_pages, *shape), 0xFF, dtype=torch.uint8, device=target)
        sides.append((module, target, Cache(pages, ring, ring_pages, fmt, Softmax(head_dim**-0.5))))
    errors = []
    for counts in (lengths, torch.ones(3, dtype=torch.long)):
        seq_lens = lengths if counts is lengths else lengths + 1
        context = seq_lens - counts
        tables = [
            torch.cat([torch.zeros(1), counts.cumsum(0)]).int(),
            seq_lens.int(),
            page_table,
            ring_table,
            (context // PAGE_TOKENS * PAGE_TOKENS).int(),
        ]
        total = int(counts.sum())
        query = torch.randn(total, query_heads, head_dim, generator=generator).bfloat16()
        key, value = torch.randn(2, total, heads, head_dim, generator=generator).bfloat16()
        outputs = []
        for module, target, cache in sides:
            step = Step(*(table.to(target) for table in tables), max_query_len=int(counts.max()))
            new = [x.to(target) for x in (query, key, value)]
            out = torch.full_like(new[0], float("nan"))
            module.store_pages(step, cache, *new[1:])
            module.attention(step, cache, *new, out)
            module.write_ring(step, cache, *new[1:])
            outputs.append(out.float().cpu())
        errors.append(float((outputs[1] - outputs[0]).norm() / outputs[0].norm()))
    error = max(errors) if all(e == e for e in errors) else float("inf")
    differing = float((sides[0][2].pages != sides[1][2].pages.cpu()).float().mean())
    return Result(name, preset, head_dim, differing, error)


def verify(device: str, seed: int) -> Iterator[Result]:
    """Results for every preset with the kernels that ``device`` would use.

    Raises ``RuntimeError`` if it has none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible to torch; use --device cpu")
    generator = torch.Generator().manual_seed(seed)
    for preset in PRESETS:
        for head_dim in (64, 128):
            kernels = select.select(device, PageFormat.preset(preset, head_dim))
            name = kernels.__name__.rsplit(".", 1)[1]
            yield _case(kernels, name, preset, head_dim, device, generator)
