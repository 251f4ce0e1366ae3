# SPDX-License-Identifier: Apache-2.0
"""``vllm-oscar verify``: the installed kernels against the reference, on random inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import reference
from vllm_oscar.ops import select as ops

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
    heads, query_heads, lengths = 2, 8, [PAGE_TOKENS - 1, 300, 2 * PAGE_TOKENS]
    ring_pages = fmt.ring_pages(2)
    blocks = torch.randperm(32, generator=generator)[:12].view(3, 4).int()
    ring_table = torch.arange(3 * ring_pages).view(3, ring_pages).int()
    shape = (heads, fmt.page_bytes)
    caches = [torch.full((32, *shape), 0xFF, dtype=torch.uint8) for _ in range(2)]
    rings = [torch.full((3 * ring_pages, *shape), 0xFF, dtype=torch.uint8) for _ in range(2)]
    outputs = []
    for counts in (lengths, [1, 1, 1]):
        seq_lens = torch.tensor(lengths if counts is lengths else [n + 1 for n in lengths], dtype=torch.int32)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        context = seq_lens - torch.tensor(counts, dtype=torch.int32)
        first_ring = torch.div(context, PAGE_TOKENS, rounding_mode="floor").int() * PAGE_TOKENS
        total = int(starts[-1])
        query = torch.randn(total, query_heads, head_dim, generator=generator).bfloat16()
        key = torch.randn(total, heads, head_dim, generator=generator).bfloat16()
        value = torch.randn(total, heads, head_dim, generator=generator).bfloat16()
        step = []
        for module, target, pages, ring in (
            (reference, "cpu", caches[0], rings[0]),
            (kernels, device, caches[1], rings[1]),
        ):
            args = [t.to(target) for t in (key, value)]
            pages_d, ring_d = pages.to(target), ring.to(target)
            tables = [t.to(target) for t in (blocks, ring_table, starts, seq_lens)]
            out = torch.full((total, query_heads, head_dim), float("nan"), dtype=torch.bfloat16, device=target)
            module.store_pages(*args, pages_d, ring_d, *tables, ring_pages, fmt)
            module.attention(
                out, query.to(target), *args, pages_d, ring_d, *tables, first_ring.to(target), ring_pages,
                head_dim**-0.5, fmt,
            )  # fmt: skip
            module.write_ring(*args, ring_d, *tables[1:], ring_pages, fmt)
            pages.copy_(pages_d)
            ring.copy_(ring_d)
            step.append(out.float().cpu())
        outputs.append(step)
    error = max(float((b - a).norm() / a.norm()) for a, b in outputs)
    differing = float((caches[0] != caches[1]).float().mean())
    return Result(name, preset, head_dim, differing, error if error == error else float("inf"))


def verify(device: str, seed: int) -> Iterator[Result]:
    """Results for every preset with the kernels that ``device`` would use.

    Raises ``RuntimeError`` if it has none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible to torch; use --device cpu")
    generator = torch.Generator().manual_seed(seed)
    for preset in PRESETS:
        for head_dim in (64, 128):
            kernels = ops.select(device, PageFormat.preset(preset, head_dim))
            name = kernels.__name__.rsplit(".", 1)[1]
            yield _case(kernels, name, preset, head_dim, device, generator)
