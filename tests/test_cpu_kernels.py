# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels against the reference, on fresh random steps of every shape.

``OSCAR_TEST_SEED`` repeats a run; the seed is part of every failure message. The full
matrix is behind ``-m slow``.
"""

from __future__ import annotations

import os
import random
import zlib
from dataclasses import replace

import pytest
import torch

from benchmarks.kernel_cases import Case
from vllm_oscar.core import format, reference
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import cpu
from vllm_oscar.ops import reference as reference_ops
from vllm_oscar.ops.step import Cache, Limits, Step

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

SEED = int(os.environ.get("OSCAR_TEST_SEED", random.SystemRandom().randrange(1 << 31)))
ISAS = cpu.isas() if cpu.available()[0] else ()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Root mean square, relative: 16-bit queries and probabilities, then the model's own rounding.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def seeded(request):
    """A seed of its own for every test; printed when it fails."""
    seed = zlib.crc32(f"{SEED} {request.node.name}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    print(f"OSCAR_TEST_SEED={SEED}")


@pytest.fixture
def on_isa(monkeypatch):
    """``on_isa(name)`` selects an instruction set for the calls that follow."""

    def select(name: str) -> None:
        monkeypatch.setenv("OSCAR_CPU_ISA", name)
        cpu.isa.cache_clear()

    yield select
    cpu.isa.cache_clear()


class PoisonedCase(Case):
    """One step over a poisoned cache: history stored by the reference, new tokens random.

    ``requests``: (context, query_len, ring_start) each; ring_start None picks what the
    metadata builder would for a long-running request.
    """

    def __init__(self, requests, fmt: PageFormat, heads: int, group: int, dtype, *, lookahead: int = 0):
        self.requests, self.dtype, dim = requests, dtype, fmt.head_dim
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
        starts = []
        view = reference.ring_view(ring, fmt, dtype)
        for row, (context, new, start) in enumerate(requests):
            need = -(-(context + new) // PAGE_TOKENS)
            page_table[row, :need] = torch.tensor([free.pop() for _ in range(need)])
            ring_table[row, :ring_pages] = torch.tensor([ring_free.pop() for _ in range(ring_pages)])
            old_key = (torch.randn(context, heads, dim) * spread).to(dtype)
            old_value = (torch.randn(context, heads, dim) + 0.3).to(dtype)
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
                start = max(min(full * PAGE_TOKENS, max(context - PAGE_TOKENS, 0)), lowest)
            starts.append(start)
            held = torch.arange(min(start, full * PAGE_TOKENS), context)
            page, offset = reference.ring_slots(ring_table[row].expand(len(held), -1), held, view.shape[2], ring_pages)
            view[page, :, offset] = torch.stack([old_key[held], old_value[held]], 2)
        step = Step(
            query_start_loc=torch.tensor([0, *[new for _, new, _ in requests]]).cumsum(0).int(),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            page_table=page_table,
            ring_table=ring_table,
            ring_start=torch.tensor(starts, dtype=torch.int32),
            max_query_len=max(new for _, new, _ in requests),
        )
        super().__init__(step, Cache(pages, ring, ring_pages, fmt, dim**-0.5), query, key, value)

    def poison(self, byte: int) -> None:
        """Overwrite whatever this step must not read."""
        fmt, step, pages = self.fmt, self.step, self.cache.pages
        view = reference.ring_view(self.cache.ring, fmt, self.dtype)
        free_pages = torch.ones(len(pages), dtype=torch.bool)
        free_slots = torch.ones(view.shape[0], view.shape[2], dtype=torch.bool)
        for row, ((context, new, _), start) in enumerate(zip(self.requests, step.ring_start.tolist())):
            if not new:
                continue
            count = -(-start // PAGE_TOKENS)
            blocks = step.page_table[row, :count].long()
            free_pages[blocks] = False
            held = torch.arange(start, context)
            table = step.ring_table[row].expand(len(held), -1)
            free_slots[reference.ring_slots(table, held, view.shape[2], self.cache.ring_pages)] = False
            masked = torch.arange(PAGE_TOKENS) >= start - (count - 1) * PAGE_TOKENS
            if count and masked.any():  # parameters of the tokens that the ring replaces
                page = pages[blocks[-1]]
                names = ["v_scale", "v_zero"] + ["norms"] * (fmt.config.norm is not NormScope.NONE)
                for name in names:
                    groups = 1 if name == "norms" else fmt.value_groups
                    order = format.norm_order() if name == "norms" else format.value_param_order(groups, name)
                    halves = page[:, fmt.sections[name].slice].view(torch.int16)
                    halves[:, masked[order // groups]] = -1 if byte == 0xFF else byte
        pages[free_pages] = byte
        raw = view.view(torch.int16 if self.dtype.itemsize == 2 else torch.int32)
        raw.transpose(1, 2)[free_slots] = -1 if byte == 0xFF else byte


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype) -> None:
    assert torch.isfinite(out).all()
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


# (context, query_len, ring_start): lengths at block edges, ring partly over pages, decode,
# drafts, chunks, first prefill, absent requests.
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


def check_attention(preset: str, dim: int, dtype, heads: int, group: int, requests, on_isa) -> None:
    print(preset, dim, dtype, heads, group, requests)
    case = PoisonedCase(requests, PageFormat.preset(preset, dim), heads, group, dtype)
    case.poison(0xFF)
    expected = case.attention(reference_ops)
    for isa in ISAS:
        on_isa(isa)
        print(isa)
        assert_close(case.attention(cpu), expected, dtype)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_attention_matches_the_reference(preset, dim, on_isa):
    dtype, group = random.choice(list(DTYPES.values())), random.choice([1, 2, 3, 4, 5, 7, 8])
    check_attention(preset, dim, dtype, random.choice([1, 2, 3]), group, MIXED, on_isa)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,group", [(1, 1), (2, 3), (1, 4), (3, 5), (2, 8), (1, 16), (1, 40)])
def test_attention_on_the_full_matrix(preset, dim, dtype, heads, group, on_isa):
    check_attention(preset, dim, DTYPES[dtype], heads, group, MIXED, on_isa)


def test_attention_on_random_batches(on_isa):
    for _ in range(4):
        requests = []
        for _ in range(random.randint(1, 6)):
            context = random.choice([0, 1, 127, 128, 129, 255, 256, 383, 512, random.randint(0, 600)])
            requests.append((context, random.choice([0, 1, 1, 2, 3, 8, 17, random.randint(1, 200)]), None))
        requests.append((random.randint(0, 300), 1, None))
        check_attention(random.choice(list(PRESETS)), 64, torch.float32, 1, random.randint(1, 9), requests, on_isa)


def test_bits_do_not_depend_on_the_number_of_threads(on_isa):
    # Several splits of the pages, several row tiles, several heads.
    case = PoisonedCase(
        [(4500, 1, None), (2600, 5, None), (700, 150, None), (100, 60, None)],
        PageFormat.preset("oscar", 64),
        2,
        4,
        torch.float32,
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
def test_unused_memory_does_not_reach_outputs(preset, on_isa):
    dim, name = random.choice(SUPPORTED_HEAD_DIMS), random.choice(list(DTYPES))
    case = PoisonedCase(MIXED, PageFormat.preset(preset, dim), 2, 3, DTYPES[name])
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_request_cannot_spoil_another(bad, on_isa):
    fmt = PageFormat.preset(random.choice(list(PRESETS)), 64)
    requests = [(300, 2, None), (130, 126, None), (200, 9, None), (257, 1, None)]
    for isa in ISAS:
        on_isa(isa)
        case = PoisonedCase(requests, fmt, 2, 2, torch.bfloat16)
        good, good_pages = case.attention(cpu), case.store(cpu)
        begin, end = case.step.query_start_loc[1:3].tolist()
        for tensor in (case.query, case.key, case.value):
            tensor[begin:end] = bad
        case.cache.pages[case.step.page_table[1, :1].long()] = 0xFF
        out, pages = case.attention(cpu), case.store(cpu)
        others = torch.ones(len(out), dtype=torch.bool)
        others[begin:end] = False
        assert torch.equal(out[others], good[others])
        mine = torch.zeros(len(pages), dtype=torch.bool)
        mine[case.step.page_table[1, :2].long()] = True
        assert torch.equal(pages[~mine], good_pages[~mine])


def page_codes(pages: torch.Tensor, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value codes ``[pages, heads, 128, D]``."""
    flat = pages.flatten(0, 1)
    low, high, value = (flat[:, fmt.sections[name].slice] for name in ("k_codes", "k_high", "v_codes"))
    key = format.unpack_codes(low, high, fmt.config.key_bits, "key", fmt.head_dim)
    value = format.unpack_codes(value, value[:, :0], 2, "value", fmt.head_dim)
    return tuple(codes.unflatten(0, pages.shape[:2]) for codes in (key, value))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_stored_pages_match_the_reference(preset, dim, on_isa):
    dtype = random.choice(list(DTYPES.values()))
    fmt = PageFormat.preset(preset, dim)
    case = PoisonedCase([(0, 300, 0), (200, 57, None), (127, 1, 0), (100, 3, 0), (0, 0, 0)], fmt, 2, 1, dtype)
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
        if fmt.config.exact_first_key:  # a tie of its norm moves all of it
            place = fmt.first_key.slice
            a, b = (x[first][..., place].contiguous().view(torch.float16).float() for x in (got, want))
            assert (a - b).norm() < 1e-3 * b.norm()
            got[first, :, place] = want[first, :, place]
        for name, section in fmt.sections.items():
            differing = (got[..., section.slice] != want[..., section.slice]).float()
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


@pytest.mark.parametrize("name", DTYPES)
def test_ring_is_written_exactly(name, on_isa):
    fmt = PageFormat.preset("oscar", random.choice(SUPPORTED_HEAD_DIMS))
    case = PoisonedCase([(0, 700, 0), (500, 1, None), (140, 17, None), (0, 0, 0), (3, 40, 0)], fmt, 2, 2, DTYPES[name])
    assert torch.equal(case.write_ring(cpu), case.write_ring(reference_ops))


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


def test_an_unknown_instruction_set_is_refused_at_start_up(on_isa):
    on_isa("sse9")
    limits = Limits(1, 1, 1, 1, 1, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="OSCAR_CPU_ISA=sse9"):
        cpu.reserve(PageFormat.preset("oscar", 64), limits)
