# SPDX-License-Identifier: Apache-2.0
"""Presets: what a page of quantized KV cache contains, and why.

A preset is the value of ``--kv-cache-dtype``. It fixes every number that the
encoder, the kernels and the capacity arithmetic need; nothing else in the
package chooses a bit width or a group size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vllm_oscar.core.ring import RingType

PAGE_TOKENS = 128
"""Tokens per page. A page is also the KV-cache block of vLLM."""

SUPPORTED_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


class ParamType(str, Enum):
    """Storage type of the key scales and zeros."""

    FP16 = "fp16"
    E4M3 = "e4m3"

    @property
    def nbytes(self) -> int:
        return 2 if self is ParamType.FP16 else 1


class NormScope(str, Enum):
    """Over what the norm of a key is taken before it is quantized (paper, section 3.3)."""

    HEAD = "head"  # one norm per token and KV head: invariant under tensor parallelism
    JOINT = "joint"  # one norm per token over all KV heads of the rank, as in the paper
    NONE = "none"


@dataclass(frozen=True)
class OscarConfig:
    """Numerics of one preset. Immutable and validated.

    Attributes:
        name: the ``--kv-cache-dtype`` value.
        key_bits, value_bits: bits per code, 2, 3 or 4.
        key_group: consecutive tokens that share one key scale and zero per channel.
        value_group: consecutive channels that share one value scale and zero per
            token; larger than the head size means the whole head.
        key_param: storage type of key scales and zeros. Value scales and zeros are
            fp16, since values are not normalised and may have any magnitude.
        norm: scope of the key norm.
        key_clip, value_clip: the quantized range as a fraction of min..max, about
            its centre. 1.0 means no clipping.
        key_gain, value_gain: store a norm, or a value scale and zero, that undo the
            shrinkage by clipping and rounding. The encoder's business alone.
        integer_zero: round zero points to whole codes (only to reproduce the paper).
        window: how many of the newest tokens are read from the ring even when their pages
            are already quantized; 0: those of the open block alone.
        ring: in what the ring holds them.
        first_token: in the first page of a sequence all tokens share the key parameters
            of group 0, and the bytes of group 1 hold key and value of token 0 in 8 bits:
            the attention sink, which most heads read most, at no cost in memory.
    """

    name: str
    key_bits: int = 3
    value_bits: int = 2
    key_group: int = 64
    value_group: int = 256
    key_param: ParamType = ParamType.E4M3
    norm: NormScope = NormScope.HEAD
    key_clip: float = 0.92
    value_clip: float = 0.7
    key_gain: bool = True
    value_gain: bool = True
    integer_zero: bool = False
    window: int = 256
    ring: RingType = RingType.INT8
    first_token: bool = True

    def __post_init__(self) -> None:
        for field in ("key_bits", "value_bits"):
            if getattr(self, field) not in (2, 3, 4):
                raise ValueError(f"{field} must be 2, 3 or 4, not {getattr(self, field)}")
        if self.key_group not in (32, 64, 128):
            raise ValueError(f"key_group must be 32, 64 or 128, not {self.key_group}")
        if self.value_group not in (32, 64, 128, 256):
            raise ValueError(f"value_group must be 32, 64, 128 or 256, not {self.value_group}")
        if self.window < 0:
            raise ValueError(f"window must not be negative, and is {self.window}")
        for field in ("key_clip", "value_clip"):
            if not 0.0 < getattr(self, field) <= 1.0:
                raise ValueError(f"{field} must be in (0, 1], not {getattr(self, field)}")
        for field in ("key_gain", "first_token"):
            if getattr(self, field) and self.norm is NormScope.NONE:
                raise ValueError(f"{field} is stored in the key norms: norm must not be none")
        if self.first_token and self.key_group == PAGE_TOKENS:
            raise ValueError("first_token needs a second key group: key_group must be 32 or 64")

    def ring_capacity(self, drafts: int = 0) -> int:
        """Tokens that a ring must hold: the window or the open block, the token that a decode step
        writes before it attends, and ``drafts`` that may be rejected afterwards."""
        return max(self.window, PAGE_TOKENS) + 1 + drafts


PRESETS: dict[str, OscarConfig] = {
    config.name: config
    for config in (
        OscarConfig("oscar"),
        OscarConfig("oscar_small", key_bits=2, key_group=32, key_clip=0.83, value_clip=0.65),
        # The longest window, in steps of 32, that a ring of 7 pages holds at every head size.
        OscarConfig("oscar_large", value_bits=3, value_clip=0.9, window=352),
        OscarConfig("oscar_4bit", key_bits=4, value_bits=4, key_clip=1.0, value_clip=1.0),
        OscarConfig(
            "oscar_paper",
            key_bits=2,
            key_group=32,
            value_group=32,
            key_param=ParamType.FP16,
            norm=NormScope.JOINT,
            key_clip=1.0,
            value_clip=1.0,
            key_gain=False,
            value_gain=False,
            integer_zero=True,
            window=0,
            ring=RingType.MODEL,
            first_token=False,
        ),
    )
}

# Divergence (KL) from exact attention against that of `oscar_paper` on SmolLM2-135M-Instruct, at 2,048 and at
# 8,192 tokens (docs/fidelity.md).
MEASURED_LOSS: dict[str, tuple[float, float]] = {
    "oscar": (0.07, 0.08),
    "oscar_small": (0.19, 0.21),
    "oscar_large": (0.04, 0.05),
    "oscar_4bit": (0.02, 0.02),
    "oscar_paper": (1.0, 1.0),
}


def get_preset(name: str) -> OscarConfig:
    """The preset called ``name``; ``ValueError`` naming the known ones otherwise."""
    try:
        return PRESETS[name]
    except KeyError:
        known = ", ".join(PRESETS)
        raise ValueError(f"unknown OScaR preset {name!r}; use one of: {known}") from None
