# SPDX-License-Identifier: Apache-2.0
"""Gathering pages, ring and new tokens on the GPU, and prefill over the gathered pieces."""

import pytest
import torch

from vllm_oscar.core import reference
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import reference as plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_case(fmt: PageFormat, dtype: torch.dtype, context: int, tokens: int, heads: int = 2, group: int = 4):
    """One request in the middle of a sequence, after a plain step that stored its context."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    length = context + tokens
    ring_pages = fmt.ring_pages(2)
    table = torch.randperm(64, generator=generator)[: -(-length // PAGE_TOKENS)].int()[None]
    ring_table = torch.randperm(ring_pages, generator=generator).int()[None]
    pages = torch.full((64, heads, fmt.page_bytes), 0xFF, dtype=torch.uint8)
    ring = torch.full((ring_pages, heads, fmt.page_bytes), 0xFF, dtype=torch.uint8)
    old = random(max(context, 1), heads, fmt.head_dim), random(max(context, 1), heads, fmt.head_dim)
    if context:
        starts, lens = torch.tensor([0, context]).int(), torch.tensor([context]).int()
        plain.store_pages(*old, pages, ring, table, ring_table, starts, lens, ring_pages, fmt)
        plain.write_ring(*old, ring, ring_table, starts, lens, ring_pages, fmt)
    key, value = random(tokens, heads, fmt.head_dim), random(tokens, heads, fmt.head_dim)
    query = random(tokens, heads * group, fmt.head_dim)
    starts, lens = torch.tensor([0, tokens]).int(), torch.tensor([length]).int()
    ring_start = torch.tensor([max(0, context - PAGE_TOKENS)]).int()
    plain.store_pages(key, value, pages, ring, table, ring_table, starts, lens, ring_pages, fmt)
    return (query, key, value, pages, ring, table, ring_table, starts, lens, ring_start), ring_pages, old


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("context, tokens", [(0, 200), (128, 1), (300, 77), (640, 128), (1000, 500)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gather_matches_the_reference(preset, head_dim, context, tokens, dtype):
    from vllm_oscar.ops import dense_prefill

    fmt = PageFormat.preset(preset, head_dim)
    case, ring_pages, old = make_case(fmt, dtype, context, tokens)
    _, key, value, pages, _, table, *_, ring_start = case
    length, start = context + tokens, int(ring_start)
    out = torch.full((2, length, key.shape[1], head_dim), float("nan"), dtype=dtype, device="cuda")
    dense_prefill.gather(*(t.cuda() for t in case[1:]), ring_pages, fmt, 0, 0, length, out)
    count = -(-start // PAGE_TOKENS)
    decoded = reference.decode_pages(pages[table[0, :count].long()], fmt, torch.arange(count) == 0)
    for got, paged, kept, new in zip(out.cpu(), decoded, old, (key, value), strict=True):
        expected = torch.cat([paged.flatten(0, 1)[:start].to(dtype), kept[start:context], new])
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        assert error < 5e-3, error
        assert torch.equal(got[start:], expected[start:])


@pytest.mark.parametrize("context, tokens, piece", [(0, 300, 16384), (1000, 500, 16384), (3000, 700, 1024)])
def test_prefill_matches_the_reference(context, tokens, piece, monkeypatch):
    from vllm_oscar.ops import dense_prefill

    monkeypatch.setattr(dense_prefill, "WORKSPACE_TOKENS", piece)
    dense_prefill._workspaces.clear()
    fmt = PageFormat.preset("oscar", 128)
    case, ring_pages, _ = make_case(fmt, torch.bfloat16, context, tokens)
    expected = torch.empty_like(case[0])
    plain.attention(expected, *case, ring_pages, 128**-0.5, fmt)
    out = torch.full_like(case[0], float("nan")).cuda()
    rows = [dense_prefill.Prefill(0, 0, tokens, context)]
    dense_prefill.attention(out, *(t.cuda() for t in case), ring_pages, 128**-0.5, fmt, rows)
    error = (out.cpu().float() - expected.float()).norm() / expected.float().norm()
    assert error < 1e-2, error
