# SPDX-License-Identifier: Apache-2.0
"""Capacity arithmetic: what a memory budget holds, from a model's ``config.json`` alone.

The same sums that vLLM's block manager does, so the numbers match its log.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.layers import sliding_windows, uneven_layers
from vllm_oscar.tools.states import ITEMSIZE, States, attention_layers, states

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_VLLM_BLOCK = 16
"""Tokens of a block without OScaR, on a GPU."""


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
    """What of a model decides the size of its KV cache (per tensor-parallel rank).

    Attributes:
        layers: those with attention.
        kv_heads, head_dim: of each layer.
        itemsize: bytes of an element in the model's dtype.
        windows: the sliding windows of those layers that have one, in tokens.
        states: the layers that keep a state instead of a KV cache, if there are such.
    """

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int
    windows: tuple[int, ...] = ()
    states: States | None = None

    def with_drafter(self, layers: int) -> ModelShape:
        """The same with a drafter's attention layers, each as large as one of the model's."""
        return replace(self, layers=self.layers + layers)

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
            config = text_config(file)
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        try:
            heads = config["num_attention_heads"]
            layers = attention_layers(config)
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
        except KeyError as missing:
            raise ValueError(f"{file} has no {missing}; only decoder language models can be planned") from None
        unsupported = config.get("is_encoder_decoder") or config.get("kv_lora_rank") or not layers
        unsupported |= bool(config.get("num_kv_shared_layers")) or "chunked_attention" in config.get("layer_types", ())
        if unsupported:
            raise ValueError(
                f"{file} describes a model that OScaR does not support (encoder, MLA, no attention, chunked attention, "
                "or layers that share a KV cache); see the support matrix in README.md"
            )
        uneven = uneven_layers(config)
        if uneven:
            raise ValueError(f"{file} describes a model that OScaR does not support: {uneven}; choose another model")
        windows = tuple(window for window in sliding_windows(config) if window)
        if len(windows) == layers:
            raise ValueError(
                f"{file} describes a model that OScaR does not support: all its layers have a sliding window; "
                f"serve contexts of {windows[0]:,} tokens with --disable-sliding-window, or choose another model"
            )
        kv_heads = config.get("num_key_value_heads") or heads
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        itemsize = ITEMSIZE.get(dtype, 2)
        kept = states(config, itemsize, tensor_parallel)
        return ModelShape(layers, max(1, kv_heads // tensor_parallel), head_dim, itemsize, windows, kept)


def text_config(file: Path) -> dict:
    """The language model's part of a ``config.json``, with transformers' defaults for what it leaves out.

    Raises ``ValueError`` if it is not JSON.
    """
    config = json.loads(file.read_text())
    outer = {name: config[name] for name in ("dtype", "torch_dtype") if name in config}
    text = outer | config.get("text_config", config)
    complete = {"num_attention_heads", "num_hidden_layers"} <= text.keys()
    if complete and ("layer_types" in text or not text.get("sliding_window")):
        return text
    try:
        from transformers import CONFIG_MAPPING  # slow, and there wherever vLLM is
    except ImportError:
        return text
    if config.get("model_type") not in CONFIG_MAPPING:
        return text
    defaults = CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config().to_dict()
    return {name: value for name, value in defaults.items() if value is not None} | text


@dataclass(frozen=True)
class Capacity:
    """What fits, for one KV-cache format. Sizes in bytes.

    Attributes:
        name: ``--kv-cache-dtype``.
        bits: effective bits per element.
        block_tokens: tokens of a block.
        blocks: blocks in the budget.
        tail_blocks: blocks of a request's ring (OScaR only), for each group of layers.
        requests: concurrent requests of the planned context, as vLLM reports it.
        tokens: tokens that vLLM reports as KV cache size.
    """

    name: str
    bits: float
    block_tokens: int
    blocks: int
    tail_blocks: int
    requests: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """What requests are like.

    Attributes:
        context: tokens of each.
        batched_tokens: of all of them in a step, ``--max-num-batched-tokens``; matters with sliding windows.
        drafts: tokens drafted for each in a step.
        prefix_caching: states of state-space layers are kept for hits, too.
    """

    context: int
    batched_tokens: int = 8192
    drafts: int = 0
    prefix_caching: bool = True

    @property
    def in_flight(self) -> int:
        """Tokens in steps under way, two with asynchronous scheduling."""
        return 2 * self.batched_tokens

    def blocks(self, window: int | None, block_tokens: int) -> int:
        """Blocks that a request takes in a layer with this sliding window, or None."""
        if window is None:
            return -(-self.context // block_tokens)
        # Those of its own that are in flight are not yet freed, and the window begins anywhere in a block.
        return -(-min(window - 1 + self.in_flight, self.context) // block_tokens) + 1

    @property
    def states(self) -> int:
        """Blocks that a request takes in a layer with a state: kept and running, and one for each draft."""
        return (2 if self.prefix_caching else 1) + self.drafts


def _group_size(layers: list[int]) -> int:
    """Layers in each of vLLM's KV-cache groups, which are equally large, for as many ``layers`` of each kind."""
    return max(layers) if max(layers) < 1.5 * min(layers) else min(layers)


def capacity(
    name: str, bytes_per_token: int, step: int, tail_pages: int, shape: ModelShape, memory: int, load: Load
) -> Capacity:
    """``bytes_per_token``: per layer and KV head, K and V together. ``step``: tokens of the smallest block."""
    token, block_tokens, per_request = bytes_per_token * shape.kv_heads, step, 0
    kinds = {None: shape.layers - len(shape.windows), **Counter(shape.windows)}
    sizes = [n for n in kinds.values() if n]
    if shape.states:  # a block is large enough for a state
        block_tokens = step * -(-shape.states.nbytes(load.drafts) // (step * token))
        sizes.append(shape.states.layers)
    group = _group_size(sizes)
    if shape.states:
        per_request += -(-shape.states.layers // group) * load.states
    # A request has its own blocks, and a ring, in each group.
    tail = -(-tail_pages // (block_tokens // step))
    per_request += sum(-(-n // group) * (load.blocks(w, block_tokens) + tail) for w, n in kinds.items())
    return _capacity(name, shape, bytes_per_token, block_tokens, memory // (token * block_tokens * group), tail,
                     per_request, load)  # fmt: skip


def capacity_beside(
    name: str, bytes_per_token: int, tail_pages: int, skipped: Skipped, shape: ModelShape, memory: int, load: Load
) -> Capacity:
    """The same for OScaR beside ``skipped`` layers, whose pages are packed with ours into blocks of 128 tokens."""
    ours, wide = (n * shape.kv_heads * PAGE_TOKENS for n in (bytes_per_token, 2 * shape.head_dim * shape.itemsize))
    layers = shape.layers - skipped.layers - (len(shape.windows) if skipped.windows else 0)
    block = layers * ours + skipped.layers * wide
    per_request = load.blocks(None, PAGE_TOKENS) + tail_pages
    if skipped.windows:  # as many in a group as fit into a block
        fit = max(1, block // wide)
        block = max(block, min(fit, max(Counter(shape.windows).values())) * wide)
        per_request += sum(-(-n // fit) * load.blocks(w, PAGE_TOKENS) for w, n in Counter(shape.windows).items())
    mean = (bytes_per_token * layers + 2 * shape.head_dim * shape.itemsize * (shape.layers - layers)) / shape.layers
    return _capacity(name, shape, mean, PAGE_TOKENS, memory // block, tail_pages, per_request, load)


def _capacity(name, shape, bytes_per_token, block_tokens, blocks, tail, per_request, load) -> Capacity:
    requests = blocks / per_request
    bits = bytes_per_token * 8 / (2 * shape.head_dim)
    return Capacity(name, bits, block_tokens, blocks, tail, requests, int(requests * load.context))


@dataclass(frozen=True)
class Skipped:
    """Layers in the model's dtype beside OScaR's: some that see all tokens, or all that have a sliding window."""

    layers: int = 0
    windows: bool = False

    @staticmethod
    def parse(text: str, shape: ModelShape) -> Skipped:
        """``"0,1,34,35"`` or ``"sliding_window"``. Raises ``ValueError`` in one sentence for what cannot be served."""
        names = set(text.split(","))
        if shape.states:
            raise ValueError("layers cannot be skipped beside state-space layers; leave out --skip-layers")
        if names == {"sliding_window"}:
            return Skipped(windows=bool(shape.windows))
        unknown = names - {str(layer) for layer in range(shape.layers)}
        if unknown:
            raise ValueError(f"--skip-layers {text}: name layers by numbers from 0 to {shape.layers - 1}, or all that "
                             "have a window by sliding_window")  # fmt: skip
        if len(names) == shape.layers:
            raise ValueError(f"--skip-layers {text}: these are all layers of the model; skip fewer")
        if shape.windows:
            raise ValueError(f"--skip-layers {text}: of models with sliding windows only sliding_window is planned")
        return Skipped(len(names))


def plan(shape: ModelShape, memory: int, load: Load, skipped: Skipped | None = None) -> list[Capacity]:
    """Capacity of ``auto`` (the model's dtype), fp8 and every preset that supports the head size.

    ``shape``: with the drafter's layers, if there is one. ``memory``: bytes. With ``skipped`` layers without fp8, whose
    blocks vLLM makes otherwise then. Raises ``ValueError`` in one sentence.
    """
    wide = 2 * shape.head_dim
    rows = [capacity("auto", wide * shape.itemsize, _VLLM_BLOCK, 0, shape, memory, load)]
    if not skipped:
        rows.append(capacity("fp8", wide, _VLLM_BLOCK, 0, shape, memory, load))
    for name in PRESETS if shape.head_dim in SUPPORTED_HEAD_DIMS else ():
        fmt = PageFormat.preset(name, shape.head_dim)
        tail = fmt.ring_pages(shape.itemsize, load.drafts)
        if skipped:
            rows.append(capacity_beside(name, fmt.bytes_per_token, tail, skipped, shape, memory, load))
        else:
            rows.append(capacity(name, fmt.bytes_per_token, PAGE_TOKENS, tail, shape, memory, load))
    return rows
