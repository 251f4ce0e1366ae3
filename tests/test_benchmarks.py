# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run as their documentation says, from any folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_cpu_attention_writes_a_record_per_case(tmp_path):
    command = [sys.executable, BENCHMARKS / "cpu.py", "--context", "300", "--batch", "1", "--batch", "2"]
    command += ["--repeats", "2", "--cold-mib", "0", "--json", "out.json", "--plot", "out.png"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    records = json.loads((tmp_path / "out.json").read_text())
    assert [(r["context"], r["batch"]) for r in records] == [(300, 1), (300, 2)]
    for r in records:
        assert r["us_oscar"] > 0 and r["us_bf16"] > 0 and r["ratio"] > 0 and r["error"] < 5e-3
    assert (tmp_path / "out.png").stat().st_size > 0
