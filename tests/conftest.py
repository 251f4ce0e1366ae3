# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

from __future__ import annotations

import argparse
import os
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import settings
from vllm_engine import MODEL, EngineHost

# OpenMP's threads, which torch starts when it is imported, else spin between operations that take microseconds, while
# another worker's tests need the core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The same examples in every run.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


def pytest_terminal_summary(terminalreporter):
    """Say which instruction sets of the CPU kernels were run: a machine that lacks one tests the others alone."""
    from vllm_oscar.ops.cpu import ISAS

    reports = [report for group in terminalreporter.stats.values() for report in group]
    run = {value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "isa"}
    if run:
        absent = ", ".join(name for name in ISAS if name not in run) or "none"
        terminalreporter.write_line(
            f"CPU instruction sets run: {', '.join(name for name in ISAS if name in run)}; not run: {absent} "
            "(test_cpu_amx.py runs amx's code with emulated instructions)"
        )


# Files that take half a minute or more, the longest first: two workers that end with short files end together.
LONG = (
    "test_triton_build",  # with slow tests more than half an hour
    "test_vllm_lossless", "test_vllm_int2", "test_triton_kernels", "test_vllm_windows", "test_vllm_server",
    "test_symbols", "test_vllm_drafts", "test_vllm_refusals", "test_cuda_on_cpu", "test_vllm_entrypoints",
    "test_vllm_tp", "test_vllm_offload", "test_cpu_kernels", "test_versions", "test_vllm_multimodal",
    "test_vllm_skip_layers", "test_vllm_hybrid", "test_fidelity", "test_benchmarks", "test_vllm_nan", "test_cuda_build",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def engine_host():
    """The process in which the in-process engines of all test files run, one at a time."""
    with EngineHost() as host:
        yield host


@lru_cache(maxsize=None)
def _text_tokens() -> list[int]:
    from tokenizers import Tokenizer

    text = Path(argparse.__file__).read_text()
    return Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def text():
    """``text(n, at)``: a prompt of ``n`` tokens, the first being ``<|bos|>``, real code from offset ``at``."""

    def prompt(length: int, at: int = 0) -> list[int]:
        return [0] + _text_tokens()[at : at + length - 1]

    return prompt
