# SPDX-License-Identifier: Apache-2.0
"""Capacity arithmetic: what a memory budget holds, from a model's ``config.json`` alone.

The same sums that vLLM's block manager does, so the numbers match its log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.layers import uneven_layers

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


def parse_bytes(text: str) -> int:
    """``"24GiB"`` to bytes. Raises ``ValueError`` for anything else."""
    number = text.strip().rstrip("BbIiKkMmGgTt")
    unit = text.strip()[len(number) :].upper()
    unit = {"K": "KIB", "M": "MIB", "G": "GIB", "T": "TIB"}.get(unit, unit)
    try:
        size = int(float(number) * _UNITS[unit])
        if size >= 0:
            return size
    except (KeyError, ValueError, OverflowError):
        pass
    raise ValueError(f"cannot read {text!r} as a size; write for example 24GiB or 800MiB")


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its KV cache (per tensor-parallel rank)."""

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @staticmethod
    def load(path: str | Path, tensor_parallel: int = 1) -> ModelShape:
        """Read a model folder's ``config.json``, or that file.

        Raises ``ValueError`` in one sentence if it is not there, not a decoder, or one that OScaR cannot serve.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(f"{path} is neither a model folder with a config.json nor such a file")
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        config = config.get("text_config", config)
        try:
            heads = config["num_attention_heads"]
            layers = config["num_hidden_layers"]
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
        except KeyError as missing:
            raise ValueError(f"{file} has no {missing}; only decoder language models can be planned") from None
        sliding = config.get("sliding_window") and config.get("use_sliding_window", True)
        other = set(config.get("layer_types") or []) - {"full_attention"}
        if config.get("is_encoder_decoder") or config.get("kv_lora_rank") or sliding or other:
            raise ValueError(
                f"{file} describes a model that OScaR does not support (encoder, MLA, sliding windows or layers "
                "without attention); see the support matrix in README.md"
            )
        uneven = uneven_layers(config)
        if uneven:
            raise ValueError(f"{file} describes a model that OScaR does not support: {uneven}; choose another model")
        kv_heads = config.get("num_key_value_heads") or heads
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return ModelShape(layers, max(1, kv_heads // tensor_parallel), head_dim, _ITEMSIZE.get(dtype, 2))


@dataclass(frozen=True)
class Capacity:
    """What fits, for one KV-cache format. Sizes in bytes.

    Attributes:
        name: ``--kv-cache-dtype``.
        bits: effective bits per element.
        blocks: blocks in the budget.
        tail_blocks: blocks of a request's ring (OScaR only).
        requests: concurrent requests of the planned context, as vLLM reports it.
        tokens: tokens that vLLM reports as KV cache size.
    """

    name: str
    bits: float
    blocks: int
    tail_blocks: int
    requests: float
    tokens: int


def capacity(
    name: str, bytes_per_token: int, tail_blocks: int, shape: ModelShape, memory: int, context: int
) -> Capacity:
    """``bytes_per_token``: per layer and KV head, K and V together."""
    block = bytes_per_token * PAGE_TOKENS * shape.kv_heads * shape.layers
    blocks = memory // block
    requests = blocks / (-(-context // PAGE_TOKENS) + tail_blocks)
    bits = bytes_per_token * 8 / (2 * shape.head_dim)
    return Capacity(name, bits, blocks, tail_blocks, requests, int(requests * context))


def plan(shape: ModelShape, memory: int, context: int, speculative_tokens: int = 0) -> list[Capacity]:
    """Capacity of ``auto`` (the model's dtype), fp8 and every preset that supports the head size."""
    wide = 2 * shape.head_dim
    rows = [
        capacity("auto", wide * shape.itemsize, 0, shape, memory, context),
        capacity("fp8", wide, 0, shape, memory, context),
    ]
    if shape.head_dim in SUPPORTED_HEAD_DIMS:
        for name in PRESETS:
            fmt = PageFormat.preset(name, shape.head_dim)
            tail = fmt.ring_pages(shape.itemsize, speculative_tokens)
            rows.append(capacity(name, fmt.bytes_per_token, tail, shape, memory, context))
    return rows
