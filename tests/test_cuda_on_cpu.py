# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' and attention launchers' own source, run on the CPU (tests/cuda_on_cpu), against the reference.

Checks indexing, layout, masks, schedule and combination without a GPU; not timing, not
memory ordering, not the assembly that tests/cuda_on_cpu replaces.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.kernel_cases import POISON, make_case, relative_error
from vllm_oscar.core.config import PRESETS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import cuda
from vllm_oscar.ops import reference as reference_ops

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """``vllm_oscar.ops.cuda`` with the emulated kernels behind its C ABI."""
    output = tmp_path_factory.mktemp("emulator") / "kernels.so"
    source = ROOT / "tests" / "cuda_on_cpu"
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{source}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([*command, str(source / "kernels.cpp"), "-o", str(output)], check=True)
    library = ctypes.CDLL(str(output))

    def call(function: str, args, *rest) -> None:
        assert getattr(library, function.replace("oscar_", "emulate_"))(ctypes.byref(args), *rest) == 0

    def reserve(fmt, requests, kv_heads, query_heads, max_query_len, device) -> torch.Tensor:
        chunk = cuda._query_chunk(requests, max_query_len)
        size = cuda._workspace_bytes.__wrapped__(fmt, requests, kv_heads, query_heads // kv_heads, chunk, 0)
        return torch.full((size,), POISON, dtype=torch.uint8)

    with (
        mock.patch.object(cuda, "_call", call),
        mock.patch.object(cuda, "_stream", lambda device: None),
        mock.patch.object(cuda, "_operator", lambda name: getattr(cuda, f"_{name}")),
        mock.patch.object(cuda, "reserve", reserve),
        mock.patch("torch.cuda.device", lambda device: mock.MagicMock()),
    ):
        cuda.thefts = library.emulated_thefts
        yield cuda
        del cuda.thefts


REQUESTS = [(0, 1), (127, 3), (300, 1), (5, 0), (516, 2), (128, 3)]


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype, group", [(torch.float16, 2), (torch.bfloat16, 5)])
def test_attention(emulated, preset, head_dim, dtype, group):
    case = make_case(PageFormat.preset(preset, head_dim), REQUESTS, dtype=dtype, group=group, device="cpu")
    error = relative_error(case.attention(emulated), case.exact_attention())
    assert error < (6e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("warps", (0, 1, 2, 3))
@pytest.mark.parametrize("context", (1, 30, 90, 140))
def test_work_for_fewer_multiprocessors(emulated, context, warps):
    case = make_case(PageFormat.preset("oscar", 64), [(context, 1)], kv_heads=1, group=4, device="cpu")
    assert relative_error(case.attention(emulated, warps=warps), case.exact_attention()) < 6e-3


@pytest.mark.parametrize("preset", ("oscar", "oscar_paper"))
def test_pages_taken_from_other_warps(emulated, preset, monkeypatch):
    """Blocks run one after the other here, so the first does nearly all that can be taken."""
    case = make_case(PageFormat.preset(preset, 64), [(6000, 2), (9, 1), (2900, 1)], kv_heads=1, device="cpu")
    expected = case.exact_attention()
    assert relative_error(case.attention(emulated, warps=2), expected) < 6e-3
    assert emulated.thefts() >= 10
    monkeypatch.setenv("VLLM_OSCAR_DETERMINISTIC", "1")
    assert relative_error(case.attention(emulated, warps=2), expected) < 6e-3
    assert emulated.thefts() == 0
    assert not emulated.counters(case.query.device).any(), "the next launch expects zeros"


@pytest.mark.parametrize("preset", PRESETS)
def test_store_and_ring(emulated, preset):
    requests = [(0, 128), (127, 1), (120, 150), (255, 2), (300, 1), (1, 20)]
    case = make_case(PageFormat.preset(preset, 64), requests, dtype=torch.bfloat16, device="cpu")
    different = case.store(emulated) != case.store(reference_ops)
    assert different.float().mean() < 1e-3
    assert torch.equal(case.write_ring(emulated), case.write_ring(reference_ops))
