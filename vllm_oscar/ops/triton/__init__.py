# SPDX-License-Identifier: Apache-2.0
"""The cache operations as Triton kernels: any NVIDIA GPU from sm_80, AMD, or the interpreter.

See :class:`vllm_oscar.ops.step.Kernels`. No operation synchronizes with the device or
looks at tensor contents on the host, and every grid depends on shapes and
``max_query_len`` alone, so all of them can be captured in CUDA graphs once a step of the
same shapes has compiled them.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from vllm_oscar.core.format import PageFormat
from vllm_oscar.ops.step import Cache, Limits, Step

GRAPH_SUPPORT = "UNIFORM_BATCH"


def available() -> tuple[bool, str]:
    """Whether Triton is installed and has a GPU, or runs in its interpreter, and if not, why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return True, ""
    return False, "no GPU is visible to torch"


def reserve(fmt: PageFormat, limits: Limits) -> None:
    """Make the rotation tables, which a graph being captured could not copy to the device."""
    from vllm_oscar.ops.triton import layout

    device = torch.empty(0, device=limits.device).device  # with its index, as tensors have it
    for order in ("natural", "key", "value"):
        layout.rotation(fmt.head_dim, order, device)


def store_pages(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Quantize every block that becomes full in this step, from ring and new tokens."""
    from vllm_oscar.ops.triton import store

    if step.requests and key.shape[0]:
        store.store_pages(step, cache, key, value)


def attention(
    step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``.

    If no request has more than 16 tokens, all take the split-KV kernel. Otherwise it takes
    the requests of up to 16 tokens and the prefill kernel the others.
    """
    from vllm_oscar.ops.triton import decode, prefill

    if not step.requests or not query.shape[0]:
        return
    tensors, longest = (step, cache, query, key, value, out), decode.MAX_QUERY
    if step.max_query_len <= longest:
        decode.decode(*tensors, mixed=False)
    elif step.requests == 1:  # the bound may be loose
        prefill.prefill(*tensors, min_query=1)
    else:
        prefill.prefill(*tensors, min_query=longest + 1)
        decode.decode(*tensors, mixed=True)


def write_ring(step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the newest tokens of each request, at most the ring's capacity."""
    from vllm_oscar.ops.triton import store

    if step.requests and key.shape[0]:
        store.write_ring(step, cache, key, value)
