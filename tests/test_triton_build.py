# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from vllm_oscar.core.config import PRESETS, SUPPORTED_HEAD_DIMS

COMPILE = """
import pathlib, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.softmax import Softmax
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
    softmax = Softmax(0.1, 1000, 30.0, torch.zeros(32)) if "softmax" in sys.argv else Softmax(0.1)
    cache = Cache(pages, pages, 6, fmt, softmax)
    ops.attention(step, cache, query, key, key, query)
    if "store" in sys.argv:
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


@pytest.mark.parametrize("steps, kernels", [([(64, 64, 1)], 3), ([(1000, 1, 1000)], 1)])
def test_windows_sinks_and_soft_cap_compile(steps, kernels, tmp_path):
    usage = compile_for(tmp_path, 90, "oscar", 64, steps, "bfloat16", "softmax")
    assert len(usage) == kernels
    assert all(stack == 0 for _, stack in usage.values()), usage


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_everything_compiles(preset, dim, arch, tmp_path):
    usage = compile_for(tmp_path, arch, preset, dim, [(64, 64, 1), (1024, 2, 1000)], "float16", "store")
    assert len(usage) == 6
    if dim == 128:
        # With its older matrix instructions the compiler for sm_80 finds no place for up to six values of fp16 kernels.
        assert usage["decode_kernel"][1] <= (24 if arch == 80 else 0), usage
