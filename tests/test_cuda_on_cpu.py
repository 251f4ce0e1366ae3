# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' and attention launchers' own source, run on the CPU (tests/cuda_on_cpu), against the reference.

Checks indexing, layout, masks, schedule and combination without a GPU; not timing, not
memory ordering, not the assembly that tests/cuda_on_cpu replaces.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tolerances
import torch

from benchmarks.kernel_cases import POISON, make_case, random_tokens, relative_error
from vllm_oscar.core.config import PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.reference import encode_page
from vllm_oscar.ops import cuda
from vllm_oscar.ops import reference as reference_ops
from vllm_oscar.ops.step import Limits

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Emulated:
    """``vllm_oscar.ops.cuda`` with the emulated library and a workspace full of NaN before every call."""

    store_pages, write_ring = staticmethod(cuda.store_pages), staticmethod(cuda.write_ring)

    @staticmethod
    def attention(*args, **options) -> None:
        for memory in cuda._memories.values():
            memory.workspace.fill_(POISON)
        cuda.attention(*args, **options)

    @staticmethod
    def thefts() -> int:
        """Pages that warps took from others in the last call."""
        return cuda._library().emulated_thefts()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("emulator") / "kernels.so"
    source = ROOT / "tests" / "cuda_on_cpu"
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{source}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([*command, str(source / "kernels.cpp"), "-o", str(output)], check=True)
    return output


@pytest.fixture
def emulated(library, monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", library)
    monkeypatch.setattr(cuda, "BINDING", replace(cuda.BINDING, device_type="cpu"))
    monkeypatch.setattr(cuda, "_stream", lambda device: None)
    monkeypatch.setattr(cuda, "_memories", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device() says of CPU tensors
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda._library.cache_clear()
    cuda._largest_workspace.cache_clear()
    yield Emulated
    cuda._library.cache_clear()
    cuda._largest_workspace.cache_clear()


REQUESTS = [(0, 1), (127, 3), (300, 1), (5, 0), (516, 2), (128, 3)]


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype, group", [(torch.float16, 2), (torch.bfloat16, 5)])
def test_attention(emulated, preset, head_dim, dtype, group):
    case = make_case(PageFormat.preset(preset, head_dim), REQUESTS, dtype=dtype, group=group, device="cpu")
    error = relative_error(case.attention(emulated), case.exact_attention())
    assert error < (6e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("window", (0, 128, 256, 700))
@pytest.mark.parametrize("preset, dtype", [("oscar", torch.bfloat16), ("oscar_paper", torch.float16)])
def test_windows(emulated, preset, dtype, window):
    """Rings of either type that are not yet full, full, and turning over, up to longer than a history."""
    fmt = PageFormat(replace(PRESETS[preset], window=window), 64)
    requests = [(window + 130, 2), (40, 1), (window + 5, 17), (300, 1), (2 * window + 61, 1)]
    case = make_case(fmt, requests, kv_heads=1, dtype=dtype, group=2, device="cpu", seed=window)
    assert relative_error(case.attention(emulated), case.exact_attention()) < (6e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("sliding_window", (1, 2, 127, 128, 129, 200, 600))
@pytest.mark.parametrize(
    "preset, head_dim, dtype, group",
    [("oscar", 64, torch.bfloat16, 8), ("oscar_4bit", 128, torch.float16, 1), ("oscar_paper", 64, torch.float16, 5)],
)
def test_sliding_windows(emulated, preset, head_dim, dtype, group, sliding_window):
    """Shorter and longer than ring and history, from a page's first token on and from its middle."""
    contexts = (0, 40, sliding_window - 1, sliding_window + 127, sliding_window + 300)
    requests = list(zip(contexts, (3, 1, 2, 16, 1)))
    options = dict(dtype=dtype, group=group, kv_heads=1, sinks=group == 5, device="cpu")
    case = make_case(PageFormat.preset(preset, head_dim), requests, sliding_window=sliding_window, **options)
    assert relative_error(case.attention(emulated), case.exact_attention()) < tolerances.CUDA[dtype]


@pytest.mark.parametrize("sliding_window", (None, 200))
@pytest.mark.parametrize("preset, dtype", [("oscar", torch.bfloat16), ("oscar_paper", torch.float16)])
def test_sinks_and_soft_cap(emulated, preset, dtype, sliding_window):
    """Parts of the work that hold one result, and several; a request without history; queries of several launches."""
    requests = [(0, 1), (700, 2), (300, 1), (20, 7)]
    for soft_cap, sinks in ((None, True), (3.0, False), (3.0, True)):
        options = dict(sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks, kv_heads=2, group=3)
        case = make_case(PageFormat.preset(preset, 64), requests, dtype=dtype, device="cpu", **options)
        assert relative_error(case.attention(emulated), case.exact_attention()) < tolerances.CUDA[dtype]


def test_a_long_query_in_a_sliding_window(emulated, monkeypatch):
    """Launches whose tokens see nothing of the history, and less and less of the step."""
    monkeypatch.setattr(cuda, "_query_chunk", lambda requests, longest: 40)
    case = make_case(PageFormat.preset("oscar", 64), [(300, 150), (0, 90)], kv_heads=1, sliding_window=60, device="cpu")
    assert relative_error(case.attention(emulated), case.exact_attention()) < tolerances.CUDA[torch.float16]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_ring_of_any_magnitude(emulated, dtype):
    """Queries and int8 tokens whose products overflow fp16, or vanish in it, without the scales."""
    requests = [(100, 1), (90, 2), (60, 1)]
    case = make_case(PageFormat.preset("oscar", 64), requests, kv_heads=1, dtype=dtype, device="cpu")
    query, ring = case.query.clone(), case.cache.ring.clone()
    scales = case.fmt.ring_tokens_per_page(2) * 2 * 64
    for by in (2.0**-12, 2.0**9):
        case.cache.ring.copy_(ring)
        halves = case.cache.ring[..., scales:].view(torch.half)  # keys' and values' scales, then what pads the page
        halves[..., ::2] = halves[..., ::2] / by
        case.query = query * by
        case.key = torch.zeros_like(case.key)
        assert relative_error(case.attention(emulated), case.exact_attention()) < tolerances.CUDA[torch.float16]


def test_the_first_token_is_read_as_it_is_stored(emulated):
    """One token that outweighs all others: its key and value in eight bits decide the result."""
    fmt = PageFormat.preset("oscar_large", 128)
    case = make_case(fmt, [(127, 1)], kv_heads=1, group=4, device="cpu")
    key, value = random_tokens(128, 1, fmt, torch.float16, torch.Generator().manual_seed(7), "cpu")
    key[0] *= 4
    case.cache.pages[int(case.step.page_table[0, 0])] = encode_page(key, value, fmt, first=True)
    case.step.seq_lens.fill_(129)
    case.step.ring_start.fill_(128)
    case.query = key[0].expand_as(case.query).contiguous()
    case.key, case.value = torch.zeros_like(case.key), torch.zeros_like(case.value)
    out = case.attention(emulated)
    assert relative_error(out, value[0].expand_as(out)) < 2e-2
    assert relative_error(out, case.exact_attention()) < 3e-3


@pytest.mark.parametrize("warps", (0, 1, 2, 3))
@pytest.mark.parametrize("context", (1, 30, 90, 140))
def test_work_for_fewer_multiprocessors(emulated, context, warps):
    case = make_case(PageFormat.preset("oscar", 64), [(context, 1)], kv_heads=1, group=4, device="cpu")
    error = relative_error(case.attention(emulated, warps=warps), case.exact_attention())
    assert error < tolerances.CUDA[torch.float16]


@pytest.mark.parametrize("preset", ("oscar", "oscar_paper"))
def test_pages_taken_from_other_warps(emulated, preset, monkeypatch):
    """Blocks run one after the other here, so the first does nearly all that can be taken."""
    case = make_case(PageFormat.preset(preset, 64), [(6000, 2), (9, 1), (2900, 1)], kv_heads=1, device="cpu")
    expected = case.exact_attention()
    assert relative_error(case.attention(emulated, warps=2), expected) < tolerances.CUDA[torch.float16]
    assert emulated.thefts() >= 10
    monkeypatch.setenv("VLLM_OSCAR_DETERMINISTIC", "1")
    case.step = replace(case.step)  # another step: the variable is read once for each
    assert relative_error(case.attention(emulated, warps=2), expected) < tolerances.CUDA[torch.float16]
    assert emulated.thefts() == 0
    assert not cuda._memories[case.query.device].counters.any(), "the next launch expects zeros"


@pytest.mark.parametrize("preset", PRESETS)
def test_store_and_ring(emulated, preset):
    requests = [(0, 128), (127, 1), (120, 150), (255, 2), (300, 1), (1, 20)]
    case = make_case(PageFormat.preset(preset, 64), requests, dtype=torch.bfloat16, device="cpu")
    different = case.store(emulated) != case.store(reference_ops)
    assert different.float().mean() < tolerances.STORED_BYTES
    assert torch.equal(case.write_ring(emulated), case.write_ring(reference_ops))


@pytest.mark.parametrize("preset", ("oscar", "oscar_paper"))
def test_a_nan_stays_with_its_token(emulated, preset):
    fmt = PageFormat.preset(preset, 64)
    case = make_case(fmt, [(0, 128), (120, 150)], dtype=torch.bfloat16, device="cpu")
    for row, head, channel in ((0, 0, 3), (5, 1, 0), (128, 0, 63), (277, 1, 9)):
        case.key[row, head, channel] = float("nan")
        case.value[row, head, (channel + 7) % 64] = float("inf" if row == 5 else "nan")
    for which in ("pages", "ring"):
        got, expected = (
            case.store(ops) if which == "pages" else case.write_ring(ops) for ops in (emulated, reference_ops)
        )
        for page, want in zip(got.flatten(0, 1), expected.flatten(0, 1)):
            different = page != want
            assert different.float().mean() < 1e-2
            at = different.nonzero().flatten() // 2
            assert page.view(torch.half)[at].isnan().equal(want.view(torch.half)[at].isnan())


def test_offsets_of_another_layout_are_refused(emulated):
    """A kernel has its offsets compiled in: it must not run on pages that someone else lays out in another way."""
    names = "version k_codes k_high v_codes v_high k_params v_scale v_zero norms first_key first_value page_bytes"
    case = make_case(PageFormat.preset("oscar", 64), [(9, 1)], device="cpu")
    out = torch.empty_like(case.query)
    for name in [*names.split(), "int8_ring", "ring_tokens"]:
        cache = replace(case.cache, pages=case.cache.pages.clone())
        emulated.store_pages(case.step, cache, case.key, case.value)
        (struct,) = (found.format for found in cache.native.values())
        setattr(struct, name, 0 if name == "int8_ring" else getattr(struct, name) + 16)
        with pytest.raises(RuntimeError, match="oscar_store_pages"):
            emulated.store_pages(case.step, cache, case.key, case.value)
        with pytest.raises(RuntimeError, match="oscar_attention"):
            emulated.attention(case.step, cache, case.query, case.key, case.value, out)


# ---- workspace -----------------------------------------------------------------------
def limits(case, **rest) -> Limits:
    return Limits(
        query_heads=case.query.shape[1],
        kv_heads=case.cache.kv_heads,
        dtype=case.key.dtype,
        device=case.key.device,
        **rest,
    )


@pytest.mark.parametrize("group, requests", [(1, 1), (1, 80), (3, 80), (8, 2), (12, 80)])
@pytest.mark.parametrize("long_queries", (True, False))
def test_reserved_workspace_suffices_for_every_step(emulated, group, requests, long_queries):
    case = make_case(PageFormat.preset("oscar", 128), [(200, 1)], kv_heads=1, group=group, device="cpu")
    most = limits(case, requests=requests, tokens=500, decode_query_len=9)
    cuda.reserve(case.fmt, most, long_queries=long_queries)
    reserved = cuda._memories[case.key.device].workspace.numel()
    params = cuda.BINDING.attention(case.step, case.cache, case.query, case.key, case.value, case.query)
    needed = []
    for count in range(1, requests + 1):
        for longest in range(1, (most.tokens if long_queries else most.decode_query_len) + 1):
            params.step.requests = count
            needed.append(cuda._workspace_bytes(params, cuda._query_chunk(count, longest), -1))
    assert max(needed) == reserved


def test_nothing_moves_after_reserve(emulated, monkeypatch):
    fmt = PageFormat.preset("oscar", 64)
    steps = ([(9, 40)], [(200, 1)] * 6, [(1, 20), (3, 1)])
    cases = [make_case(fmt, requests, kv_heads=1, device="cpu") for requests in steps]
    cuda.reserve(fmt, limits(cases[0], requests=6, tokens=40, decode_query_len=1))
    memory = cuda._memories[cases[0].key.device]
    addresses = memory.workspace.data_ptr(), memory.counters.data_ptr()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # which nothing has to ask now
    for case in cases:
        assert relative_error(case.attention(emulated), case.exact_attention()) < tolerances.CUDA[torch.float16]
    assert addresses == (memory.workspace.data_ptr(), memory.counters.data_ptr())


def test_a_graph_that_needs_more_workspace_is_refused(emulated, monkeypatch):
    small, large = (
        make_case(PageFormat.preset("oscar", 64), [(20, 1)] * count, kv_heads=1, device="cpu") for count in (1, 40)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="workspace.*reserve"):
        small.attention(emulated)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    small.attention(emulated)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    small.step = replace(small.step)
    small.attention(emulated)
    with pytest.raises(RuntimeError, match="workspace.*reserve"):
        large.attention(emulated)
