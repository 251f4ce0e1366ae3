# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The instrumented library runs in a process of its own. Tensors are views into the middle
of larger allocations elsewhere; here each is an allocation that ends where it ends, so
that a load past a page or a table is caught.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or sys.platform != "linux", reason="needs g++ and its sanitizer runtime"
)

CHECK = """
import ctypes, os, torch
from vllm_oscar.core.softmax import Softmax
from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops import cpu
from vllm_oscar.ops.step import Cache, Step

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def exact(x):
    # malloc'ed to the byte: torch's own allocations are padded
    size = x.numel() * x.element_size()
    buffer = (ctypes.c_char * max(size, 1)).from_address(libc.malloc(ctypes.c_size_t(max(size, 1))))
    return torch.frombuffer(buffer, dtype=x.dtype, count=x.numel()).view(x.shape).copy_(x) if size else x

torch.manual_seed(0)
for isa in cpu.isas():
    os.environ["OSCAR_CPU_ISA"] = isa
    cpu.isa.cache_clear()
    for preset, dim, dtype in [("oscar", 80, torch.bfloat16), ("oscar_paper", 112, torch.float16),
                               ("oscar_large", 64, torch.float32), ("oscar_small", 192, torch.bfloat16),
                               ("oscar_4bit", 96, torch.float16)]:
        fmt = PageFormat.preset(preset, dim)
        ring_pages, heads, group = fmt.ring_pages(dtype.itemsize), 2, 3
        requests = [(130, 1), (0, 140), (250, 30), (0, 0), (128, 7)]
        ints = lambda x: exact(torch.tensor(x, dtype=torch.int32))
        step = Step(
            query_start_loc=ints([0, 1, 141, 171, 171, 178]),
            seq_lens=ints([c + n for c, n in requests]),
            page_table=exact(torch.arange(15, dtype=torch.int32).view(5, 3)),
            ring_table=exact(torch.arange(5 * ring_pages, dtype=torch.int32).view(5, ring_pages)),
            ring_start=ints([128, 0, 128, 0, 100]),
            max_query_len=140,
        )
        pages = exact(torch.zeros(15, heads, fmt.page_bytes, dtype=torch.uint8))
        ring = exact(torch.zeros(5 * ring_pages, heads, fmt.page_bytes, dtype=torch.uint8))
        key, value = (exact(torch.randn(178, heads, dim).to(dtype)) for _ in range(2))
        query, out = (exact(torch.randn(178, heads * group, dim).to(dtype)) for _ in range(2))
        sinks = exact(torch.randn(heads * group))
        for softmax in (Softmax(dim**-0.5), Softmax(dim**-0.5, 129, sinks=sinks), Softmax(dim**-0.5, 20, 5.0)):
            cache = Cache(pages, ring, ring_pages, fmt, softmax)
            for row, (context, new) in enumerate(requests):
                step.page_table[row, : softmax.first_visible(context) // 128] = 2**30
            cpu.store_pages(step, cache, key, value)
            cpu.attention(step, cache, query, key, value, out)
            cpu.write_ring(step, cache, key, value)
            assert torch.isfinite(out).all()
print("clean")
"""


def build(folder: Path) -> Path:
    """The library with sanitizers, by the commands of setup.py."""
    with patch("setuptools.setup"), patch.dict(os.environ, {"OSCAR_CPU_CXXFLAGS": FLAGS, "OSCAR_NATIVE": "none"}):
        commands = runpy.run_path(str(ROOT / "setup.py"))["cpu_commands"](folder, folder / "oscar_cpu.so")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands[:-1]))
    subprocess.run(commands[-1], check=True)
    return folder / "oscar_cpu.so"


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    library = build(tmp_path)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ comes without libasan")
    run = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "LD_PRELOAD": runtime,
            "OSCAR_CPU_LIBRARY": str(library),
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "2",
        },
    )
    assert run.returncode == 0 and "clean" in run.stdout, run.stderr[-6000:]
