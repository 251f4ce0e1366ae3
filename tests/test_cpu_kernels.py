# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels against the reference, on fresh random steps of every shape.

``OSCAR_TEST_SEED`` repeats a run; the seed is part of every failure message. The full
matrix is behind ``-m slow``.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from vllm_oscar import reference
from vllm_oscar.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope
from vllm_oscar.format import PageFormat
from vllm_oscar.ops import cpu
from vllm_oscar.ops import reference as ops

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

SEED = int(os.environ.get("OSCAR_TEST_SEED", random.SystemRandom().randrange(1 << 31)))
ISAS = cpu.isas() if cpu.available()[0] else ()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative to the largest output element: 16-bit queries and probabilities, then the model's rounding.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-3, torch.float16: 8e-4}


@pytest.fixture(autouse=True)
def seeded(request):
    """A seed of its own for every test; printed when it fails."""
    seed = hash((SEED, request.node.name.split("[")[0])) & 0x7FFFFFFF
    torch.manual_seed(seed)
    random.seed(seed)
    print(f"OSCAR_TEST_SEED={SEED}")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("OSCAR_CPU_ISA", request.param)
    return request.param


class Step:
    """One step over a poisoned cache: history stored by the reference, new tokens random.

    ``requests``: (context, query_len, ring_start) each; ring_start None picks what the
    metadata builder would for a long-running request.
    """

    def __init__(self, requests, fmt: PageFormat, heads: int, group: int, dtype, *, lookahead: int = 0):
        self.fmt, self.dtype, self.heads, self.requests = fmt, dtype, heads, requests
        dim, self.scale = fmt.head_dim, fmt.head_dim**-0.5
        self.ring_pages = fmt.ring_pages(dtype.itemsize, lookahead)
        capacity = self.ring_pages * fmt.ring_tokens_per_page(dtype.itemsize)
        lens = [context + new for context, new, _ in requests]
        width = max(-(-n // PAGE_TOKENS) for n in lens) + 2
        blocks = sum(-(-n // PAGE_TOKENS) for n in lens) + 3
        self.pages = torch.full((blocks, heads, fmt.page_bytes), 0xFF, dtype=torch.uint8)
        # Heads of the ring are strided, as a slice of a larger pool would be.
        rows = len(requests) * self.ring_pages + 2
        self.ring = torch.full((rows, 2 * heads, fmt.page_bytes), 0xFF, dtype=torch.uint8)[:, ::2]
        free, ring_free = torch.randperm(blocks).tolist(), torch.randperm(rows).tolist()
        self.block_table = torch.full((len(requests), width), 2**30, dtype=torch.int32)
        self.ring_table = torch.full((len(requests), self.ring_pages + 1), -(2**30), dtype=torch.int32)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32)
        self.query_start_loc = torch.tensor([0, *[new for _, new, _ in requests]]).cumsum(0).int()
        tokens = sum(new for _, new, _ in requests)
        # Query, key and value are slices of one projection, as in vLLM.
        qkv = torch.randn(tokens + 1, heads * (group + 2), dim).to(dtype)
        self.query, self.key, self.value = qkv.split([heads * group, heads, heads], dim=1)
        qkv[-1] = float("nan")  # padding of the batch
        spread = torch.linspace(0.2, 3.0, dim)
        self.key.mul_(spread.to(dtype))
        starts, self.history = [], []
        view = reference.ring_view(self.ring, fmt, dtype)
        for row, (context, new, start) in enumerate(requests):
            need = -(-(context + new) // PAGE_TOKENS)
            self.block_table[row, :need] = torch.tensor([free.pop() for _ in range(need)])
            self.ring_table[row, : self.ring_pages] = torch.tensor([ring_free.pop() for _ in range(self.ring_pages)])
            old_key = (torch.randn(context, heads, dim) * spread).to(dtype)
            old_value = (torch.randn(context, heads, dim) + 0.3).to(dtype)
            full = context // PAGE_TOKENS
            if full:
                index = torch.arange(full)
                self.pages[self.block_table[row, :full].long()] = reference.encode_pages(
                    old_key[: full * PAGE_TOKENS].unflatten(0, (full, PAGE_TOKENS)),
                    old_value[: full * PAGE_TOKENS].unflatten(0, (full, PAGE_TOKENS)),
                    fmt,
                    index == 0,
                )
            lowest = max(0, context - capacity)
            if start is None:
                start = max(min(full * PAGE_TOKENS, max(context - PAGE_TOKENS, 0)), lowest)
            starts.append(start)
            held = torch.arange(min(start, full * PAGE_TOKENS), context)
            page, offset = reference.ring_slots(
                self.ring_table[row].expand(len(held), -1), held, view.shape[2], self.ring_pages
            )
            view[page, :, offset] = torch.stack([old_key[held], old_value[held]], 2)
        self.ring_start = torch.tensor(starts, dtype=torch.int32)

    def attend(self, backend) -> torch.Tensor:
        out = torch.full_like(self.query[: self.query_start_loc[-1]], 7.0)
        rows = slice(int(self.query_start_loc[-1]))
        backend.attention(
            out,
            self.query[rows],
            self.key[rows],
            self.value[rows],
            self.pages,
            self.ring,
            self.block_table,
            self.ring_table,
            self.query_start_loc,
            self.seq_lens,
            self.ring_start,
            self.ring_pages,
            self.scale,
            self.fmt,
        )
        return out

    def store(self, backend) -> torch.Tensor:
        pages = self.pages.clone()
        backend.store_pages(
            self.key,
            self.value,
            pages,
            self.ring,
            self.block_table,
            self.ring_table,
            self.query_start_loc,
            self.seq_lens,
            self.ring_pages,
            self.fmt,
        )
        return pages

    def keep(self, backend) -> torch.Tensor:
        ring = self.ring.clone()
        backend.write_ring(
            self.key,
            self.value,
            ring,
            self.ring_table,
            self.query_start_loc,
            self.seq_lens,
            self.ring_pages,
            self.fmt,
        )
        return ring


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype) -> None:
    assert torch.isfinite(out).all()
    error = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


# Lengths at block edges, ring partly over pages, decode, drafts, chunks, first prefill, absent requests.
MIXED = [
    (128, 1, None),
    (257, 1, None),
    (127, 1, None),
    (0, 0, 0),
    (300, 5, 250),
    (0, 1, 0),
    (0, 9, 0),
    (384, 130, 384),
    (130, 17, None),
    (256, 3, 256),
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_attention_matches_the_reference(preset, dim, isa):
    name = random.choice(list(DTYPES))
    group, heads = random.choice([1, 2, 3, 4, 5, 7, 8]), random.choice([1, 2, 3])
    print(name, group, heads)
    step = Step(MIXED, PageFormat.preset(preset, dim), heads, group, DTYPES[name])
    assert_close(step.attend(cpu), step.attend(ops), DTYPES[name])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_stored_pages_match_the_reference(preset, dim, isa):
    name = random.choice(list(DTYPES))
    fmt = PageFormat.preset(preset, dim)
    step = Step([(0, 300, 0), (200, 57, None), (127, 1, 0), (100, 3, 0), (0, 0, 0)], fmt, 2, 1, DTYPES[name])
    pages, expected = step.store(cpu), step.store(ops)
    touched = (expected != step.pages).flatten(1).any(1)
    assert torch.equal(pages[~touched], step.pages[~touched])
    assert touched.sum() == 4
    # Rounding ties (and what follows from a parameter on a tie) may fall to either side.
    differing = (pages != expected).float().mean()
    assert differing < 2e-3, f"{differing:.2e} of the bytes differ"
    starts = {int(step.block_table[row, 0]) for row in range(len(step.requests))}
    first = torch.tensor([int(block) in starts for block in touched.nonzero()])
    for got, want in zip(
        reference.decode_pages_rotated(pages[touched], fmt, first),
        reference.decode_pages_rotated(expected[touched], fmt, first),
    ):
        near = (got - want).abs() <= 1e-2 * want.abs() + 1e-3
        assert near.float().mean() > 0.998


@pytest.mark.parametrize("name", DTYPES)
def test_ring_is_written_exactly(name):
    fmt = PageFormat.preset("oscar", random.choice(SUPPORTED_HEAD_DIMS))
    step = Step([(0, 700, 0), (500, 1, None), (140, 17, None), (0, 0, 0), (3, 40, 0)], fmt, 2, 2, DTYPES[name])
    assert torch.equal(step.keep(cpu), step.keep(ops))
