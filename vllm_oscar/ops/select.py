# SPDX-License-Identifier: Apache-2.0
"""Choice of the kernels behind the cache operations (:class:`vllm_oscar.ops.step.Kernels`).

CUDA devices: cuda, else triton, else refuse. CPU: the native library, else the
PyTorch reference with one warning. ``VLLM_OSCAR_KERNELS`` overrides, for tests.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache

from vllm_oscar.core import envs
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.lossless import LosslessFormat
from vllm_oscar.ops.step import Kernels

logger = logging.getLogger("vllm.oscar")

CANDIDATES = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}


def load(kind: str) -> tuple[Kernels | None, str]:
    """The kernels called ``kind``, or None and the reason why they cannot be used."""
    try:
        module = importlib.import_module(f"vllm_oscar.ops.{kind}")
    except ImportError as error:
        return None, str(error)
    usable, reason = module.available()
    return (module, "") if usable else (None, reason)


def select(device_type: str, fmt: PageFormat | LosslessFormat) -> Kernels:
    """The kernels for ``fmt`` on ``device_type``.

    Raises ``RuntimeError`` with the reasons when no kernels can run there.
    """
    if isinstance(fmt, LosslessFormat):
        from vllm_oscar.ops import reference

        return reference
    return _select(device_type, fmt.head_dim, envs.forced_kernels())


@lru_cache(maxsize=None)
def _select(device_type: str, head_dim: int, forced: str | None) -> Kernels:
    kinds = (forced,) if forced else CANDIDATES.get(device_type, ())
    reasons = []
    for kind in kinds:
        kernels, reason = load(kind)
        if kernels is not None and head_dim not in getattr(kernels, "HEAD_DIMS", (head_dim,)):
            kernels, reason = None, f"no kernel for head_dim {head_dim}"
        if kernels is not None:
            if reasons:
                logger.warning("OScaR uses its %s kernels; not available: %s", kind, "; ".join(reasons))
            else:
                logger.info("OScaR uses its %s kernels.", kind)
            return _with_dense_prefill(kernels) if kind == "cuda" else kernels
        reasons.append(f"{kind} ({reason})")
    raise RuntimeError(
        f"--kv-cache-dtype oscar has no kernels for device {device_type!r}: {'; '.join(reasons) or 'not supported'}; "
        "run `vllm-oscar doctor`, or use --kv-cache-dtype auto"
    )


def _with_dense_prefill(kernels: Kernels) -> Kernels:
    """The CUDA kernels with FlashAttention for long queries, where it runs."""
    dense, reason = load("dense_prefill")
    if dense is None:
        logger.warning("OScaR prefill uses its own kernels; FlashAttention is not available: %s", reason)
    return dense or kernels
