# SPDX-License-Identifier: Apache-2.0
"""``vllm-oscar verify``: the installed kernels against the reference, on random inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.ops import reference, select
from vllm_oscar.ops.step import Cache, Step

STORE_BOUND = 1e-3  # share of bytes that may differ: rounding ties
ATTENTION_BOUND = 1e-2  # bf16 inputs
SLIDING_WINDOW = 140  # tokens: begins in the middle of a page, and behind the first of some request


@dataclass(frozen=True)
class Result:
    """One preset and head size. ``store_error``: share of differing page bytes; ``attention_error``:
    norm of the difference over the norm of the reference; ``window_error``: the same of a sliding
    window with sinks."""

    kernels: str
    preset: str
    head_dim: int
    store_error: float
    attention_error: float
    window_error: float

    @property
    def passed(self) -> bool:
        return self.store_error <= STORE_BOUND and max(self.attention_error, self.window_error) <= ATTENTION_BOUND


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((out.float().cpu() - expected.float()).norm() / expected.float().norm())
    return error if error == error else float("inf")


def _operations(module, steps, caches, query, key, value) -> list[torch.Tensor]:
    """Output of each cache's attention, in a step with its own page table; pages and ring are the same for all."""
    outputs = []
    module.store_pages(steps[0], caches[0], key, value)
    for step, cache in zip(steps, caches):
        outputs.append(torch.full_like(query, float("nan")))
        module.attention(step, cache, query, key, value, outputs[-1])
    module.write_ring(steps[0], caches[0], key, value)
    return outputs


def _case(kernels, name: str, preset: str, head_dim: int, device: str, generator: torch.Generator) -> Result:
    """A prefill of three requests, then a decode step, through both implementations."""
    fmt = PageFormat.preset(preset, head_dim)
    heads, query_heads, lengths = 2, 8, torch.tensor([PAGE_TOKENS - 1, 300, 2 * PAGE_TOKENS])
    ring_pages = fmt.ring_pages(2)
    blocks = torch.randperm(32, generator=generator).int()
    page_table, never_written = blocks[:12].view(3, 4), blocks[12]
    ring_table = torch.arange(3 * ring_pages).view(3, ring_pages).int()
    shape = (heads, fmt.page_bytes)
    sinks = torch.linspace(-2.0, 6.0, query_heads)
    sides = []
    for module, target in ((reference, "cpu"), (kernels, device)):
        pages = torch.full((32, *shape), 0xFF, dtype=torch.uint8, device=target)
        ring = torch.full((3 * ring_pages, *shape), 0xFF, dtype=torch.uint8, device=target)
        plain = Softmax(head_dim**-0.5)
        windowed = Softmax(head_dim**-0.5, sliding_window=SLIDING_WINDOW, sinks=sinks.to(target))
        caches = [Cache(pages, ring, ring_pages, fmt, softmax) for softmax in (plain, windowed)]
        sides.append((module, target, caches))
    errors = [0.0, 0.0]  # of plain attention, of a sliding window
    for counts in (lengths, torch.ones(3, dtype=torch.long)):
        seq_lens = lengths if counts is lengths else lengths + 1
        context = seq_lens - counts
        tables = {
            "query_start_loc": torch.cat([torch.zeros(1), counts.cumsum(0)]).int(),
            "seq_lens": seq_lens.int(),
            "page_table": page_table,
            "ring_table": ring_table,
            "ring_start": (context // PAGE_TOKENS * PAGE_TOKENS).int(),
        }
        # Before the window there is NaN.
        kept = page_table.clone()
        for row, tokens in enumerate(context.tolist()):
            kept[row, : sides[0][2][1].softmax.first_visible(tokens) // PAGE_TOKENS] = never_written
        total = int(counts.sum())
        query = torch.randn(total, query_heads, head_dim, generator=generator).bfloat16()
        key, value = torch.randn(2, total, heads, head_dim, generator=generator).bfloat16()
        outputs = []
        for module, target, caches in sides:
            on_target = {name: table.to(target) for name, table in tables.items()}
            step = Step(**on_target, max_query_len=int(counts.max()))
            steps = step, replace(step, page_table=kept.to(target))
            outputs.append(_operations(module, steps, caches, *(x.to(target) for x in (query, key, value))))
        errors = [max(error, _error(out, want)) for error, want, out in zip(errors, *outputs)]
    differing = float((sides[0][2][0].pages != sides[1][2][0].pages.cpu()).float().mean())
    return Result(name, preset, head_dim, differing, *errors)


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
