# SPDX-License-Identifier: Apache-2.0
"""The CPU library's AMX path, with the tile instructions emulated: few machines have them."""

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

from vllm_oscar.ops import cpu

ROOT = Path(__file__).resolve().parent.parent
EMULATED = Path(__file__).resolve().parent / "amx_on_cpu"

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or not cpu.available()[0] or "avx512" not in cpu.isas(), reason="needs g++ and AVX-512"
)


def build(folder: Path) -> Path:
    """The library by the commands of setup.py, with the sources of ``amx_on_cpu`` in place of their namesakes."""
    with patch("setuptools.setup"), patch.dict(os.environ, {"OSCAR_NATIVE": "none", "OSCAR_CPU_CXXFLAGS": "-O1"}):
        commands = runpy.run_path(str(ROOT / "setup.py"))["cpu_commands"](folder, folder / "oscar_cpu.so")
    replaced = {str(ROOT / "csrc" / "cpu" / path.name): str(path) for path in EMULATED.glob("*.cpp")}
    assert len(replaced) == 2
    commands = [[replaced.get(word, word) for word in command] for command in commands]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands[:-1]))
    subprocess.run(commands[-1], check=True)
    return folder / "oscar_cpu.so"


@pytest.mark.slow
def test_attention_through_amx_matches_the_reference(tmp_path):
    environment = os.environ | {"OSCAR_CPU_LIBRARY": str(build(tmp_path)), "PYTHONPATH": str(ROOT)}
    check = "from vllm_oscar.ops import cpu; assert cpu.isas()[-1] == 'amx', cpu.isas()"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cpu_kernels.py"]
    # Every preset and head size, and a sliding window.
    tests += ["-m", "slow", "-k", "bf16 and 2-3 and (attention_on or 200-2)"]
    run = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    assert " passed" in run.stdout
