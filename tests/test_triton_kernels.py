# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter, against the reference operations."""

import importlib.util
import inspect
import os
import subprocess
import sys
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
# Triton decides when it is imported. TRITON_INTERPRET=0 runs this file on a GPU instead.
LATE = "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
os.environ.setdefault("TRITON_INTERPRET", "1")

import tolerances  # noqa: E402
import torch  # noqa: E402
from triton_batch import DEVICE, Batch  # noqa: E402

from vllm_oscar.core import reference  # noqa: E402
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope, OscarConfig, ParamType  # noqa: E402
from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.core.ring import RingType  # noqa: E402
from vllm_oscar.core.softmax import Softmax  # noqa: E402
from vllm_oscar.ops import reference as expected_ops  # noqa: E402
from vllm_oscar.ops import triton as ops  # noqa: E402
from vllm_oscar.ops.step import Cache, Limits, Step  # noqa: E402

if os.environ["TRITON_INTERPRET"] == "1":
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor, scope):
        """Loop bounds are arrays of one element, which numpy 2.4 does not convert to int any more."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_index
    _patch_language, tl = interpreter._patch_lang, interpreter.tl

    def _patch_once(function):
        """Triton patches its language again at every call of a device function, which is a third of all time."""
        modules = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        return _patch_language(function) if any(tl.core.is_builtin(module.load) for module in modules) else None

    interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def _interpreted(request):
    if LATE and request.node.name != "test_in_a_fresh_process":
        pytest.skip("triton was already imported for a GPU; test_in_a_fresh_process runs this test")


@pytest.mark.skipif(not LATE, reason="this process is fresh enough")
def test_in_a_fresh_process(request):
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-m", request.config.option.markexpr or "not slow"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


def check_attention(batch):
    expected, actual = batch.attention(expected_ops), batch.attention(ops)
    bound = tolerances.TRITON[batch.dtype]
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def check_store(batch):
    """Equal bytes up to rounding ties, and nothing but the completed blocks changes."""
    expected, actual = batch.store(expected_ops), batch.store(ops)
    written = (expected != batch.pages).flatten(1).any(1)
    assert written.any()
    assert torch.equal(expected[~written], actual[~written])
    differs = (expected[written] != actual[written]).float().mean()
    assert differs < 1e-3, f"{differs:.2%} of the bytes differ"


def check_ring(batch):
    assert torch.equal(batch.write_ring(expected_ops), batch.write_ring(ops))


# ---- sampled cases: every preset, head size, type and query shape at least once ------------
EDGES = [(300, 1, 130), (0, 3, 0), (128, 1, 0), (40, 0, 0), (255, 1, 140)]
CASES = {
    "decode": ("oscar", 64, "bfloat16", 4, EDGES),
    "decode_small": ("oscar_small", 80, "float16", 1, [(129, 1, 1), (256, 1, 137)]),
    "decode_large": ("oscar_large", 112, "float32", 2, [(257, 1, 100)]),
    "decode_paper": ("oscar_paper", 96, "float32", 3, [(200, 1, 0)]),
    "decode_192": ("oscar_4bit", 192, "float32", 1, [(133, 1, 0)]),
    "decode_256": ("oscar_paper", 256, "bfloat16", 2, [(133, 1, 5)]),
    "decode_128": ("oscar_small", 128, "float32", 16, [(140, 1, 12)]),
    "verify": ("oscar", 64, "float32", 4, [(250, 5, 122), (5, 16, 5), (200, 2, 72)]),
    "verify_gqa1": ("oscar_large", 64, "bfloat16", 1, [(384, 4, 128), (129, 16, 129)]),
    "mixed": ("oscar", 64, "float16", 2, [(260, 1, 128), (130, 17, 128), (20, 16, 20), (0, 0, 0), (0, 33, 0)]),
    "chunk": ("oscar", 64, "float32", 1, [(200, 200, 128)]),
    "chunk_small": ("oscar_small", 96, "bfloat16", 3, [(256, 20, 0)]),
    "chunk_large": ("oscar_large", 80, "float32", 1, [(150, 20, 30)]),
    "chunk_4bit": ("oscar_4bit", 80, "bfloat16", 2, [(257, 18, 0)]),
    "chunk_paper": ("oscar_paper", 64, "float16", 2, [(140, 18, 0)]),
}


def make(name, group=None, **changes):
    preset, dim, dtype, ratio, requests = CASES[name]
    return Batch(PageFormat.preset(preset, dim), requests, group=group or ratio, dtype=getattr(torch, dtype), **changes)


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    check_attention(make(name, pad_tokens=3 if name == "decode" else 0))


@pytest.mark.parametrize("name", CASES)
def test_write_ring(name):
    check_ring(make(name, heads=3, group=1, pad_tokens=2))


STORES = {
    "oscar": [(0, 128, 0), (127, 1, 127), (130, 126, 2), (60, 60, 60), (7, 0, 0), (100, 300, 100)],
    "oscar_small": [(255, 1, 127), (0, 257, 0)],
    "oscar_large": [(120, 8, 120), (128, 128, 0)],
    "oscar_4bit": [(120, 8, 120), (128, 128, 0)],
    "oscar_paper": [(120, 8, 120), (128, 128, 0)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset,dim", list(zip(STORES, (64, 80, 112, 64, 128), strict=True)))
def test_store(preset, dim, dtype):
    check_store(Batch(PageFormat.preset(preset, dim), STORES[preset], dtype=dtype, group=1, pad_tokens=5))


@pytest.mark.parametrize("dim", [96, 192, 256])
def test_store_wide(dim):
    check_store(Batch(PageFormat.preset("oscar", dim), [(120, 136, 120)], dtype=torch.float16, heads=1, group=1))


# ---- formats that no preset has -----------------------------------------------------------
NO_NORM = dict(norm=NormScope.NONE, key_gain=False, first_token=False)
FP16 = dict(key_param=ParamType.FP16)
FORMATS = [
    OscarConfig("a", key_bits=3, key_group=128, value_bits=3, value_group=32, first_token=False, window=0),
    OscarConfig("b", key_bits=3, key_group=32, value_bits=4, value_group=32, **NO_NORM, **FP16),
    OscarConfig("c", key_bits=4, key_group=32, value_bits=3, norm=NormScope.JOINT, window=128),
    OscarConfig("d", key_bits=2, key_group=64, value_bits=4, ring=RingType.MODEL, **FP16),
    OscarConfig("e", key_bits=4, key_group=128, value_bits=3, first_token=False, integer_zero=True, window=300),
    OscarConfig("f", key_bits=2, key_group=32, value_bits=3, value_group=32, integer_zero=True, **FP16),
    OscarConfig("g", key_bits=3, key_group=64, value_bits=4, value_group=32, value_gain=False, window=1),
]


@pytest.mark.parametrize("config", FORMATS, ids=lambda config: config.name)
def test_formats(config):
    fmt = PageFormat(config, 80 if config.name == "b" else 64)
    batch = Batch(fmt, [(255, 1, fmt.config.window), (130, 17, 40)], group=2)
    check_attention(batch)
    check_store(batch)
    check_ring(batch)


@pytest.mark.parametrize("ring,window", [("int8", 0), ("int8", 128), ("int8", 256), ("model", 256)])
def test_windows(ring, window):
    """Rings of all sizes, read from the window's start, wrapped, and overwritten by a prompt longer than they are."""
    config = replace(PRESETS["oscar_small"], ring=RingType(ring), window=window)
    few = dict(heads=1, group=1, dtype=torch.float16)
    check_ring(Batch(PageFormat(config, 64), [(511, 2, window), (3, 540, 3)], **few))
    batch = Batch(PageFormat(config, 64), [(511, 2, window)], **few)
    assert batch.ring_pages * batch.fmt.ring_tokens_per_page(2) < 540
    check_store(batch)
    check_attention(batch)


SLIDING = {  # preset, head size, dtype, group, sliding window, requests
    "one": ("oscar", 64, "float32", 4, 1, [(300, 2, 130), (5, 1, 5), (256, 1, 0)]),
    "page": ("oscar_small", 64, "float16", 1, 128, [(300, 3, 60), (127, 1, 127), (128, 1, 0), (511, 5, 255)]),
    "page+1": ("oscar_paper", 64, "bfloat16", 16, 129, [(383, 2, 0), (130, 16, 130), (40, 1, 40)]),
    "odd": ("oscar_4bit", 80, "float32", 3, 200, [(455, 16, 256), (199, 1, 71), (330, 2, 0)]),
    "wide": ("oscar", 128, "bfloat16", 2, 300, [(700, 1, 256), (299, 2, 50)]),
    "mixed": ("oscar", 64, "float16", 2, 127, [(300, 1, 140), (260, 40, 128), (20, 16, 20), (0, 0, 0), (0, 300, 0)]),
    "chunk": ("oscar_large", 96, "float32", 1, 190, [(520, 100, 256)]),
    "chunk_paper": ("oscar_paper", 64, "float16", 2, 1, [(140, 18, 0)]),
}


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows(name):
    preset, dim, dtype, group, sliding_window, requests = SLIDING[name]
    options = dict(group=group, dtype=getattr(torch, dtype), heads=1, sinks=group == 2)
    check_attention(Batch(PageFormat.preset(preset, dim), requests, sliding_window=sliding_window, **options))


@pytest.mark.parametrize(
    "name, soft_cap, sinks",
    [("decode_small", None, True), ("decode", 1.5, False), ("decode_paper", 1.5, True), ("mixed", 30.0, True)],
)
def test_sinks_and_soft_cap(name, soft_cap, sinks):
    check_attention(make(name, soft_cap=soft_cap, sinks=sinks))


# ---- numbers at the edges -------------------------------------------------------------------
def int8_ring(batch, ring):
    """Bytes and fp16 scales."""
    dim = batch.fmt.head_dim
    tokens = batch.fmt.ring_tokens_per_page(batch.dtype.itemsize)
    scales = ring[..., tokens * 2 * dim : tokens * 2 * (dim + 2)]
    return ring[..., : tokens * 2 * dim], scales.contiguous().view(torch.half)


def test_int8_ring_rounding():
    """Ties, tokens of zeros, scales that saturate or vanish, NaN and infinities."""
    batch = Batch(PageFormat.preset("oscar", 64), [(0, 9, 0)])
    key = batch.key
    key[0] = torch.arange(64) * 0.5 - 16
    key[0, :, 0] = 127.0
    key[1] = 0.0
    key[2] *= 1e30
    key[3] *= 1e-9
    key[4] *= 3e-6
    key[5, 0, 7] = float("nan")
    key[6, 1, 3], key[6, 1, 5] = float("inf"), float("-inf")
    batch.value[:] = key.flip(0)
    (codes, scales), (expected, expected_scales) = (int8_ring(batch, batch.write_ring(x)) for x in (ops, expected_ops))
    assert torch.equal(codes, expected)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    poison = int8_ring(batch, batch.ring)[1].isnan().sum()
    assert (9 * 4 - 2) == (poison - scales.isnan().sum())


@pytest.mark.parametrize("preset,dim,token", [("oscar", 64, 0), ("oscar", 80, 90), ("oscar_large", 64, 5)])
def test_nan_stays_in_its_token(preset, dim, token):
    """A NaN in the first token, in the ring, or among the step's tokens, makes that token NaN and no other."""
    fmt = PageFormat.preset(preset, dim)
    batch = Batch(fmt, [(0, 40, 0)], heads=1, group=1)
    step = Batch(fmt, [(40, 90, 40)], heads=1, group=1)
    new, row = (batch, token) if token < 40 else (step, token - 40)
    new.key[row, 0, 3] = new.value[row, 0, 5] = float("nan")
    step.ring, step.ring_table = batch.write_ring(ops), batch.ring_table
    page = step.page_table[0, :1].long()
    first = torch.tensor([True], device=DEVICE)
    expected, actual = (reference.decode_pages_rotated(step.store(x)[page], fmt, first) for x in (expected_ops, ops))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    for part in actual:
        assert part.isnan().all(-1).flatten().nonzero().tolist() == part.isnan().any(-1).flatten().nonzero().tolist()
        assert part.isnan().any(-1).flatten().nonzero().tolist() == [[token]]


def test_tiny_and_huge_values():
    """fp16 keeps the weights of an int8 ring's values whatever their size."""
    for size in (1e-3, 300.0):
        batch = Batch(PageFormat.preset("oscar", 64), [(200, 1, 200)], dtype=torch.float16)
        scales = int8_ring(batch, batch.ring)[1]
        scales[..., 1::2] *= size  # a copy
        tokens = batch.fmt.ring_tokens_per_page(2)
        batch.ring[..., tokens * 128 : tokens * 132] = scales.view(torch.uint8)
        batch.value *= size
        expected, actual = batch.attention(expected_ops), batch.attention(ops)
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3 * size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_matrix(preset, dim, dtype):
    fmt = PageFormat.preset(preset, dim)
    for group in (1, 3, 8):
        for length in (1, 2, 7, 16, 17, 130):
            requests = [(c, length, ring) for c, ring in ((0, 0), (127, 127), (128, 0), (300, 130), (511, 256))]
            batch = Batch(fmt, requests, dtype=dtype, group=group, seed=length)
            check_attention(batch)
            if group == 1:
                check_store(batch)
                check_ring(batch)


@pytest.mark.parametrize("name", ["decode_large", "chunk_large"])
def test_portable_codes(name, monkeypatch):
    """Where matrix units flush subnormals, codes are read as ordinary fp16 numbers."""
    from vllm_oscar.ops.triton import layout

    monkeypatch.setattr(layout, "codes_mode", lambda: 0)
    batch = make(name)
    check_attention(batch)


def test_many_splits(monkeypatch):
    """More splits than pages, and splits of several pages: some have nothing to do."""
    from vllm_oscar.ops.triton import decode as triton_decode

    batch = Batch(PageFormat.preset("oscar_small", 64), [(430, 1, 50), (140, 1, 12), (3, 1, 3)], heads=1)
    for splits in (1, 3, 7):
        monkeypatch.setattr(triton_decode, "num_splits", lambda *_, splits=splits: splits)
        check_attention(batch)


def test_large_logits():
    """One token takes all the weight; the others' exponentials vanish."""
    check_attention(Batch(PageFormat.preset("oscar", 64), [(300, 1, 44)], spread=60.0))


# ---- CUDA graphs --------------------------------------------------------------------------
def record_launches(monkeypatch):
    """Replace the kernels; the list gets ``(name, grid, constexpr arguments)`` of every launch."""
    from vllm_oscar.ops.triton import decode, prefill, store

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                given = inspect.signature(self.kernel.fn).bind(*args).arguments
                kinds = self.kernel.fn.__annotations__
                constants = tuple((name, x) for name, x in given.items() if "constexpr" in str(kinds.get(name)))
                launches.append((self.kernel.fn.__name__, grid, constants))

            return launch

    for module in (decode, prefill, store):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    return launches


def run_on_meta(requests, tokens, max_query_len):
    """All operations with tensors that have no contents: reading any raises."""
    fmt = PageFormat.preset("oscar", 64)

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    tables = empty(requests, 64), empty(requests, 7)
    step = Step(empty(requests + 1), empty(requests), *tables, empty(requests), max_query_len)
    pages = empty(9, 2, fmt.page_bytes, dtype=torch.uint8)
    cache = Cache(pages, pages, 6, fmt, Softmax(0.1))
    query, key = empty(tokens, 8, 64, dtype=torch.float16), empty(tokens, 2, 64, dtype=torch.float16)
    ops.store_pages(step, cache, key, key)
    ops.attention(step, cache, query, key, key, torch.empty_like(query))
    ops.write_ring(step, cache, key, key)


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 64, 1), (8, 40, 5), (3, 800, 700), (1, 300, 300)])
def test_launches_need_no_contents(shape, monkeypatch):
    launches = record_launches(monkeypatch)
    run_on_meta(*shape)
    names = {name for name, _, _ in launches}
    assert {"store_kernel", "write_ring_kernel"} < names
    assert ("prefill_kernel" in names) == (shape[2] > 16)
    assert ("decode_kernel" in names) == (shape[2] <= 16 or shape[0] > 1)


def test_decode_batches_share_a_kernel(monkeypatch):
    """A batch of a new size must not wait for the compiler."""
    launches = record_launches(monkeypatch)
    for requests in (1, 2, 3, 5, 17, 64, 256):
        run_on_meta(requests, requests, 1)
    grids, constants = zip(*[launch[1:] for launch in launches if launch[0] == "decode_kernel"])
    assert len(set(grids)) > 5
    assert len(set(constants)) == 1


def test_padded_requests():
    """Graphs pad a batch with requests of no token, or of tokens without a length: neither does harm."""
    batch = make("verify")
    attended, stored, ring = batch.attention(ops), batch.store(ops), batch.write_ring(ops)
    tokens, requests = batch.key.shape[0], len(batch.seq_lens)
    used = batch.ring_table[:, : batch.ring_pages]
    spare = next(block for block in range(len(ring)) if block not in used)  # vLLM's null block

    def pad(x, rows, fill):
        return torch.cat([x, torch.full((rows, *x.shape[1:]), fill, dtype=x.dtype, device=x.device)])

    batch.query_start_loc = pad(batch.query_start_loc, 3, tokens)
    batch.query_start_loc[-2:] += torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    batch.seq_lens = pad(batch.seq_lens, 3, 0)
    batch.ring_start = pad(batch.ring_start, 3, -PAGE_TOKENS)
    batch.page_table = pad(batch.page_table, 3, 2**31 - 1)
    batch.ring_table = pad(batch.ring_table, 3, spare)
    batch.query, batch.key, batch.value = (pad(x, 5, 1.0) for x in (batch.query, batch.key, batch.value))
    assert batch.step.requests == requests + 3

    padded = batch.attention(ops)
    assert torch.equal(padded[:tokens], attended)
    assert (padded[tokens : tokens + 2] == 1).all()  # their own token is all that they see
    assert (padded[tokens + 2 :] == 7).all()  # of no request
    assert torch.equal(batch.store(ops), stored)
    changed = batch.write_ring(ops)
    changed[spare] = ring[spare]
    assert torch.equal(changed, ring)


@pytest.mark.parametrize("name", ["decode_large", "verify"])
def test_loose_bound(name):
    batch = make(name)
    batch.max_query_len = 300
    check_attention(batch)


def test_reserve_makes_all_tables():
    from vllm_oscar.ops.triton import layout

    layout.rotation.cache_clear()
    batch = make("mixed")
    heads = batch.query.shape[1], batch.key.shape[1]
    ops.reserve(batch.fmt, Limits(8, 64, 1, *heads, batch.dtype, torch.device(DEVICE)))
    made = layout.rotation.cache_info().misses
    batch.attention(ops), batch.store(ops)
    assert made == layout.rotation.cache_info().misses == 3


# ---- refusals -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["query", "key", "value", "out", "pages", "page_table"])
def test_strides_that_would_need_a_copy_are_refused(name):
    batch = make("decode_small")
    tensors = {"query": batch.query, "key": batch.key, "value": batch.value, "out": torch.empty_like(batch.query)}
    if name in tensors:
        tensors[name] = tensors[name].repeat_interleave(2, -1)[..., ::2]
    else:
        setattr(batch, name, getattr(batch, name).repeat_interleave(2, -1)[..., ::2])
    with pytest.raises(ValueError, match=f"OScaR Triton kernels: .*{name}.* contiguous"):
        ops.attention(batch.step, batch.cache(), *tensors.values())


def test_reserve_under_the_defaults_of_a_model_being_made():
    from vllm_oscar.ops.triton import layout

    for order in ("natural", "key", "value"):
        made = layout.rotation.__wrapped__
        with torch.device("meta"):
            found = made(80, order, torch.device("cpu"))
        assert torch.equal(found, made(80, order, torch.device("cpu")))
