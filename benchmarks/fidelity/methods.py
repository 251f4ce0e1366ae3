# SPDX-License-Identifier: Apache-2.0
"""The KV-cache formats that are compared, each as a function on 128-token blocks.

A method takes the keys (after RoPE) and values of full blocks and returns what its
cache would give back. OScaR configurations go through the product's own encoder and
decoder; only foreign formats are modelled here. Every method is charged for all the
bytes it stores: codes, scales, zeros, norms and padding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, NormScope, OscarConfig, ParamType
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.hadamard import rotate, unrotate
from vllm_oscar.core.reference import decode_pages, encode_pages
from vllm_oscar.core.ring import RingType, from_int8, to_int8

Blocks = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A KV-cache format.

    Attributes:
        name: unique; also the key of measured records.
        family: what it is drawn and grouped as.
        quantize: ``(key, value, first)`` with key, value ``[N, 128, H, D]`` and first
            bool ``[N]`` (which blocks begin a sequence) to float32 of the same shapes.
        bytes_per_token: head_dim to bytes per token and KV head, K and V together.
        key_window, value_window: how many tokens before a query it reads from its recent
            store, even if their blocks are quantized.
        recent: keys or values ``[..., D]`` to what that store gives back; None: the same.
        layers: which layers have it; the others are exact: ``"all"``, ``"full"`` or ``"sliding"``, those without or
            with a sliding window.
        note: a remark for the table.
        definition: every parameter, so that records of another definition are told apart.
    """

    name: str
    family: str
    quantize: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Blocks]
    bytes_per_token: Callable[[int], float]
    key_window: int = 0
    value_window: int = 0
    recent: Callable[[torch.Tensor], torch.Tensor] | None = None
    layers: str = "all"
    note: str = ""
    definition: str = ""

    def bits(self, head_dim: int) -> float:
        """Bits per K or V element, everything included."""
        return self.bytes_per_token(head_dim) * 8 / (2 * head_dim)


# ---- OScaR: the real codec ------------------------------------------------------
def _definition(config: OscarConfig) -> str:
    """All numbers of a configuration, its name aside."""
    parts = (getattr(config, f.name) for f in fields(config) if f.name != "name")
    return " ".join(str(getattr(part, "value", part)) for part in parts)


def oscar(config: OscarConfig, family: str = "ablation", rotation: bool = True, note: str = "") -> Method:
    """A configuration of the page format, encoded and decoded by the reference codec.

    ``rotation=False`` undoes the codec's rotation beforehand, so that it quantizes the
    keys and values as the model made them.
    """

    def quantize(key, value, first):
        fmt = PageFormat(config, key.shape[-1])
        if not rotation:
            key, value = unrotate(key), unrotate(value)
        key, value = decode_pages(encode_pages(key, value, fmt, first), fmt, first)
        return (key, value) if rotation else (rotate(key), rotate(value))

    return Method(
        name=config.name,
        family=family,
        quantize=quantize,
        bytes_per_token=lambda dim: PageFormat(config, dim).bytes_per_token,
        key_window=config.window,
        value_window=config.window,
        recent=_int8_ring if config.ring is RingType.INT8 else None,
        note=note,
        definition=_definition(config) + ("" if rotation else " unrotated"),
    )


def _int8_ring(x: torch.Tensor) -> torch.Tensor:
    return from_int8(*to_int8(x))


def _rotated_int8_ring(x: torch.Tensor) -> torch.Tensor:
    return unrotate(_int8_ring(rotate(x)))


PARTS = ("keys", "values", "window", "first token")


def parts(method: Method) -> dict[str, Method]:
    """``method`` with all but one of :data:`PARTS` exact.

    ``keys`` and ``values`` are those in pages, the first token aside; ``window`` is what the ring gives back.
    """

    def first_token(key, first):
        return first[:, None, None, None] & (torch.arange(PAGE_TOKENS, device=key.device) == 0)[:, None, None]

    def quantize(part: str):
        def one(key, value, first) -> Blocks:
            if part == "window":
                return key, value
            coded, at = method.quantize(key, value, first), first_token(key, first)
            key_at = at if part == "first token" else ~at & (part == "keys")
            value_at = at if part == "first token" else ~at & (part == "values")
            return torch.where(key_at, coded[0], key.float()), torch.where(value_at, coded[1], value.float())

        return one

    return {
        part: replace(
            method,
            name=f"{method.name}: {part}",
            quantize=quantize(part),
            recent=method.recent if part == "window" else None,
            definition=f"{method.definition} {part} alone",
        )
        for part in PARTS
    }


# ---- foreign formats ----------------------------------------------------------------
def _bf16(key, value, first) -> Blocks:
    return key.bfloat16().float(), value.bfloat16().float()


def _fp8(key, value, first) -> Blocks:
    """vLLM's fp8 without calibrated scales: scale 1 for the whole tensor."""
    return tuple(x.clamp(-448, 448).to(torch.float8_e4m3fn).float() for x in (key, value))


def _affine(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Asymmetric min/max over groups of the last dimension, fp16 scale and zero."""
    parts = x.float().unflatten(-1, (-1, min(group, x.shape[-1])))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    zero = low.half().float()
    return (((parts - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero).flatten(-2)


def _int4(key, value, first) -> Blocks:
    """One scale and zero per token and head (vLLM's int4_per_token_head)."""
    return _affine(key, 4, 1 << 20), _affine(value, 4, 1 << 20)


def _quarot(key, value, first) -> Blocks:
    """Hadamard rotation, then 2 bits per token in groups of 32 channels, keys and values alike."""
    return unrotate(_affine(rotate(key), 2, 32)), unrotate(_affine(rotate(value), 2, 32))


# ---- TurboQuant ----------------------------------------------------------------
_CODEBOOKS = Path(__file__).with_name("turboquant_codebooks.json")
TURBOQUANT_PRESETS = {"turboquant_4bit_nc": (4, 4), "turboquant_k3v4_nc": (3, 4), "turboquant_3bit_nc": (3, 3)}


@cache
def turboquant_centroids(head_dim: int, bits: int) -> torch.Tensor:
    """vLLM's codebook. Where vLLM is not installed, its values as saved beside this file."""
    try:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids

        return get_centroids(head_dim, bits)
    except ImportError:
        saved = json.loads(_CODEBOOKS.read_text())["centroids"]
        return torch.tensor(saved[f"{head_dim}x{bits}"])


def turboquant_replay(key, value, key_bits: int, value_bits: int) -> Blocks:
    """vLLM's TurboQuant store and dequantization kernels, step by step in PyTorch.

    The kernels are Triton and need a GPU; the test compares the two in Triton's interpreter.
    """
    dim = key.shape[-1]
    centroids = turboquant_centroids(dim, key_bits).to(key.device)
    norm = key.float().norm(dim=-1, keepdim=True)
    code = torch.bucketize(rotate(key.float() / (norm + 1e-8)), (centroids[1:] + centroids[:-1]) / 2, right=True)
    unit = centroids[code]
    unit = unit / (unit.square().sum(-1, keepdim=True) + 1e-16).sqrt()  # norm correction
    key = unrotate((norm.half().float() * unit).half())
    value = value.float()
    low, levels = value.amin(-1, keepdim=True), 2**value_bits - 1
    step = ((value.amax(-1, keepdim=True) - low) / levels).clamp(min=1e-8)
    code = ((value - low) / step + 0.5).floor().clamp(0, levels)
    return key, (code * step.half().float() + low.half().float()).half().float()


def _turboquant(name: str) -> Method:
    key_bits, value_bits = TURBOQUANT_PRESETS[name]

    def nbytes(dim: int) -> float:  # TurboQuantConfig.slot_size_aligned
        size = -(-dim * key_bits // 8) + 2 + -(-dim * value_bits // 8) + 4
        return size + size % 2

    note = "all layers; vLLM itself keeps the two first and two last layers in 16 bit"
    return Method(
        name, "TurboQuant", lambda k, v, first: turboquant_replay(k, v, key_bits, value_bits), nbytes, note=note
    )


# ---- the registry ---------------------------------------------------------------------
def _foreign() -> list[Method]:
    kivi = replace(PRESETS["oscar_paper"], name="kivi", norm=NormScope.NONE, integer_zero=False)
    return [
        Method("bf16", "16 bit", _bf16, lambda dim: 4.0 * dim, note="rounding of the cache alone"),
        Method("fp8", "fp8", _fp8, lambda dim: 2.0 * dim, note="e4m3, scale 1"),
        Method("int4", "int4", _int4, lambda dim: dim + 8.0, note="per token and head"),
        replace(
            oscar(kivi, "KIVI", rotation=False, note="keys per channel g32, values per token g32, residual 128"),
            value_window=128,
        ),
        Method("quarot", "QuaRot", _quarot, lambda dim: dim / 2 + 8 * dim / 32, note="rotated, 2 bits per token, g32"),
        *map(_turboquant, TURBOQUANT_PRESETS),
    ]


def _ablations() -> list[Method]:
    paper, best, small = PRESETS["oscar_paper"], PRESETS["oscar"], PRESETS["oscar_small"]

    def change(config: OscarConfig, label: str, **fields) -> Method:
        return oscar(replace(config, name=f"{config.name}:{label}", **fields))

    none, joint, fp16 = NormScope.NONE, NormScope.JOINT, ParamType.FP16
    bare = {"norm": none, "key_gain": False, "first_token": False}  # both are stored in the norms
    return [
        # what each part of the paper's method gives
        oscar(replace(paper, name="oscar_paper:no rotation no norm", norm=none), rotation=False),
        oscar(replace(paper, name="oscar_paper:no rotation"), rotation=False),
        change(paper, "no norm", norm=none),
        change(paper, "float zero", integer_zero=False),
        change(paper, "head norm", norm=NormScope.HEAD),
        change(paper, "window", window=128),
        change(paper, "first token", first_token=True),
        change(paper, "gains", key_gain=True, value_gain=True),
        # what each lever of ours gives
        change(best, "no window", window=0),
        change(best, "window 128", window=128),
        change(best, "16-bit ring", ring=RingType.MODEL),
        change(best, "16-bit ring of 128", ring=RingType.MODEL, window=128),
        replace(
            change(best, "rotated ring"), recent=_rotated_int8_ring, definition=_definition(best) + " rotated ring"
        ),
        change(best, "no first token", first_token=False),
        change(best, "no key gain", key_gain=False),
        change(best, "no value gain", value_gain=False),
        change(best, "no norm, key gain, first token", **bare),
        change(best, "joint norm", norm=joint),
        change(best, "integer zero", integer_zero=True),
        change(best, "fp16 parameters", key_param=fp16),
        change(best, "2-bit keys", key_bits=2),
        change(best, "4-bit keys", key_bits=4),
        change(best, "4-bit values", value_bits=4, value_clip=1.0),
        change(best, "key g32", key_group=32),
        change(best, "key g128 no first token", key_group=128, first_token=False),
        change(best, "value g32", value_group=32),
        change(best, "value g64", value_group=64),
        change(small, "no window", window=0),
        change(small, "no first token", first_token=False),
        change(small, "no gains", key_gain=False, value_gain=False),
        change(small, "no norm, key gain, first token", **bare),
        change(small, "no key gain", key_gain=False),
    ]


def windows() -> list[Method]:
    """What sliding windows lose: the default preset in all layers, in full ones and in those with windows alone.

    The preset's own window holds sliding windows of up to 256 tokens in 8 bits. The last method reads them from
    pages as far as blocks are full, as a request does right after a prefix hit.
    """
    best = oscar(PRESETS["oscar"], "OScaR")
    paged = oscar(replace(PRESETS["oscar"], window=0), "OScaR")

    def part(method: Method, name: str, layers: str, definition: str) -> Method:
        definition, note = f"{method.definition} {definition}", f"bytes of layers that are quantized, the {layers} ones"
        return replace(method, name=name, layers=layers, definition=definition, note=note)

    return [
        best,
        part(best, SKIP_WINDOWS, "full", "full layers"),
        part(best, "oscar:windows alone", "sliding", "windows"),
        part(paged, "oscar:windows alone, from pages", "sliding", "windows"),
    ]


SKIP_WINDOWS = "oscar:16-bit windows"
"""In vLLM: ``--kv-cache-dtype oscar --kv-cache-dtype-skip-layers sliding_window``."""

_KEY_CLIPS = {2: (0.75, 0.8, 0.85, 0.9), 3: (0.85, 0.9, 0.95, 1.0), 4: (0.9, 0.95, 1.0)}
_VALUE_CLIPS = {2: (0.6, 0.65, 0.7, 0.75), 3: (0.8, 0.85, 0.9, 0.95), 4: (0.9, 0.95, 1.0)}


def grid() -> list[Method]:
    """Configurations for the Pareto front, bits against loss: all bit widths, and clips for those of presets."""
    key_params = ((32, ParamType.E4M3), (64, ParamType.E4M3), (64, ParamType.FP16))
    chosen = {(c.key_bits, c.value_bits, c.key_group, c.key_param): c for c in PRESETS.values() if c.first_token}
    # where no preset is, the clips of a preset with as many bits
    key_clip = {c.key_bits: c.key_clip for c in chosen.values()}
    value_clip = {c.value_bits: c.value_clip for c in chosen.values()}
    methods = []
    for key_bits, value_bits, (group, param) in product((2, 3, 4), (2, 3, 4), key_params):
        clips = [(key_clip[key_bits], value_clip[value_bits])]
        if (key_bits, value_bits, group, param) in chosen:
            clips += [c for c in product(_KEY_CLIPS[key_bits], _VALUE_CLIPS[value_bits]) if c != clips[0]]
        for k, v in clips:
            name = f"k{key_bits} g{group} {param.value} {k} v{value_bits} {v}"
            config = OscarConfig(name, key_bits, value_bits, group, key_param=param, key_clip=k, value_clip=v)
            methods.append(oscar(config, family="grid"))
    return methods


def registry() -> dict[str, Method]:
    """All methods by name: foreign formats, presets, ablations."""
    presets = [
        oscar(config, "OScaR (paper)", note="its one norm per token takes 2 bytes in every head's page")
        if name == "oscar_paper"
        else oscar(config, "OScaR")
        for name, config in PRESETS.items()
    ]
    return {method.name: method for method in [*_foreign(), *presets, *_ablations()]}


def known() -> dict[str, Method]:
    """All that a record may name: of the registry, and those of sliding windows, which other models do not have."""
    return registry() | {method.name: method for method in windows()}


MAIN = (
    "bf16 fp8 int4 turboquant_4bit_nc turboquant_k3v4_nc turboquant_3bit_nc kivi quarot "
    "oscar_paper oscar oscar_small oscar_large oscar_4bit"
).split()
"""The methods of the main table; the others are ablations and the grid."""
