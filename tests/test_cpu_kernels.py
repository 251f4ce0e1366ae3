# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels against the reference, on steps of every shape.

Random numbers are seeded by the test's name. The full matrix is behind ``-m slow``.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import tolerances
import torch

from benchmarks.kernel_cases import Case
from vllm_oscar.core import format, reference
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.ring import read_tokens, ring_slots, write_tokens
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.ops import cpu
from vllm_oscar.ops import reference as reference_ops
from vllm_oscar.ops.library import NativeLibraryError
from vllm_oscar.ops.step import Cache, Limits, Step

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

ISAS = cpu.isas() if cpu.available()[0] else ()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def seeded(request):
    """A seed of its own for every test."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def on_isa(monkeypatch, request):
    """``on_isa(name)`` selects an instruction set for the calls that follow; the summary names those that ran."""

    def select(name: str) -> None:
        monkeypatch.setenv("OSCAR_CPU_ISA", name)
        cpu.isa.cache_clear()
        request.node.user_properties.append(("isa", name))

    yield select
    cpu.isa.cache_clear()


class PoisonedCase(Case):
    """One step over a poisoned cache: history stored by the reference, new tokens random.

    ``requests``: (context, query_len, ring_start) each; ring_start None picks what the
    metadata builder would for a long-running request. ``softmax``: without it, plain attention.
    Values at the edges of sliding windows are large, so that one token too many or too few is noticed.
    """

    def __init__(
        self, requests, fmt: PageFormat, heads: int, group: int, dtype, softmax: Softmax | None = None, lookahead=0
    ):
        self.requests, self.dtype, dim = requests, dtype, fmt.head_dim
        softmax = softmax or Softmax(dim**-0.5)
        ring_pages = fmt.ring_pages(dtype.itemsize, lookahead)
        capacity = ring_pages * fmt.ring_tokens_per_page(dtype.itemsize)
        lens = [context + new for context, new, _ in requests]
        width = max(-(-n // PAGE_TOKENS) for n in lens) + 2
        blocks = sum(-(-n // PAGE_TOKENS) for n in lens) + 3
        pages = torch.full((blocks, heads, fmt.page_bytes), 0xFF, dtype=torch.uint8)
        # Heads of the ring are strided, as a slice of a larger pool would be.
        rows = len(requests) * ring_pages + 2
        ring = torch.full((rows, 2 * heads, fmt.page_bytes), 0xFF, dtype=torch.uint8)[:, ::2]
        free, ring_free = torch.randperm(blocks).tolist(), torch.randperm(rows).tolist()
        page_table = torch.full((len(requests), width), 2**30, dtype=torch.int32)
        ring_table = torch.full((len(requests), ring_pages + 1), -(2**30), dtype=torch.int32)
        tokens = sum(new for _, new, _ in requests)
        # Query, key and value are slices of one projection, as in vLLM, and padding follows them.
        qkv = torch.randn(tokens + 1, heads * (group + 2), dim).to(dtype)
        qkv[-1] = float("nan")
        query, key, value = qkv[:-1].split([heads * group, heads, heads], dim=1)
        spread = torch.linspace(0.2, 3.0, dim)
        key.mul_(spread.to(dtype))
        starts, begin = [], 0
        tokens_per_page = fmt.ring_tokens_per_page(dtype.itemsize)
        for row, (context, new, start) in enumerate(requests):
            need = -(-(context + new) // PAGE_TOKENS)
            page_table[row, :need] = torch.tensor([free.pop() for _ in range(need)])
            ring_table[row, :ring_pages] = torch.tensor([ring_free.pop() for _ in range(ring_pages)])
            old_key = (torch.randn(context, heads, dim) * spread).to(dtype)
            old_value = (torch.randn(context, heads, dim) + 0.3).to(dtype)
            if softmax.sliding_window is not None:
                # The last tokens that the queries do not see, and one that the last of them sees.
                edges = torch.arange(context, context + new + 1) - softmax.sliding_window
                edges = edges[edges >= 0]
                old_value[edges[edges < context]] *= 20
                value[begin + edges[edges >= context] - context] *= 20
            begin += new
            full = context // PAGE_TOKENS
            if full:
                index = torch.arange(full)
                pages[page_table[row, :full].long()] = reference.encode_pages(
                    old_key[: full * PAGE_TOKENS].unflatten(0, (full, PAGE_TOKENS)),
                    old_value[: full * PAGE_TOKENS].unflatten(0, (full, PAGE_TOKENS)),
                    fmt,
                    index == 0,
                )
            lowest = max(0, context - capacity)
            if start is None:
                start = max(min(full * PAGE_TOKENS, max(context - (fmt.config.window or PAGE_TOKENS), 0)), lowest)
            starts.append(start)
            held = torch.arange(min(start, full * PAGE_TOKENS), context)
            at = ring_slots(ring_table[row].expand(len(held), -1), held, tokens_per_page, ring_pages)
            write_tokens(ring, fmt, *at, old_key[held], old_value[held])
        step = Step(
            query_start_loc=torch.tensor([0, *[new for _, new, _ in requests]]).cumsum(0).int(),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            page_table=page_table,
            ring_table=ring_table,
            ring_start=torch.tensor(starts, dtype=torch.int32),
            max_query_len=max(new for _, new, _ in requests),
        )
        super().__init__(step, Cache(pages, ring, ring_pages, fmt, softmax), query, key, value)

    def poison(self, byte: int) -> None:
        """Overwrite whatever this step must not read."""
        fmt, step, pages = self.fmt, self.step, self.cache.pages
        ring, tokens_per_page = self.cache.ring, fmt.ring_tokens_per_page(self.dtype.itemsize)
        softmax = self.cache.softmax
        free_pages = torch.ones(len(pages), dtype=torch.bool)
        kept = torch.full_like(ring, byte)
        for row, ((context, new, _), start) in enumerate(zip(self.requests, step.ring_start.tolist())):
            if not new:
                continue
            first = softmax.first_visible(context)
            used = torch.arange(first // PAGE_TOKENS, -(-start // PAGE_TOKENS)) if start > first else torch.arange(0)
            unused = torch.ones(step.page_table.shape[1], dtype=torch.bool)
            unused[used] = False
            step.page_table[row, unused] = -(2**30) if byte else 2**30
            blocks = step.page_table[row, used].long()
            free_pages[blocks] = False
            held = torch.arange(max(start, first), context)
            table = step.ring_table[row].expand(len(held), -1)
            at = ring_slots(table, held, tokens_per_page, self.cache.ring_pages)
            write_tokens(kept, fmt, *at, *read_tokens(ring, fmt, *at, self.dtype))
            for index, block in zip(used.tolist(), blocks.tolist()):
                # Parameters of the tokens that the ring replaces, and of those that no token of the step sees.
                position, page = torch.arange(PAGE_TOKENS) + index * PAGE_TOKENS, pages[block]
                masked = (position >= start) | (position < first)
                names = ["v_scale", "v_zero"] + ["norms"] * (fmt.config.norm is not NormScope.NONE)
                for name in names:
                    groups = 1 if name == "norms" else fmt.value_groups
                    order = format.norm_order() if name == "norms" else format.value_param_order(groups, name)
                    halves = page[:, fmt.sections[name].slice].view(torch.int16)
                    halves[:, masked[order // groups]] = -1 if byte == 0xFF else byte
        pages[free_pages] = byte
        ring.copy_(kept)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype) -> None:
    assert torch.isfinite(out).all()
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < tolerances.CPU[dtype], f"relative error {error:.2e}"


# (context, query_len, ring_start): lengths at block edges, ring partly over pages (of the first page,
# the first token alone), decode, drafts, chunks, first prefill, absent requests.
MIXED = [
    (128, 1, None),
    (257, 1, None),
    (700, 1, None),
    (129, 2, 1),
    (127, 1, None),
    (0, 0, 0),
    (300, 5, 250),
    (0, 1, 0),
    (0, 9, 0),
    (384, 130, 384),
    (130, 17, None),
    (256, 3, 256),
]


# The model of a head size, where a test has one: dtype, KV heads, query heads of each.
SHAPES = {
    64: (torch.float32, 2, 4),
    80: (torch.bfloat16, 2, 3),
    96: (torch.float16, 3, 1),
    112: (torch.bfloat16, 1, 7),
    128: (torch.bfloat16, 2, 5),
    192: (torch.float16, 1, 8),
    256: (torch.float32, 1, 2),
}

BATCHES = {
    "one request without history": [(0, 200, None)],
    "pages and nothing else": [(512, 1, 512), (128, 8, 128)],
    "block by block": [(0, 128, 0), (128, 128, 128), (256, 256, 256)],
    "a window longer than the context": [(100, 1, 0), (255, 3, 0), (256, 1, 0)],
    "a window inside one page": [(383, 1, 200), (600, 2, 500)],
    "one token more than a split of the pages": [(2304, 1, 2176), (2305, 1, None)],
    "many rows, and the ring over the pages": [(500, 150, None), (300, 140, 44)],
    "many small requests": [(n, 1, None) for n in (0, 1, 2, 126, 127, 128, 129, 130, 254, 255, 256, 257, 258)],
}


def check_attention(preset, dim: int, dtype, heads: int, group: int, requests, on_isa, softmax=None) -> None:
    case = PoisonedCase(requests, PageFormat.preset(preset, dim), heads, group, dtype, softmax)
    case.poison(0xFF)
    expected = case.attention(reference_ops)
    for isa in ISAS:
        on_isa(isa)
        print(isa)
        assert_close(case.attention(cpu), expected, dtype)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_attention_matches_the_reference(preset, dim, on_isa):
    check_attention(preset, dim, *SHAPES[dim], MIXED, on_isa)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,group", [(1, 1), (2, 3), (1, 4), (3, 5), (2, 8), (1, 16), (1, 40)])
def test_attention_on_the_full_matrix(preset, dim, dtype, heads, group, on_isa):
    check_attention(preset, dim, DTYPES[dtype], heads, group, MIXED, on_isa)


@pytest.mark.parametrize("preset", ["oscar", "oscar_4bit", "oscar_paper"])
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_on_batches(preset, batch, on_isa):
    fmt = PageFormat.preset(preset, 64)
    capacity = fmt.ring_pages(4) * fmt.ring_tokens_per_page(4)
    requests = [(c, n, start and max(start, c - capacity)) for c, n, start in BATCHES[batch]]
    check_attention(preset, 64, torch.float32, 1, 6, requests, on_isa)


# What a model may do between logits and weights. Sinks: from one that weighs nothing to one that weighs nearly all.
SOFTMAX = {
    "plain": {},
    "sinks": {"sinks": True},
    "soft-cap": {"soft_cap": 3.0},
    "a high soft-cap": {"soft_cap": 50.0},
    "sinks and soft-cap": {"sinks": True, "soft_cap": 3.0},
}


def softmax_of(name: str, dim: int, query_heads: int, sliding_window: int | None) -> Softmax:
    options = dict(SOFTMAX[name])
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-2.0, 12.0, query_heads)[torch.randperm(query_heads)]
    return Softmax(dim**-0.5, sliding_window=sliding_window, **options)


def windowed_requests(sliding_window: int) -> list[tuple[int, int, int | None]]:
    """Windows that begin before the context, at edges and in the middle of pages, in the ring, and in the step.

    Query lengths 1 to 16, and chunks longer and shorter than the window; every third request reads from the
    ring only what no page holds, as after a prefix hit.
    """
    w = sliding_window
    contexts = [0, w - 1, w, w + 1, w + 63, w + 64, w + 127, w + 128, w + 129, w + 300, w + 511, 200, 383, 640, 1000, 1]
    requests = [(n, i + 1, n // PAGE_TOKENS * PAGE_TOKENS if i % 3 == 0 else None) for i, n in enumerate(contexts)]
    return [*requests, (w + 77, 300, None), (0, 300, 0), (256, 129, 256)]


@pytest.mark.parametrize("preset", ["oscar", "oscar_paper"])
@pytest.mark.parametrize("sliding_window", [1, 127, 128, 129, 200, 1024])
def test_sliding_windows_match_the_reference(preset, sliding_window, on_isa):
    softmax = softmax_of("sinks", 64, 4, sliding_window)
    requests = windowed_requests(sliding_window)
    check_attention(preset, 64, torch.bfloat16, 1, 4, requests, on_isa, softmax)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("sliding_window", [None, 300])
def test_sinks_and_soft_caps_match_the_reference(name, dim, sliding_window, on_isa):
    dtype, heads, group = SHAPES[dim]
    softmax = softmax_of(name, dim, heads * group, sliding_window)
    check_attention("oscar", dim, dtype, heads, group, MIXED, on_isa, softmax)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["oscar", "oscar_paper"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,group", [(1, 1), (2, 3), (1, 5), (1, 8), (1, 16)])
@pytest.mark.parametrize("sliding_window", [1, 127, 128, 129, 200, 1024, 4096])
def test_sliding_windows_on_the_full_matrix(preset, dim, dtype, heads, group, sliding_window, on_isa):
    softmax = softmax_of("sinks and soft-cap" if group % 2 else "sinks", dim, heads * group, sliding_window)
    requests = windowed_requests(sliding_window)
    check_attention(preset, dim, DTYPES[dtype], heads, group, requests, on_isa, softmax)


@pytest.mark.parametrize("sliding_window", [1, 127, 128, 129, 200, 1024, 4096])
@pytest.mark.parametrize("error", [-1, 1])
def test_a_window_off_by_one_is_noticed(sliding_window, error):
    """The bound of these tests, on the batch of these tests, is tight enough for one token of thousands."""
    if sliding_window + error < 1:
        return
    requests = windowed_requests(sliding_window)
    case = PoisonedCase(requests, PageFormat.preset("oscar", 64), 1, 4, torch.bfloat16, Softmax(0.125, sliding_window))
    expected = case.attention(reference_ops)
    cache = replace(case.cache, softmax=Softmax(0.125, sliding_window + error))
    wrong = Case(case.step, cache, case.query, case.key, case.value)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(wrong.attention(cpu), expected, torch.bfloat16)


@pytest.mark.parametrize("sliding_window", [None, 2300])
def test_bits_do_not_depend_on_the_number_of_threads(sliding_window, on_isa):
    # Several splits of the pages, several row tiles, several heads.
    case = PoisonedCase(
        [(4500, 1, None), (2600, 5, None), (700, 150, None), (100, 60, None)],
        PageFormat.preset("oscar", 64),
        2,
        4,
        torch.float32,
        softmax_of("sinks", 64, 8, sliding_window),
    )
    before, outputs, pages = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            outputs.append(case.attention(cpu))
            pages.append(case.store(cpu))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, outputs[0]) for x in outputs)
    assert all(torch.equal(x, pages[0]) for x in pages)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sliding_window", [None, 1, 200])
def test_unused_memory_does_not_reach_outputs(preset, sliding_window, on_isa):
    requests = MIXED if sliding_window is None else windowed_requests(sliding_window)
    case = PoisonedCase(
        requests, PageFormat.preset(preset, 80), 2, 3, torch.bfloat16, Softmax(80**-0.5, sliding_window)
    )
    case.poison(0x00)
    clean = {}
    for isa in ISAS:
        on_isa(isa)
        clean[isa] = case.attention(cpu)
    for byte in (0xFF, 0x7C, 0x7F):  # NaN in every type, then huge numbers
        case.poison(byte)
        for isa in ISAS:
            on_isa(isa)
            assert torch.equal(case.attention(cpu), clean[isa])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_request_cannot_spoil_another(preset, bad, on_isa):
    """Tokens, pages and ring of one request: NaN, and in the ring NaN scales or elements."""
    fmt = PageFormat.preset(preset, 64)
    requests = [(300, 2, None), (130, 126, None), (200, 9, None), (257, 1, None)]
    for isa in ISAS:
        on_isa(isa)
        case = PoisonedCase(requests, fmt, 2, 2, torch.bfloat16)
        good = case.attention(cpu), case.store(cpu), case.write_ring(cpu)
        begin, end = case.step.query_start_loc[1:3].tolist()
        for tensor in (case.query, case.key, case.value):
            tensor[begin:end] = bad
        my_pages = case.step.page_table[1, :2].long()
        my_ring = case.step.ring_table[1, : case.cache.ring_pages].long()
        case.cache.pages[my_pages[:1]] = 0xFF
        case.cache.ring[my_ring] = 0xFF
        bad_ones = case.attention(cpu), case.store(cpu), case.write_ring(cpu)
        for mine, got, want in zip((slice(begin, end), my_pages, my_ring), bad_ones, good):
            others = torch.ones(len(got), dtype=torch.bool)
            others[mine] = False
            assert torch.equal(got[others], want[others])
            assert not torch.equal(got[~others], want[~others])


@pytest.mark.parametrize("where", ["key", "value"])
def test_a_bad_token_of_the_ring_reaches_only_its_request(where, on_isa):
    """One NaN in one token of the int8 ring, as written by write_ring, and read by decode, chunk and store."""
    fmt = PageFormat.preset("oscar", 64)
    dtype, ring_pages = torch.bfloat16, fmt.ring_pages(2)
    lengths, new = torch.tensor([60, 60, 60]), torch.tensor([1, 1, 80])
    tokens = lambda n: torch.randn(n, 2, 64).to(dtype)  # noqa: E731
    key, value = tokens(180), tokens(180)
    (key if where == "key" else value)[70, 1, 5] = float("nan")  # the second request, head 1

    def step(context, count):
        starts = torch.cat([torch.zeros(1), count.cumsum(0)]).int()
        tables = torch.arange(3).view(3, 1).int(), torch.arange(3 * ring_pages).view(3, -1).int()
        return Step(starts, (context + count).int(), *tables, torch.zeros(3).int(), int(count.max()))

    for isa in ISAS:
        on_isa(isa)
        zeros = [torch.zeros(n, 2, fmt.page_bytes, dtype=torch.uint8) for n in (3, 3 * ring_pages)]
        cache = Cache(*zeros, ring_pages, fmt, Softmax(0.125))
        cpu.write_ring(step(torch.zeros(3).long(), lengths), cache, key, value)
        following = Case(step(lengths, new), cache, torch.randn(82, 4, 64).to(dtype), tokens(82), tokens(82))
        out = following.attention(cpu)
        assert out[1, 2:].isnan().all()  # its query heads
        out[1, 2:] = 0
        assert out.isfinite().all()
        assert torch.isfinite(following.store(cpu)[2].view(torch.half)[:, fmt.sections["norms"].offset // 2 :]).all()


def page_codes(pages: torch.Tensor, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value codes ``[pages, heads, 128, D]``."""
    flat = pages.flatten(0, 1)
    codes = []
    for letter, bits, operand in (("k", fmt.config.key_bits, "key"), ("v", fmt.config.value_bits, "value")):
        planes = (flat[:, fmt.sections[f"{letter}_{plane}"].slice] for plane in ("codes", "high"))
        codes.append(format.unpack_codes(*planes, bits, operand, fmt.head_dim).unflatten(0, pages.shape[:2]))
    return tuple(codes)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_stored_pages_match_the_reference(preset, dim, on_isa):
    fmt = PageFormat.preset(preset, dim)
    requests = [(0, 300, 0), (200, 57, None), (127, 1, 0), (100, 3, 0), (0, 0, 0)]
    case = PoisonedCase(requests, fmt, 2, 1, SHAPES[dim][0])
    expected = case.store(reference_ops)
    touched = (expected != case.cache.pages).flatten(1).any(1)
    assert touched.sum() == 4
    starts = {int(case.step.page_table[row, 0]) for row in range(len(case.requests))}
    first = torch.tensor([int(block) in starts for block in touched.nonzero()])
    expected_values = reference.decode_pages_rotated(expected[touched], fmt, first)
    for isa in ISAS:
        on_isa(isa)
        pages = case.store(cpu)
        assert torch.equal(pages[~touched], case.cache.pages[~touched])
        got, want = pages[touched], expected[touched]
        # Sums in another order put what is on a rounding tie on the other side: a few parameters
        # by one unit, a few codes by one step. Nothing else may differ.
        if fmt.config.first_token:
            key, value = fmt.first_key.slice, fmt.first_value.slice
            for place, kind in ((key, torch.int8), (value, torch.uint8)):
                a, b = (x[first][..., place].contiguous().view(kind).int() for x in (got, want))
                assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 1e-2
        # A key scale on a tie changes the gains of a whole group: norms are compared where the scales are the same.
        params = fmt.sections["k_params"].slice
        same = (got[..., params] == want[..., params]).all(-1) | (not fmt.config.key_gain)
        assert same.any()
        for name, section in fmt.sections.items():
            differing = (got[..., section.slice] != want[..., section.slice]).float()
            differing = differing[same] if name == "norms" else differing
            if differing.numel():
                assert differing.mean() < 2e-3, f"{isa}: {differing.mean():.2e} of {name} differ"
        assert torch.equal(got[..., fmt.sections["norms"].end :], want[..., fmt.sections["norms"].end :])
        decoded = reference.decode_pages_rotated(got, fmt, first)
        for got_codes, want_codes, x, y in zip(page_codes(got, fmt), page_codes(want, fmt), decoded, expected_values):
            steps = (got_codes - want_codes).abs()
            assert steps.max() <= 1 and (steps > 0).float().mean() < 2e-3
            # A tie moves a code, or an integer zero and with it a value whose code was cut off at the end.
            tie = (x - y).abs() > 0.1 * y.square().mean().sqrt()
            assert tie.float().mean() < 2e-3
            assert (x - y)[~tie].norm() / y.norm() < 2e-3


@pytest.mark.parametrize("preset", ["oscar", "oscar_paper"])
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("name", DTYPES)
def test_ring_is_written_exactly(preset, dim, name, on_isa):
    fmt = PageFormat.preset(preset, dim)
    case = PoisonedCase([(0, 700, 0), (500, 1, None), (140, 17, None), (0, 0, 0), (3, 40, 0)], fmt, 2, 2, DTYPES[name])
    expected = case.write_ring(reference_ops)
    for isa in ISAS:
        on_isa(isa)
        assert torch.equal(case.write_ring(cpu), expected), isa


# Channels of a token, in fp32, and what the int8 ring makes of them: the scale, then the bytes.
INT8_TOKENS = {
    "ties go to even": ([127.0, 0.5, 1.5, -0.5, -2.5, 2.500001], 1.0, [127, 0, 2, 0, -2, 3]),
    "the smallest is not -128": ([-127.0, 127.0], 1.0, [-127, 127]),
    "zeros": ([0.0, -0.0], 0.0, [0, 0]),
    "NaN": ([1.0, float("nan")], float("nan"), [0, 0]),
    "infinity saturates": ([float("inf"), float("-inf"), 1.0], 65504.0, [127, -127, 0]),
    "too large for an fp16 scale": ([-1e30, 65504.0, 65504.0 * 3], 65504.0, [-127, 1, 3]),
    "a scale that fp16 rounds down": ([2.0**-24 * 127 * 1.4, 2.0**-24 * 3.5], 2.0**-24, [127, 4]),
    "too small for an fp16 scale": ([1e-9, -1e-9], 0.0, [0, 0]),
}


@pytest.mark.parametrize("name", INT8_TOKENS)
def test_int8_ring_of_special_tokens(name, on_isa):
    channels, scale, expected = INT8_TOKENS[name]
    fmt = PageFormat.preset("oscar", 64)
    case = PoisonedCase([(5, 3, 0)], fmt, 1, 1, torch.float32)
    for i, tensor in enumerate((case.key, case.value)):
        tensor.zero_()
        tensor[1, 0, 7 * i : 7 * i + len(channels)] = torch.tensor(channels)
    for isa in ISAS:
        on_isa(isa)
        ring = case.write_ring(cpu)
        assert torch.equal(ring, case.write_ring(reference_ops)), isa
        page = ring[case.step.ring_table[0, 0], 0]
        at = 6 * 2 * 64  # position 5 + 1
        assert page[at : at + len(channels)].view(torch.int8).tolist() == expected
        at = fmt.ring_tokens_per_page(4) * 2 * 64 + 6 * 4
        assert page[at : at + 4].view(torch.half).tolist() == pytest.approx([scale, scale], rel=0, nan_ok=True)


# What is wrong with which argument, and what the refusal names.
WRONG = {
    "query heads": ("query", lambda x: x[:, :3], "query heads"),
    "query dtype": ("query", lambda x: x.half(), "query"),
    "model dtype": ("key", lambda x: x.double(), "float64"),
    "value dtype": ("value", lambda x: x.half(), "value"),
    "value rows": ("value", lambda x: x[:1], "value"),
    "value stride": ("value", lambda x: x.mT.contiguous().mT, "value"),
    "page bytes": ("cache.pages", lambda x: x[:, :, 1:], "pages"),
    "ring heads": ("cache.ring", lambda x: x[:, :1], "ring"),
    "page table dtype": ("step.page_table", lambda x: x.long(), "page_table"),
    "ring table columns": ("step.ring_table", lambda x: x[:, :1], "ring_table"),
    "lengths dtype": ("step.seq_lens", lambda x: x.long(), "seq_lens"),
    "ring start rows": ("step.ring_start", lambda x: x[:0], "ring_start"),
    "query start rows": ("step.query_start_loc", lambda x: x[:1], "query_start_loc"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    good = PoisonedCase([(130, 2, None)], PageFormat.preset("oscar", 64), 2, 2, torch.float32)
    field, change, message = WRONG[name]
    owner, _, field = field.rpartition(".")
    case = Case(good.step, good.cache, good.query, good.key, good.value)
    part = getattr(case, owner) if owner else case
    part = replace(part, **{field: change(getattr(part, field))})
    case = replace(case, **{owner: part}) if owner else part
    with pytest.raises(ValueError, match=message):
        case.attention(cpu)
    if field != "query":
        with pytest.raises(ValueError, match=message):
            case.store(cpu)


def test_a_library_of_another_format_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "FORMAT_VERSION", format.FORMAT_VERSION + 1)
    with pytest.raises(NativeLibraryError, match="has another interface than this package"):
        cpu._library.__wrapped__()


def test_an_unknown_instruction_set_is_refused_at_start_up(on_isa):
    on_isa("sse9")
    limits = Limits(1, 1, 1, 1, 1, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="OSCAR_CPU_ISA=sse9"):
        cpu.reserve(PageFormat.preset("oscar", 64), limits)
