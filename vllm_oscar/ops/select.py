# SPDX-License-Identifier: Apache-2.0
"""Choice of the kernels behind the three cache operations (see :mod:`.reference`).

CUDA devices: cuda, else triton, else refuse. CPU: the native library, else the
PyTorch reference with one warning. ``VLLM_OSCAR_KERNELS`` overrides, for tests.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType

from vllm_oscar.core import envs
from vllm_oscar.core.lossless import LosslessFormat

logger = logging.getLogger("vllm.oscar")

CANDIDATES = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}


def load(kind: str) -> tuple[ModuleType | None, str]:
    """The kernels called ``kind``, or None and the reason why they cannot be used."""
    try:
        module = importlib.import_module(f"vllm_oscar.ops.{kind}")
    except ImportError as error:
        return None, str(error)
    usable, reason = module.available()
    return (module, "") if usable else (None, reason)


@lru_cache(maxsize=None)
def _select(device_type: str, head_dim: int) -> ModuleType:
    forced = envs.forced_kernels()
    kinds = (forced,) if forced else CANDIDATES.get(device_type, ())
    reasons = []
    for kind in kinds:
        module, reason = load(kind)
        if module is not None and head_dim not in getattr(module, "HEAD_DIMS", (head_dim,)):
            module, reason = None, f"no kernel for head_dim {head_dim}"
        if module is not None:
            if reasons:
                logger.warning("OScaR uses its %s kernels; not available: %s", kind, "; ".join(reasons))
            else:
                logger.info("OScaR uses its %s kernels.", kind)
            return module
        reasons.append(f"{kind} ({reason})")
    raise RuntimeError(
        f"--kv-cache-dtype oscar has no kernels for device {device_type!r}: {'; '.join(reasons) or 'not supported'}; "
        "run `vllm-oscar doctor`, or use --kv-cache-dtype auto"
    )


def select(device_type: str, fmt) -> ModuleType:
    """The module that implements the operations for ``fmt`` on ``device_type``.

    Raises ``RuntimeError`` with the reasons when no kernels can run there.
    """
    if isinstance(fmt, LosslessFormat):
        from vllm_oscar.ops import reference

        return reference
    return _select(device_type, fmt.head_dim)


def select_prefill(device_type: str, kernels: ModuleType) -> ModuleType | None:
    """FlashAttention over gathered pieces for long queries beside the CUDA kernels, where it runs."""
    if device_type != "cuda" or not kernels.__name__.endswith(".cuda"):
        return None
    module, reason = load("dense_prefill")
    if module is None:
        logger.warning("OScaR prefill uses its own kernels; FlashAttention is not available: %s", reason)
    return module


def graph_support(device_type: str, fmt):
    """CUDA-graph support of the kernels that :func:`select` would choose."""
    from vllm.v1.attention.backend import AttentionCGSupport

    return AttentionCGSupport[getattr(select(device_type, fmt), "GRAPH_SUPPORT", "NEVER")]
