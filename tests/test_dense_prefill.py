# SPDX-License-Identifier: Apache-2.0
"""Dense prefill: waves, shared pages, gathering and merging, against the reference.

On the CPU the kernels are emulated (tests/cuda_on_cpu) and FlashAttention is played by PyTorch;
tests marked ``gpu`` run the real ones.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tolerances
import torch

from benchmarks.kernel_cases import Case, make_case, relative_error
from vllm_oscar.core import reference
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import dense_prefill
from vllm_oscar.ops import reference as plain
from vllm_oscar.ops.native import Binding
from vllm_oscar.ops.step import Limits, Step

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# ---- what stands in for the GPU ------------------------------------------------------
def flash(
    query, key, value, *, out, softmax_scale, causal, cu_seqlens_q, max_seqlen_q, max_seqlen_k,
    cu_seqlens_k=None, seqused_k=None, block_table=None, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """``flash_attn_varlen_func``. Like the real one it multiplies what lies behind a sequence in its page by zero."""
    lse = torch.full((query.shape[1], len(query)), float("nan"))  # rows of no sequence stay undefined
    starts = cu_seqlens_q.tolist()
    for i, (begin, end) in enumerate(zip(starts, starts[1:])):
        assert 0 <= end - begin <= max_seqlen_q
        if block_table is None:
            first, last = cu_seqlens_k[i : i + 2].tolist()
            count, keys, values = last - first, key[first:last], value[first:last]
        else:
            count = int(seqused_k[i])
            blocks = block_table[i, : -(-count // key.shape[1])].long()
            keys, values = key[blocks].flatten(0, 1), value[blocks].flatten(0, 1)
        assert count <= max_seqlen_k
        if begin == end:
            continue
        if not count:
            out[begin:end], lse[:, begin:end] = 0, -torch.inf
            continue
        group = query.shape[1] // keys.shape[1]
        keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].float(), keys) * softmax_scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        position, at = torch.arange(len(keys)), count - (end - begin) + torch.arange(end - begin)[:, None]
        before, behind = window_size
        hidden = position >= count
        if causal or behind >= 0:
            hidden = hidden | (position > at + max(behind, 0))
        if before >= 0:
            hidden = hidden | (position < at - before)
        scores.masked_fill_(hidden, -torch.inf)
        lse[:, begin:end] = scores.logsumexp(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
    return out, lse


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The emulated kernels."""
    output = tmp_path_factory.mktemp("emulator") / "prefill.so"
    source = ROOT / "tests" / "cuda_on_cpu"
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{source}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([*command, str(source / "prefill.cpp"), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


@pytest.fixture
def emulated(library, monkeypatch):
    """``dense_prefill`` on the CPU; ``gathered`` collects the sources of every gather."""
    gathered = []

    def call(function: str, device: int, *args) -> None:
        if function == "oscar_gather":
            _, sources, count, *_ = args
            gathered.append(torch.tensor((ctypes.c_int32 * (2 * count)).from_address(sources.value)).view(count, 2))
        assert getattr(library, function)(*args) == 0

    cuda = SimpleNamespace(
        BINDING=Binding("CUDA", "cpu", (torch.bfloat16, torch.float16), alignment=16),
        _call=call,
        _stream=lambda device: None,
        attention=plain.attention,
        reserve=lambda fmt, limits, long_queries=True: None,
    )
    monkeypatch.setattr(dense_prefill, "cuda", cuda)
    monkeypatch.setattr(dense_prefill, "_flash_attention", lambda head_dim: flash)
    monkeypatch.setattr(dense_prefill, "_workspaces", {})
    return SimpleNamespace(gathered=gathered)


def set_capacity(monkeypatch, slots: int) -> None:
    monkeypatch.setattr(dense_prefill, "_capacity", lambda fmt, limits: slots)


def planned(case: Case, decode_query_len: int = 1) -> Case:
    """``case`` with its plan, and a poisoned workspace."""
    starts, lens = case.step.query_start_loc.tolist(), case.step.seq_lens.tolist()
    heads, query_heads, device = case.key.shape[1], case.query.shape[1], case.key.device
    sliding_window = case.cache.softmax.sliding_window
    limits = Limits(len(lens), starts[-1], decode_query_len, query_heads, heads, case.key.dtype, device, sliding_window)
    dense_prefill.reserve(case.fmt, limits)
    for space in dense_prefill._workspaces.values():
        space.fill_(float("nan"))
    return replace(case, step=dense_prefill.plan(case.step, case.fmt, limits, starts, lens, decode_query_len))


def overall_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """For bfloat16, whose keys of large norm, rounded, disturb single rows more."""
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def share(case: Case, source: int, target: int, pages: int) -> None:
    """Let the first pages of request ``target`` be those of ``source``, as after a prefix hit."""
    case.step.page_table[target, :pages] = case.step.page_table[source, :pages]


# ---- the gather ------------------------------------------------------------------------
def check_gather(fmt: PageFormat, dtype: torch.dtype, requests: list[tuple[int, int]], device: str) -> None:
    """Every slot of a plan with one pass and one wave."""
    case = planned(make_case(fmt, requests, dtype=dtype, device=device))
    case.attention(dense_prefill)
    ((one,),) = [case.step.prefill.passes]
    (wave,) = one.waves
    space = dense_prefill._workspace(fmt.head_dim, case.key.shape[1], dtype, case.key.device)
    starts, lens = case.step.query_start_loc.tolist(), case.step.seq_lens.tolist()
    seen = 0
    for slot, (request, index) in enumerate(wave.sources.tolist()):
        if request < 0:
            continue
        seen += 1
        first, length = starts[request], lens[request]
        context = length - (starts[request + 1] - first)
        begin, end = index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS
        paged = max(0, min(int(case.step.ring_start[request]), end) - begin)
        kept = torch.arange(begin + paged, max(begin + paged, min(context, end)), device=device)
        ring = plain._read_ring(case.step, case.cache, request, kept, dtype)
        new = slice(first + max(0, begin - context), first + max(0, min(length, end) - context))
        decoded = [None, None]
        if paged:
            page = case.cache.pages[case.step.page_table[request, index : index + 1].long()]
            decoded = reference.decode_pages(page, fmt, torch.tensor([index == 0], device=device))
        for got, old, held, own in zip(space[:, slot], decoded, ring, (case.key, case.value)):
            exact = torch.cat([held.to(dtype), own[new]])
            assert torch.equal(got[paged : paged + len(exact)], exact)
            assert not got[paged + len(exact) :].any(), "rows behind the sequence are zeros"
            if paged:
                expected = old[0, :paged].to(dtype)
                error = (got[:paged].float() - expected.float()).norm() / expected.float().norm()
                assert error < 1e-4, error
    assert seen == sum(-(-length // PAGE_TOKENS) for length in lens)


GATHERED = [(128, 2), (300, 77), (640, 128), (1000, 300), (90, 20), (515, 400)]


@needs_compiler
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gather_matches_the_reference(emulated, preset, head_dim):
    dtype = torch.float16 if head_dim == 64 else torch.bfloat16
    check_gather(PageFormat.preset(preset, head_dim), dtype, GATHERED[:4] if head_dim == 256 else GATHERED, "cpu")


# ---- the plan ----------------------------------------------------------------------------
@needs_compiler
def test_a_shared_page_is_gathered_once(emulated):
    case = make_case(PageFormat.preset("oscar", 64), [(700, 9), (640, 130), (650, 3), (900, 2)], device="cpu")
    share(case, 0, 1, 5)
    share(case, 0, 2, 3)  # and two pages of its own
    share(case, 2, 3, 4)
    expected = case.exact_attention()
    case = planned(case)
    assert relative_error(case.attention(dense_prefill), expected) < tolerances.CUDA[torch.float16]
    (sources,) = emulated.gathered
    full = {(r, i) for r, i in sources.tolist() if r >= 0 and (i + 1) * PAGE_TOKENS <= int(case.step.ring_start[r])}
    blocks = [int(case.step.page_table[r, i]) for r, i in full]
    whole = (case.step.ring_start // PAGE_TOKENS).tolist()
    distinct = {int(case.step.page_table[r, i]) for r in range(4) for i in range(whole[r])}
    assert sorted(blocks) == sorted(distinct)
    assert len(distinct) < sum(whole) - 8


@needs_compiler
@pytest.mark.parametrize("capacity", (7, 8, 13, 14, 40))
def test_waves_hold_whole_requests_and_no_page_twice(emulated, monkeypatch, capacity):
    set_capacity(monkeypatch, capacity)
    fmt = PageFormat(replace(PRESETS["oscar_small"], window=128), 64)
    case = make_case(fmt, [(640, 5 + r) for r in range(6)], kv_heads=1, device="cpu")
    for target in (1, 2, 4, 5):
        share(case, target // 3 * 3, target, 4)
    expected = case.exact_attention()
    case = planned(case)
    assert relative_error(case.attention(dense_prefill), expected) < tolerances.CUDA[torch.float16]
    (one,) = case.step.prefill.passes
    ends = [0]
    for wave, sources in zip(one.waves, emulated.gathered):
        held = sources[: int((sources[:, 0] >= 0).sum())]
        assert (sources[len(held) :] == -1).all()
        shared = held[(held[:, 1] + 1) * PAGE_TOKENS <= case.step.ring_start[held[:, 0]]]
        blocks = case.step.page_table[shared[:, 0], shared[:, 1]].tolist()
        assert len(set(blocks)) == len(blocks)
        starts = wave.query_starts.tolist()
        assert starts[0] == ends[-1] or not len(held)
        ends.append(starts[-1])
    assert ends[-1] == len(case.query)
    used = sum(bool((sources[:, 0] >= 0).any()) for sources in emulated.gathered)
    assert used == {7: 6, 8: 4, 13: 2, 14: 2, 40: 1}[capacity]
    assert len(one.waves) == {7: 6, 8: 6, 13: 3, 14: 3, 40: 1}[capacity]  # as if nothing were shared


@needs_compiler
def test_a_shared_history_leaves_waves_empty(emulated, monkeypatch):
    """Sixteen requests of eight pages, seven of them shared: as few slots as one request and sixteen pages."""
    set_capacity(monkeypatch, 24)
    case = make_case(PageFormat.preset("oscar", 64), [(896, 100)] * 16, kv_heads=1, window=False, device="cpu")
    for target in range(1, 16):
        share(case, 0, target, 7)
    case = planned(case)
    assert relative_error(case.attention(dense_prefill), case.exact_attention()) < tolerances.CUDA[torch.float16]
    counts = [int((sources[:, 0] >= 0).sum()) for sources in emulated.gathered]
    assert counts == [23] + [0] * 5


def random_step(requests: list[tuple[int, int]], pages: int, seed: int) -> Step:
    """Tables alone, as if requests shared prefixes of random length with random others."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(len(requests) * pages, generator=generator).int().view(len(requests), pages)
    for r in range(1, len(requests)):
        source, shared = (int(torch.randint(most, (), generator=generator)) for most in (r, pages))
        table[r, :shared] = table[source, :shared]
    context, lengths = (torch.tensor(x, dtype=torch.int32) for x in zip(*requests))
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    window = (torch.arange(len(requests)) % 2 * PAGE_TOKENS).int()
    return Step(starts, context + lengths, table, table[:, :1], (context - window).clamp_min(0), int(lengths.max()))


def expected_waves(spans: list[range], names: dict, slots: int) -> tuple[list[int], list[set]]:
    """The first request of every wave, and what each wave holds, when requests are added one by one."""
    firsts, held = [0], [set()]
    for r, span in enumerate(spans):
        wanted = {names[r, i] for i in span}
        if len(held[-1] | wanted) > slots:
            firsts.append(r)
            held.append(set())
        held[-1] |= wanted
    return firsts, held


@needs_compiler
@pytest.mark.parametrize(
    "capacity, sliding_window", [(190, None), (300, None), (701, None), (1300, None), (3000, None), (701, 70_001)]
)
def test_long_histories_are_planned_as_counted_by_hand(emulated, monkeypatch, capacity, sliding_window):
    """Every wave, slot and row start, against sets of pages in Python."""
    set_capacity(monkeypatch, capacity)
    requests = [(700 * PAGE_TOKENS - 50 * r, 10 + 300 * (r % 3)) for r in range(9)]
    requests[4], requests[6] = (0, 200), (90, 20)
    step = random_step(requests, 704, seed=capacity)
    starts, lens = step.query_start_loc.tolist(), step.seq_lens.tolist()
    limits = Limits(9, 10_000, 1, 1, 1, torch.float16, torch.device("cpu"), sliding_window)
    plan = dense_prefill.plan(step, PageFormat.preset("oscar", 64), limits, starts, lens, 1).prefill
    firsts = [max(0, context + 1 - (sliding_window or lens[0])) // PAGE_TOKENS for context, _ in requests]
    whole = [int(start) // PAGE_TOKENS for start in step.ring_start]
    names = {  # of a page that may be shared its block, of others themselves
        (r, i): int(step.page_table[r, i]) if i < whole[r] else (r, i) for r in range(9) for i in range(704)
    }
    covered = [[] for _ in requests]
    for one in plan.passes:
        keys = one.keys.tolist()
        used = sorted(one.table.unique().tolist())
        assert used[0] == 0 and used[-1] < capacity
        spans, sources = [], [wave.sources.tolist() for wave in one.waves]
        for r in range(len(requests)):
            begin = firsts[r] + len(covered[r])
            spans.append(range(begin, begin + -(-keys[r] // PAGE_TOKENS)))
            covered[r] += spans[-1]
            assert keys[r] in (min(lens[r], spans[-1].stop * PAGE_TOKENS) - begin * PAGE_TOKENS, 0)
        starting, held = expected_waves(spans, names, capacity)
        ends = [*starting[1:], len(requests)]
        assert len(starting) <= len(one.waves)
        for w, wave in enumerate(one.waves):
            first, end = (starting[w], ends[w]) if w < len(starting) else (len(requests),) * 2
            assert wave.query_starts.tolist() == [min(max(row, starts[first]), starts[end]) for row in starts]
            filled = [tuple(source) for source in sources[w] if source[0] >= 0]
            assert len(filled) == len({names[source] for source in filled})
            assert {names[source] for source in filled} == (held[w] if w < len(held) else set())
            for r in range(first, end):
                for i, slot in zip(spans[r], one.table[r].tolist()):
                    assert names[tuple(sources[w][slot])] == names[r, i]
    for r, (context, length) in enumerate(requests):
        assert len(covered[r]) == (-(-(context + length) // PAGE_TOKENS) - firsts[r] if context else 0)


def test_steps_of_decodes_have_no_plan():
    step = random_step([(300, 1), (20, 3), (0, 2)], 4, seed=0)
    planned = dense_prefill.plan(step, None, None, step.query_start_loc.tolist(), step.seq_lens.tolist(), 3)
    assert planned is step


def test_a_request_that_cannot_fit_is_refused(emulated, monkeypatch):
    set_capacity(monkeypatch, 4)
    case = make_case(PageFormat.preset("oscar", 64), [(130, 600)], device="cpu")
    with pytest.raises(ValueError, match="600 tokens of a request do not fit into a prefill workspace of 4 pages"):
        planned(case)


def test_the_workspace_holds_a_step():
    fmt, device = PageFormat.preset("oscar", 128), torch.device("cpu")
    few = Limits(64, 8192, 1, 32, 8, torch.bfloat16, device)
    assert dense_prefill._capacity(fmt, few) == 512  # 256 MiB
    assert dense_prefill._capacity(fmt, replace(few, kv_heads=1)) == dense_prefill.MOST_SLOTS
    many = replace(few, tokens=1 << 20)
    assert dense_prefill._capacity(fmt, many) == (1 << 20) // PAGE_TOKENS + 2
    assert dense_prefill._capacity(fmt, replace(many, sliding_window=4096)) == (1 << 20) // PAGE_TOKENS + 2 + 32


# ---- attention -----------------------------------------------------------------------------
MIXED = {
    "fresh only": ([(0, 200), (0, 3), (0, 129)], []),
    "history only": ([(300, 77), (128, 2), (127, 2), (129, 200), (1000, 5)], []),
    "decodes, history, fresh": ([(300, 1), (5, 1), (700, 40), (256, 3), (0, 150), (0, 2)], [(2, 3, 2)]),
    "fresh between": ([(900, 2), (0, 30), (384, 30), (0, 5), (0, 7), (640, 130)], [(0, 2, 3), (0, 5, 4)]),
    "nothing to do in between": ([(640, 9), (100, 0), (640, 130), (0, 0)], [(0, 2, 4)]),
    "partly shared": ([(1100, 20), (1000, 30), (1300, 10), (900, 128)], [(0, 1, 7), (0, 2, 3), (1, 3, 5)]),
    "drafts among the decodes": ([(300, 3), (900, 2), (400, 1), (700, 90)], []),
}


def mixed_case(name: str, **options) -> Case:
    requests, shared = MIXED[name]
    case = make_case(PageFormat.preset("oscar", 64), requests, **options)
    for each in shared:
        share(case, *each)
    return case


@needs_compiler
@pytest.mark.parametrize("capacity", (5, 6, 12, 64))
@pytest.mark.parametrize("name", MIXED)
def test_attention_matches_the_reference(emulated, monkeypatch, name, capacity):
    """Down to a workspace that only just holds a request's own tokens, so that long histories take several passes."""
    set_capacity(monkeypatch, capacity)
    case = mixed_case(name, device="cpu")
    expected = case.exact_attention()
    case = planned(case, decode_query_len=3 if name.startswith("drafts") else 1)
    out = case.attention(dense_prefill)
    assert relative_error(out, expected) < tolerances.CUDA[torch.float16]
    lengths = [context + length for context, length in MIXED[name][0] if context and length > 3]
    several = any(length > capacity * PAGE_TOKENS for length in lengths)
    assert (len(case.step.prefill.passes) > 1) == several


@needs_compiler
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_other_presets(emulated, monkeypatch, preset, dtype):
    set_capacity(monkeypatch, 6)
    case = make_case(PageFormat.preset(preset, 128), [(9, 1), (900, 60), (390, 20)], dtype=dtype, device="cpu")
    share(case, 1, 2, 2)
    expected = case.exact_attention()
    out = planned(case).attention(dense_prefill)
    if dtype == torch.float16:
        assert relative_error(out, expected) < tolerances.CUDA[torch.float16]
    assert overall_error(out, expected) < 1e-2


def windowed_case(sliding_window: int, **options) -> Case:
    """A decode, shared pages, histories within and beyond the window, a request of the step's tokens alone."""
    requests = [(300, 1), (900, 40), (900, 3), (0, 150), (20, 130), (1000, 300)]
    case = make_case(PageFormat.preset("oscar", 64), requests, sliding_window=sliding_window, **options)
    share(case, 1, 2, 6)
    return case


@needs_compiler
@pytest.mark.parametrize("capacity", (12, 64))
@pytest.mark.parametrize("sliding_window", (1, 100, 128, 129, 300, 700, 4096))
def test_sliding_windows(emulated, monkeypatch, sliding_window, capacity):
    set_capacity(monkeypatch, capacity)
    case = windowed_case(sliding_window, sinks=sliding_window == 300, device="cpu")
    expected = case.exact_attention()
    case = planned(case)
    assert relative_error(case.attention(dense_prefill), expected) < tolerances.CUDA[torch.float16]
    contexts = (case.step.seq_lens - case.step.query_start_loc.diff()).tolist()
    firsts = [case.cache.softmax.first_visible(context) // PAGE_TOKENS for context in contexts]
    sources = {(r, i) for one in emulated.gathered for r, i in one.tolist() if r >= 0}
    assert all(i >= firsts[r] for r, i in sources)
    assert all((r, firsts[r]) in sources for r in (1, 4, 5))


@needs_compiler
@pytest.mark.parametrize("head_dim, sliding_window, served", [(256, 300, False), (256, None, True), (192, 300, True)])
def test_large_heads_with_a_sliding_window_are_left_to_the_cuda_kernels(emulated, head_dim, sliding_window, served):
    case = make_case(PageFormat.preset("oscar", head_dim), [(300, 40)], sliding_window=sliding_window, device="cpu")
    assert (planned(case).step.prefill is not None) == served


@needs_compiler
@pytest.mark.parametrize("capacity", (5, 8, 64))
@pytest.mark.parametrize("soft_cap, sinks", [(None, True), (3.0, True), (3.0, False)])
def test_sinks_and_soft_cap(emulated, monkeypatch, capacity, soft_cap, sinks):
    """Of one pass and several, of one wave and several, of requests without history."""
    set_capacity(monkeypatch, capacity)
    requests = [(5, 1), (900, 40), (0, 30), (300, 130), (400, 9), (0, 5)]
    options = {"soft_cap": soft_cap, "sinks": sinks, "device": "cpu"}
    case = make_case(PageFormat.preset("oscar", 64), requests, **options)
    expected = case.exact_attention()
    case = planned(case)
    assert relative_error(case.attention(dense_prefill), expected) < tolerances.CUDA[torch.float16]
    assert (len(case.step.prefill.passes) > 1) == (capacity < 8)
    assert (len(case.step.prefill.passes[-1].waves) > 1) == (capacity < 64)


def test_a_plan_serves_layers_with_its_sliding_window_alone(emulated):
    case = planned(make_case(PageFormat.preset("oscar", 64), [(300, 40)], sliding_window=100, device="cpu"))
    case.cache = replace(case.cache, softmax=replace(case.cache.softmax, sliding_window=101))
    with pytest.raises(ValueError, match="plan for layers with the sliding window 100"):
        case.attention(dense_prefill)


def test_a_sliding_window_that_cannot_fit_is_refused(emulated, monkeypatch):
    set_capacity(monkeypatch, 4)
    case = make_case(PageFormat.preset("oscar", 64), [(900, 20)], sliding_window=500, device="cpu")
    with pytest.raises(ValueError, match="20 tokens of a request and a sliding window do not fit"):
        planned(case)


# ---- on a GPU --------------------------------------------------------------------------------
@pytest.fixture
def fresh_workspace(monkeypatch):
    usable, reason = dense_prefill.available()
    assert usable, reason
    monkeypatch.setattr(dense_prefill, "_workspaces", {})


class TestGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gather(self, fresh_workspace, preset, head_dim, dtype):
        check_gather(PageFormat.preset(preset, head_dim), dtype, GATHERED, "cuda")

    @pytest.mark.parametrize("capacity", (5, 6, 12, 64))
    @pytest.mark.parametrize("name", MIXED)
    def test_attention(self, fresh_workspace, monkeypatch, name, capacity):
        set_capacity(monkeypatch, capacity)
        case = mixed_case(name, device="cuda")
        expected = case.exact_attention()
        case = planned(case, decode_query_len=3 if name.startswith("drafts") else 1)
        assert relative_error(case.attention(dense_prefill), expected) < tolerances.CUDA[torch.float16]

    @pytest.mark.parametrize("head_dim", (64, 128, 256))
    @pytest.mark.parametrize("sliding_window", (1, 100, 128, 129, 300, 700, 4096))
    @pytest.mark.parametrize("sinks", (False, True))
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sliding_windows(self, fresh_workspace, monkeypatch, head_dim, sliding_window, sinks, dtype):
        set_capacity(monkeypatch, 64)
        requests = [(300, 1), (900, 40), (900, 3), (0, 150), (20, 130), (1000, 300), (0, 1500), (3000, 1200)]
        options = dict(dtype=dtype, sliding_window=sliding_window, sinks=sinks)
        case = make_case(PageFormat.preset("oscar", head_dim), requests, **options)
        share(case, 1, 2, 6)
        expected = case.exact_attention()
        case = planned(case)
        assert overall_error(case.attention(dense_prefill), expected) < 1e-2

    @pytest.mark.parametrize("capacity", (5, 8, 64))
    @pytest.mark.parametrize("head_dim", (64, 128, 256))
    @pytest.mark.parametrize("soft_cap, sinks", [(None, True), (3.0, True), (50.0, False)])
    def test_sinks_and_soft_cap(self, fresh_workspace, monkeypatch, head_dim, capacity, soft_cap, sinks):
        set_capacity(monkeypatch, capacity)
        requests = [(5, 1), (900, 40), (0, 30), (300, 130), (400, 9), (0, 5)]
        case = make_case(PageFormat.preset("oscar", head_dim), requests, soft_cap=soft_cap, sinks=sinks)
        expected = case.exact_attention()
        case = planned(case)
        assert overall_error(case.attention(dense_prefill), expected) < 5e-3

    def test_many_requests_share_a_long_prefix(self, fresh_workspace):
        case = make_case(PageFormat.preset("oscar", 128), [(4096, 128)] * 48, kv_heads=8, dtype=torch.bfloat16)
        for target in range(1, 48):
            share(case, 0, target, 30)
        expected = case.exact_attention()
        case = planned(case)
        assert len(case.step.prefill.passes[0].waves) == 4
        assert overall_error(case.attention(dense_prefill), expected) < 1e-2

    def test_planning_and_launching_wait_for_nothing(self, fresh_workspace):
        case = make_case(PageFormat.preset("oscar", 128), [(900, 1), (4096, 128), (1000, 300), (0, 200)])
        planned(case).attention(dense_prefill)
        starts, lens = case.step.query_start_loc.tolist(), case.step.seq_lens.tolist()
        limits = Limits(4, starts[-1], 1, 8, 2, case.key.dtype, case.key.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = dense_prefill.plan(case.step, case.fmt, limits, starts, lens, 1)
            out = replace(case, step=step).attention(dense_prefill)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert out.isfinite().all()
