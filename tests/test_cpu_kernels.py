# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels against the reference, on fresh random steps of every shape.

``OSCAR_TEST_SEED`` repeats a run; the seed is part of every failure message. The full
matrix is behind ``-m slow``.
"""

from __future__ import annotations

import os
import random
import zlib

import pytest
import torch

from vllm_oscar.core import format, reference
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import cpu
from vllm_oscar.ops import reference as ops

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
    return lambda name: monkeypatch.setenv("OSCAR_CPU_ISA", name)


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

    def poison(self, byte: int) -> None:
        """Overwrite whatever this step must not read."""
        fmt, view = self.fmt, reference.ring_view(self.ring, self.fmt, self.dtype)
        free_pages = torch.ones(len(self.pages), dtype=torch.bool)
        free_slots = torch.ones(view.shape[0], view.shape[2], dtype=torch.bool)
        for row, ((context, new, _), start) in enumerate(zip(self.requests, self.ring_start.tolist())):
            if not new:
                continue
            count = -(-start // PAGE_TOKENS)
            blocks = self.block_table[row, :count].long()
            free_pages[blocks] = False
            held = torch.arange(start, context)
            table = self.ring_table[row].expand(len(held), -1)
            free_slots[reference.ring_slots(table, held, view.shape[2], self.ring_pages)] = False
            masked = torch.arange(PAGE_TOKENS) >= start - (count - 1) * PAGE_TOKENS
            if count and masked.any():  # parameters of the tokens that the ring replaces
                page = self.pages[blocks[-1]]
                names = ["v_scale", "v_zero"] + ["norms"] * (fmt.config.norm is not NormScope.NONE)
                for name in names:
                    groups = 1 if name == "norms" else fmt.value_groups
                    order = format.norm_order() if name == "norms" else format.value_param_order(groups, name)
                    halves = page[:, fmt.sections[name].slice].view(torch.int16)
                    halves[:, masked[order // groups]] = -1 if byte == 0xFF else byte
        self.pages[free_pages] = byte
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
    step = Step(requests, PageFormat.preset(preset, dim), heads, group, dtype)
    step.poison(0xFF)
    expected = step.attend(ops)
    for isa in ISAS:
        on_isa(isa)
        print(isa)
        assert_close(step.attend(cpu), expected, dtype)


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
    step = Step(
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
            outputs.append(step.attend(cpu))
            pages.append(step.store(cpu))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, outputs[0]) for x in outputs)
    assert all(torch.equal(x, pages[0]) for x in pages)


@pytest.mark.parametrize("preset", PRESETS)
def test_unused_memory_does_not_reach_outputs(preset, on_isa):
    dim, name = random.choice(SUPPORTED_HEAD_DIMS), random.choice(list(DTYPES))
    step = Step(MIXED, PageFormat.preset(preset, dim), 2, 3, DTYPES[name])
    step.poison(0x00)
    clean = {}
    for isa in ISAS:
        on_isa(isa)
        clean[isa] = step.attend(cpu)
    for byte in (0xFF, 0x7C, 0x7F):  # NaN in every type, then huge numbers
        step.poison(byte)
        for isa in ISAS:
            on_isa(isa)
            assert torch.equal(step.attend(cpu), clean[isa])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_request_cannot_spoil_another(bad, on_isa):
    fmt = PageFormat.preset(random.choice(list(PRESETS)), 64)
    requests = [(300, 2, None), (130, 126, None), (200, 9, None), (257, 1, None)]
    for isa in ISAS:
        on_isa(isa)
        step = Step(requests, fmt, 2, 2, torch.bfloat16)
        good, good_pages = step.attend(cpu), step.store(cpu)
        begin, end = step.query_start_loc[1:3].tolist()
        for tensor in (step.query, step.key, step.value):
            tensor[begin:end] = bad
        step.pages[step.block_table[1, :1].long()] = 0xFF
        out, pages = step.attend(cpu), step.store(cpu)
        others = torch.ones(len(out), dtype=torch.bool)
        others[begin:end] = False
        assert torch.equal(out[others], good[others])
        mine = torch.zeros(len(pages), dtype=torch.bool)
        mine[step.block_table[1, :2].long()] = True
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
    step = Step([(0, 300, 0), (200, 57, None), (127, 1, 0), (100, 3, 0), (0, 0, 0)], fmt, 2, 1, dtype)
    expected = step.store(ops)
    touched = (expected != step.pages).flatten(1).any(1)
    assert touched.sum() == 4
    starts = {int(step.block_table[row, 0]) for row in range(len(step.requests))}
    first = torch.tensor([int(block) in starts for block in touched.nonzero()])
    expected_values = reference.decode_pages_rotated(expected[touched], fmt, first)
    for isa in ISAS:
        on_isa(isa)
        pages = step.store(cpu)
        assert torch.equal(pages[~touched], step.pages[~touched])
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
    step = Step([(0, 700, 0), (500, 1, None), (140, 17, None), (0, 0, 0), (3, 40, 0)], fmt, 2, 2, DTYPES[name])
    assert torch.equal(step.keep(cpu), step.keep(ops))


def test_wrong_arguments_are_refused():
    step = Step([(130, 2, None)], PageFormat.preset("oscar", 64), 2, 2, torch.float32)
    good = dict(step.__dict__)
    for name, value in {
        "query": step.query[:, :3],
        "key": step.key.double(),
        "value": step.value.half(),
        "pages": step.pages[:, :, 1:],
        "block_table": step.block_table.long(),
        "ring_table": step.ring_table[:, :1],
        "seq_lens": step.seq_lens.long(),
        "ring_start": step.ring_start[:0],
        "query_start_loc": step.query_start_loc[:1].repeat(2).long(),
    }.items():
        step.__dict__.update(good | {name: value})
        with pytest.raises(ValueError, match="."):
            step.attend(cpu)
