# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter, against the reference operations."""

import importlib.util
import inspect
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
# Triton decides when it is imported. TRITON_INTERPRET=0 runs this file on a GPU instead.
LATE = "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

from vllm_oscar.core import reference  # noqa: E402
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope, OscarConfig, ParamType  # noqa: E402
from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.ops import reference as expected_ops  # noqa: E402
from vllm_oscar.ops import triton as ops  # noqa: E402
from vllm_oscar.ops.step import Cache, Limits, Step  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1" else "cpu"

if os.environ["TRITON_INTERPRET"] == "1":
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor, scope):
        """Loop bounds are arrays of one element, which numpy 2.4 does not convert to int any more."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_index


@pytest.fixture(autouse=True)
def _interpreted(request):
    if LATE and request.node.name != "test_in_a_fresh_process":
        pytest.skip("triton was already imported for a GPU; test_in_a_fresh_process runs this test")


@pytest.mark.skipif(not LATE, reason="this process is fresh enough")
def test_in_a_fresh_process(request):
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-m", request.config.option.markexpr or "not slow"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


class Batch:
    """Requests with history in shuffled pages and rings; all memory that is not theirs is poison."""

    def __init__(self, fmt, requests, heads=2, group=2, dtype=torch.float32, seed=0, pad_tokens=0, spread=1.0):
        """``requests``: (context, query length, tokens before the context that the ring provides)."""
        random = torch.Generator().manual_seed(seed)
        dim = fmt.head_dim
        self.fmt, self.dtype = fmt, dtype
        self.ring_pages = fmt.ring_pages(dtype.itemsize, lookahead=16)
        blocks = sum(-(-(c + q) // PAGE_TOKENS) for c, q, _ in requests) + 2
        most = max(-(-(c + q) // PAGE_TOKENS) for c, q, _ in requests) + 1
        rings = len(requests) * self.ring_pages + 1
        self.pages = torch.full((blocks, heads, fmt.page_bytes), 255, dtype=torch.uint8)
        self.ring = torch.full((rings, heads, fmt.page_bytes), 255, dtype=torch.uint8)
        self.page_table = torch.full((len(requests), most), 2**31 - 1, dtype=torch.int32)
        self.ring_table = torch.empty(len(requests), self.ring_pages + 1, dtype=torch.int32)
        free = torch.randperm(blocks, generator=random).tolist()
        free_ring = torch.randperm(rings, generator=random).tolist()
        view = reference.ring_view(self.ring, fmt, dtype)
        capacity = view.shape[2] * self.ring_pages
        bias = torch.randn(2, heads, dim, generator=random)
        tokens = sum(q for _, q, _ in requests) + pad_tokens
        self.key, self.value = torch.full((2, tokens, heads, dim), float("nan"), dtype=dtype)
        self.query = (spread * torch.randn(tokens, heads * group, dim, generator=random)).to(dtype)
        starts, lens, ring_starts = [0], [], []
        for r, (context, length, in_ring) in enumerate(requests):
            key = (torch.randn(context + length, heads, dim, generator=random) + bias[0]).to(dtype)
            value = (torch.randn(context + length, heads, dim, generator=random) + 0.3 * bias[1]).to(dtype)
            full = context // PAGE_TOKENS
            if length:
                needed = -(-(context + length) // PAGE_TOKENS)
                self.page_table[r, :needed] = torch.tensor([free.pop() for _ in range(needed)])
                self.ring_table[r] = torch.tensor([free_ring.pop() for _ in range(self.ring_pages)] + [2**31 - 1])
                if full:
                    self.pages[self.page_table[r, :full].long()] = reference.encode_pages(
                        key[: full * PAGE_TOKENS].unflatten(0, (full, PAGE_TOKENS)),
                        value[: full * PAGE_TOKENS].unflatten(0, (full, PAGE_TOKENS)),
                        fmt,
                        torch.arange(full) == 0,
                    )
                in_ring = max(min(in_ring, context, capacity), context - full * PAGE_TOKENS)
                position = torch.arange(context - in_ring, context)
                page, offset = reference.ring_slots(
                    self.ring_table[r].expand(in_ring, -1), position, view.shape[2], self.ring_pages
                )
                view[page, :, offset] = torch.stack([key[position], value[position]], 2)
                self.key[starts[-1] : starts[-1] + length] = key[context:]
                self.value[starts[-1] : starts[-1] + length] = value[context:]
                lens.append(context + length)
                ring_starts.append(context - in_ring)
            else:  # a request without tokens in this step: anything
                self.ring_table[r] = 2**31 - 1
                lens.append(977)
                ring_starts.append(333)
            starts.append(starts[-1] + length)
        self.query_start_loc = torch.tensor(starts, dtype=torch.int32)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32)
        self.ring_start = torch.tensor(ring_starts, dtype=torch.int32)
        self.max_query_len = max(length for _, length, _ in requests)
        for name, tensor in vars(self).items():
            if isinstance(tensor, torch.Tensor):
                setattr(self, name, tensor.to(DEVICE))

    @property
    def step(self):
        return Step(
            self.query_start_loc,
            self.seq_lens,
            self.page_table,
            self.ring_table,
            self.ring_start,
            self.max_query_len,
        )

    def cache(self, pages=None, ring=None):
        pages, ring = self.pages if pages is None else pages, self.ring if ring is None else ring
        return Cache(pages, ring, self.ring_pages, self.fmt, self.fmt.head_dim**-0.5)

    def attention(self, module):
        out = torch.full_like(self.query, 7.0)
        module.attention(self.step, self.cache(), self.query, self.key, self.value, out)
        return out

    def store(self, module):
        pages = self.pages.clone()
        module.store_pages(self.step, self.cache(pages=pages), self.key, self.value)
        return pages

    def write_ring(self, module):
        ring = self.ring.clone()
        module.write_ring(self.step, self.cache(ring=ring), self.key, self.value)
        return ring


TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check_attention(batch):
    expected, actual = batch.attention(expected_ops), batch.attention(ops)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[batch.dtype], atol=TOLERANCE[batch.dtype])


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
    "decode_192": ("oscar", 192, "float32", 1, [(133, 1, 0)]),
    "decode_256": ("oscar_paper", 256, "bfloat16", 2, [(133, 1, 5)]),
    "decode_128": ("oscar_small", 128, "float32", 16, [(140, 1, 12)]),
    "verify": ("oscar", 64, "float32", 4, [(250, 5, 122), (5, 16, 5), (200, 2, 72)]),
    "verify_gqa1": ("oscar_large", 64, "bfloat16", 1, [(384, 4, 128), (129, 16, 129)]),
    "mixed": ("oscar", 64, "float16", 2, [(260, 1, 128), (130, 17, 128), (20, 16, 20), (0, 0, 0), (0, 33, 0)]),
    "chunk": ("oscar", 64, "float32", 1, [(200, 200, 128)]),
    "chunk_small": ("oscar_small", 96, "bfloat16", 3, [(256, 20, 0)]),
    "chunk_large": ("oscar_large", 80, "float32", 1, [(150, 20, 30)]),
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
    "oscar_paper": [(120, 8, 120), (128, 128, 0)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset,dim", [("oscar", 64), ("oscar_small", 80), ("oscar_large", 112), ("oscar_paper", 128)])
def test_store(preset, dim, dtype):
    check_store(Batch(PageFormat.preset(preset, dim), STORES[preset], dtype=dtype, group=1, pad_tokens=5))


@pytest.mark.parametrize("dim", [96, 192, 256])
def test_store_wide(dim):
    check_store(Batch(PageFormat.preset("oscar", dim), [(120, 136, 120)], dtype=torch.float16, heads=1, group=1))


# ---- formats that no preset has -----------------------------------------------------------
FORMATS = [
    OscarConfig("a", key_bits=3, key_group=128, value_group=64, exact_first_key=False),
    OscarConfig("b", key_bits=3, key_group=32, value_group=32, norm=NormScope.NONE, key_param=ParamType.FP16),
    OscarConfig("c", key_bits=4, key_group=32, value_group=128, norm=NormScope.JOINT),
    OscarConfig("d", key_bits=2, key_group=64, value_group=64, key_param=ParamType.FP16),
    OscarConfig("e", key_bits=4, key_group=128, exact_first_key=False, integer_zero=True),
]


@pytest.mark.parametrize("config", FORMATS, ids=lambda config: config.name)
def test_formats(config):
    fmt = PageFormat(config, 80 if config.name == "b" else 64)
    batch = Batch(fmt, [(255, 1, 80)], group=2)
    check_attention(batch)
    check_store(batch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_matrix(preset, dim, dtype):
    fmt = PageFormat.preset(preset, dim)
    for group in (1, 3, 8):
        for length in (1, 2, 7, 16, 17, 130):
            requests = [(c, length, ring) for c, ring in ((0, 0), (127, 127), (128, 0), (300, 130), (511, 136))]
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
    cache = Cache(pages, pages, 6, fmt, 0.1)
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


# ---- ahead-of-time compilation ------------------------------------------------------------
COMPILE = """
import pathlib, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import triton as ops
from vllm_oscar.ops.step import Cache, Step
from vllm_oscar.ops.triton import decode as triton_decode, prefill as triton_prefill, store as triton_store

class Driver:  # of a device that is not there
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def compile_only(*args, **options):
            code = self.kernel.warmup(*args, grid=grid, **options).asm["cubin"]
            pathlib.Path("kernel.cubin").write_bytes(code)
            tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True).stdout
            registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
            print(self.kernel.__name__, registers, stack)
        return compile_only

triton.runtime.driver.set_active(Driver())
for module in (triton_decode, triton_prefill, triton_store):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Compiled(getattr(module, name)))
fmt = PageFormat.preset(sys.argv[2], int(sys.argv[3]))
for tokens, requests, longest in eval(sys.argv[4]):
    query = torch.empty(tokens, 32, fmt.head_dim, dtype=getattr(torch, sys.argv[5]))
    key = torch.empty(tokens, 8, fmt.head_dim, dtype=query.dtype)
    pages = torch.empty(4, 8, fmt.page_bytes, dtype=torch.uint8)
    table = torch.zeros(requests, 64, dtype=torch.int32)
    lens = torch.zeros(requests + 1, dtype=torch.int32)
    step = Step(lens, lens[1:], table, table, lens[1:], longest)
    cache = Cache(pages, pages, 6, fmt, 0.1)
    ops.attention(step, cache, query, key, key, query)
    if len(sys.argv) > 6:
        ops.store_pages(step, cache, key, key)
        ops.write_ring(step, cache, key, key)
"""


def compile_for(tmp_path, *args):
    """Registers and stack bytes of every kernel that the given call launches."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])
    command = [sys.executable, "-c", COMPILE, *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    return {name: (int(registers), int(stack)) for name, registers, stack in map(str.split, run.stdout.splitlines())}


@pytest.mark.parametrize("arch", [80, 90])
def test_decode_compiles_without_spills(arch, tmp_path):
    usage = compile_for(tmp_path, arch, "oscar", 128, [(64, 64, 1)], "bfloat16")
    assert set(usage) == {"rotate_query_kernel", "decode_kernel", "combine_kernel"}
    assert all(stack == 0 for _, stack in usage.values()), usage


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_everything_compiles(preset, dim, arch, tmp_path):
    usage = compile_for(tmp_path, arch, preset, dim, [(64, 64, 1), (1024, 2, 1000)], "float16", "store")
    assert len(usage) == 6
    if dim == 128:
        assert usage["decode_kernel"][1] == 0, usage
