# SPDX-License-Identifier: Apache-2.0
"""The ``VLLM_`` variables that vllm-oscar reads; codec and kernels are for tests (``OSCAR_CPU_*``: ``ops/cpu.py``)."""

from __future__ import annotations

import os

NAMES = ("VLLM_OSCAR_CODEC", "VLLM_OSCAR_KERNELS", "VLLM_OSCAR_DETERMINISTIC")
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


def deterministic() -> bool:
    """``VLLM_OSCAR_DETERMINISTIC=1``: the same step gives the same bits every time.

    Without it the CUDA kernel gives work to whichever warp is free, so that sums are
    taken in another order each time, as rounding shows; with it, it is a few percent slower.
    """
    value = os.environ.get("VLLM_OSCAR_DETERMINISTIC", "0")
    if value not in ("0", "1"):
        raise ValueError(f"VLLM_OSCAR_DETERMINISTIC={value!r} is unknown; use 0 or 1, or unset it")
    return value == "1"
