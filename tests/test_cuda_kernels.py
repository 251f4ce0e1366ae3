# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels against the reference. Needs a GPU and the built library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tolerances
import torch

from benchmarks.kernel_cases import Case, make_case, relative_error
from vllm_oscar.core.config import PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import cuda
from vllm_oscar.ops import reference as reference_ops
from vllm_oscar.ops.step import Limits

usable, reason = cuda.available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not usable, reason=reason)]

CONTEXTS = [0, 1, 127, 128, 129, 255, 256, 300, 511, 1000, 2176, 4099]

# (dtype, query heads per KV head, longest query)
SHAPES = [
    (torch.float16, 4, 1),
    (torch.bfloat16, 8, 1),
    (torch.bfloat16, 1, 2),
    (torch.float16, 5, 3),
    (torch.bfloat16, 16, 4),
    (torch.float16, 7, 16),
]


def ragged(longest: int) -> list[tuple[int, int]]:
    """One request per context, query lengths 0 to ``longest``."""
    lengths = [longest, 1, longest, 0, max(longest - 1, 1)]
    return [(context, lengths[i % len(lengths)]) for i, context in enumerate(CONTEXTS)]


def expected_ring(case: Case) -> torch.Tensor:
    """The reference's on the CPU: on a GPU, PyTorch divides by a number as it multiplies by its inverse."""
    tables = ("query_start_loc", "seq_lens", "page_table", "ring_table", "ring_start")
    step = replace(case.step, **{name: getattr(case.step, name).cpu() for name in tables})
    cache = replace(case.cache, pages=case.cache.pages.cpu(), ring=case.cache.ring.cpu())
    on_cpu = Case(step, cache, case.query.cpu(), case.key.cpu(), case.value.cpu())
    return on_cpu.write_ring(reference_ops).to(case.cache.ring.device)


def check_rows(case: Case) -> None:
    """The hundreds to thousands of rows of one case of a matrix."""
    out, expected, dtype = case.attention(cuda).double(), case.exact_attention(), case.query.dtype
    errors = ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
    assert errors.quantile(0.99) < tolerances.CUDA[dtype]
    assert errors.max() < tolerances.CUDA_WORST_OF_MANY
    assert (out - expected).norm() / expected.norm() < tolerances.CUDA_RMS[dtype]


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype, group, longest", SHAPES)
def test_attention(preset, head_dim, dtype, group, longest):
    case = make_case(PageFormat.preset(preset, head_dim), ragged(longest), dtype=dtype, group=group, seed=longest)
    check_rows(case)


@pytest.mark.parametrize("preset", PRESETS)
def test_long_queries_are_split(preset):
    requests = [(0, 300), (700, 130), (129, 1), (5, 0), (256, 40)]
    case = make_case(PageFormat.preset(preset, 128), requests, dtype=torch.bfloat16)
    expected = case.exact_attention()
    assert relative_error(case.attention(cuda), expected) < tolerances.CUDA[torch.bfloat16]
    case.step = replace(case.step, max_query_len=len(case.query))  # a loose bound
    assert relative_error(case.attention(cuda), expected) < tolerances.CUDA[torch.bfloat16]


@pytest.mark.parametrize("window", (0, 128, 256, 700))
@pytest.mark.parametrize("preset", ("oscar", "oscar_paper"))
@pytest.mark.parametrize("dtype, group, longest", SHAPES[:4])
def test_windows(preset, window, dtype, group, longest):
    """Rings of either type that are not yet full, full, and turning over, up to longer than a history."""
    fmt = PageFormat(replace(PRESETS[preset], window=window), 128)
    requests = [*ragged(longest), (window + 130, longest), (window + 5, 1), (2 * window + 61, longest)]
    case = make_case(fmt, requests, dtype=dtype, group=group, seed=window)
    assert relative_error(case.attention(cuda), case.exact_attention()) < tolerances.CUDA[dtype]


SLIDING_WINDOWS = [1, 127, 128, 129, 200, 1024, 4096]


def windowed(sliding_window: int, longest: int) -> list[tuple[int, int]]:
    """Histories shorter than the window, as long, and longer, the window beginning anywhere in a page."""
    contexts = [0, sliding_window - 1, sliding_window, *(sliding_window + n for n in (1, 63, 127, 128, 300, 1500))]
    return [(context, max(1, longest - i % 3)) for i, context in enumerate(contexts)]


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("preset", ("oscar", "oscar_4bit", "oscar_paper"))
@pytest.mark.parametrize("sliding_window", SLIDING_WINDOWS)
@pytest.mark.parametrize("dtype, group, longest", SHAPES)
def test_sliding_windows(preset, head_dim, sliding_window, dtype, group, longest):
    fmt, requests = PageFormat.preset(preset, head_dim), windowed(sliding_window, longest)
    options = dict(dtype=dtype, group=group, seed=longest, sinks=longest == 4)
    case = make_case(fmt, requests, sliding_window=sliding_window, **options)
    check_rows(case)


@pytest.mark.parametrize("length", range(1, 17))
def test_sliding_windows_of_every_query_length(length):
    for group in (1, 3, 8, 16):
        requests = [(context, length) for context in (0, 100, 199, 200, 330, 900)]
        case = make_case(PageFormat.preset("oscar", 64), requests, group=group, sliding_window=200, seed=length)
        check_rows(case)


@pytest.mark.parametrize("sliding_window", (None, 200, 1024))
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype, group, longest", SHAPES[:4])
def test_sinks_and_soft_cap(preset, head_dim, sliding_window, dtype, group, longest):
    for soft_cap, sinks in ((None, True), (3.0, False), (50.0, True)):
        options = dict(dtype=dtype, group=group, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks)
        case = make_case(PageFormat.preset(preset, head_dim), ragged(longest), **options)
        check_rows(case)


@pytest.mark.parametrize("sliding_window", SLIDING_WINDOWS[:6])
def test_long_queries_in_a_sliding_window(sliding_window):
    requests = [(0, 300), (700, 1300), (129, 1), (5, 0), (256, 40)]
    options = dict(dtype=torch.bfloat16, sliding_window=sliding_window, sinks=True)
    case = make_case(PageFormat.preset("oscar", 128), requests, **options)
    assert relative_error(case.attention(cuda), case.exact_attention()) < tolerances.CUDA[torch.bfloat16]


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_store_and_ring(preset, head_dim, dtype):
    fmt = PageFormat.preset(preset, head_dim)
    requests = [(0, 128), (127, 1), (120, 300), (255, 2), (300, 1), (0, 0), (128, 128), (1, 20)]
    case = make_case(fmt, requests, dtype=dtype)
    pages, expected = case.store(cuda), case.store(reference_ops)
    different = pages != expected
    assert different.float().mean() < tolerances.STORED_BYTES  # rounding ties, from another order of summation
    untouched = (expected == case.cache.pages).all(-1).all(-1)
    assert torch.equal(pages[untouched], case.cache.pages[untouched])
    assert torch.equal(case.write_ring(cuda), expected_ring(case))


@pytest.mark.parametrize("preset", ("oscar", "oscar_paper"))
def test_a_nan_stays_with_its_token(preset):
    case = make_case(PageFormat.preset(preset, 128), [(0, 128), (120, 150)], dtype=torch.bfloat16)
    for row, head, channel in ((0, 0, 3), (5, 1, 0), (128, 0, 63), (277, 1, 9)):
        case.key[row, head, channel] = float("nan")
        case.value[row, head, channel + 7] = float("inf" if row == 5 else "nan")
    for write in (case.store, case.write_ring):
        got, expected = write(cuda), write(reference_ops)
        different = got != expected
        assert different.float().mean() < 1e-2
        at = (different.view(torch.int16) != 0).view(-1)  # halves that differ: NaN in both, or rounded otherwise
        pairs = [x.view(torch.half).reshape(-1)[at] for x in (got, expected)]
        assert pairs[0].isnan().equal(pairs[1].isnan())


def test_pages_taken_from_other_warps(monkeypatch):
    """Shares long enough to be taken from, again and again: sums vary by rounding, not more."""
    fmt = PageFormat.preset("oscar", 128)
    for requests, heads, warps in (
        ([(40_000, 1)], 4, 4),
        ([(3000 + 500 * i, 1 + i % 3) for i in range(20)], 4, 2),
        ([(100_000, 1)], 8, 0),
    ):
        case = make_case(fmt, requests, kv_heads=heads, dtype=torch.bfloat16)
        expected = case.exact_attention()
        for _ in range(20):
            assert relative_error(case.attention(cuda, warps=warps), expected) < tolerances.CUDA[torch.bfloat16]
        monkeypatch.setenv("VLLM_OSCAR_DETERMINISTIC", "1")
        case.step = replace(case.step)  # another step: the variable is read once for each
        once = case.attention(cuda, warps=warps)
        assert all(torch.equal(once, case.attention(cuda, warps=warps)) for _ in range(20))
        monkeypatch.delenv("VLLM_OSCAR_DETERMINISTIC")


@pytest.mark.parametrize("requests", [[(70_000, 1)], [(255 + 640 * i, 1) for i in range(30)], [(127, 1)] * 8])
def test_a_step_in_a_graph(requests):
    """Store, attention and ring, each started while the one before still runs."""
    fmt = PageFormat.preset("oscar", 128)
    case = make_case(fmt, requests, kv_heads=8, dtype=torch.bfloat16, lookahead=1)
    case.step = replace(case.step, tables_settled=True)
    pages, ring = case.cache.pages, case.cache.ring
    start_pages, start_ring = pages.clone(), ring.clone()
    expected = case.exact_attention(), case.store(reference_ops), expected_ring(case)
    out = torch.empty_like(case.query)

    def step() -> None:
        cuda.store_pages(case.step, case.cache, case.key, case.value)
        cuda.attention(case.step, case.cache, case.query, case.key, case.value, out)
        cuda.write_ring(case.step, case.cache, case.key, case.value)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        pages.copy_(start_pages)
        ring.copy_(start_ring)
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, expected[0]) < tolerances.CUDA[torch.bfloat16]
        assert (pages != expected[1]).float().mean() < tolerances.STORED_BYTES
        assert torch.equal(ring, expected[2])


def test_extreme_magnitudes_stay_finite():
    fmt = PageFormat.preset("oscar", 128)
    case = make_case(fmt, [(1000, 1), (4099, 2)], dtype=torch.bfloat16)
    case.query *= 300  # scores of thousands: nearly one-hot weights
    assert relative_error(case.attention(cuda), case.exact_attention()) < 1
    case.query *= 0
    assert relative_error(case.attention(cuda), case.exact_attention()) < tolerances.CUDA[torch.bfloat16]


def test_one_graph_serves_all_lengths():
    fmt = PageFormat.preset("oscar", 128)
    case = make_case(fmt, [(4000, 1)] * 4, dtype=torch.bfloat16)
    out = case.attention(cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.attention(case.step, case.cache, case.query, case.key, case.value, out)
    step, cache = case.step, case.cache
    for requests in ([(1, 1)] * 4, [(4000, 1), (0, 1), (129, 1), (2000, 1)], [(4000, 1)] * 4):
        new = make_case(fmt, requests, dtype=torch.bfloat16, seed=len(str(requests)))
        for name in ("query", "key", "value"):
            getattr(case, name).copy_(getattr(new, name))
        for name in ("seq_lens", "ring_start", "ring_table"):
            getattr(step, name).copy_(getattr(new.step, name))
        cache.pages[: len(new.cache.pages)] = new.cache.pages
        cache.ring.copy_(new.cache.ring)
        step.page_table.fill_(0)
        step.page_table[:, : new.step.page_table.shape[1]] = new.step.page_table
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, new.exact_attention()) < tolerances.CUDA[torch.bfloat16]


def test_a_reserved_step_can_be_captured_at_once(monkeypatch):
    """Without a run before it, whose allocations the graph could not make; and nothing moves afterwards."""
    monkeypatch.setattr(cuda, "_memories", {})
    fmt, shape = PageFormat.preset("oscar", 128), {"kv_heads": 2, "group": 4, "dtype": torch.bfloat16}
    limits = Limits(
        requests=64,
        tokens=300,
        decode_query_len=2,
        query_heads=8,
        kv_heads=2,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    cuda.reserve(fmt, limits)
    workspaces = {device: memory.workspace.data_ptr() for device, memory in cuda._memories.items()}
    for requests in ([(300, 2)] * 64, [(700, 237)] + [(129, 1)] * 63, [(40, 300)]):
        case = make_case(fmt, requests, **shape)
        out = torch.full_like(case.query, float("nan"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda.attention(case.step, case.cache, case.query, case.key, case.value, out)
        graph.replay()
        assert relative_error(out, case.exact_attention()) < tolerances.CUDA[torch.bfloat16]
    assert workspaces == {device: memory.workspace.data_ptr() for device, memory in cuda._memories.items()}


def test_a_graph_that_needs_more_workspace_is_refused(monkeypatch):
    monkeypatch.setattr(cuda, "_memories", {})
    case = make_case(PageFormat.preset("oscar", 128), [(300, 1)] * 4)
    with pytest.raises(RuntimeError, match="workspace.*reserve"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        case.attention(cuda)
    assert relative_error(case.attention(cuda), case.exact_attention()) < tolerances.CUDA[torch.float16]


def test_arguments_are_checked():
    case = make_case(PageFormat.preset("oscar", 128), [(200, 1)])
    case.step = replace(case.step, seq_lens=case.step.seq_lens.long())
    with pytest.raises(ValueError, match="seq_lens"):
        case.attention(cuda)
