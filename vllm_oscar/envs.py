# SPDX-License-Identifier: Apache-2.0
"""The ``VLLM_`` variables that vllm-oscar reads, all of them for tests (``OSCAR_CPU_*``: ``ops/cpu.py``)."""

from __future__ import annotations

import os

NAMES = ("VLLM_OSCAR_CODEC", "VLLM_OSCAR_KERNELS")
KERNELS = ("cuda", "triton", "cpu", "reference")


def lossless_codec() -> bool:
    """``VLLM_OSCAR_CODEC=lossless``: store pages unquantized (test mode)."""
    codec = os.environ.get("VLLM_OSCAR_CODEC", "oscar")
    if codec not in ("oscar", "lossless"):
        raise ValueError(f"VLLM_OSCAR_CODEC={codec!r} is unknown; use 'oscar' or 'lossless', or unset it")
    return codec == "lossless"


def forced_kernels() -> str | None:
    """``VLLM_OSCAR_KERNELS``: use these kernels or fail, instead of the best available."""
    kernels = os.environ.get("VLLM_OSCAR_KERNELS")
    if kernels and kernels not in KERNELS:
        raise ValueError(f"VLLM_OSCAR_KERNELS={kernels!r} is unknown; use one of {', '.join(KERNELS)}, or unset it")
    return kernels or None
