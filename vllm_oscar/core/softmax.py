# SPDX-License-Identifier: Apache-2.0
"""How a layer turns logits into weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Softmax:
    """From logits to weights: the same for all tokens of a layer.

    Attributes:
        scale: of the logits.
        sliding_window: a token sees itself and ``sliding_window - 1`` before it; None: all before it.
        soft_cap: a scaled logit ``s`` becomes ``soft_cap * tanh(s / soft_cap)``; None: it stays.
        sinks: ``[Hq]`` float32, one logit per query head that has a weight but no value
            (neither scaled nor capped); None: there is none.
    """

    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"a sliding window of {self.sliding_window} tokens sees nothing")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"a soft-cap of {self.soft_cap} is not positive")

    def first_visible(self, position: int) -> int:
        """First position that the token at ``position`` sees."""
        return first_visible(self.sliding_window, position)


def first_visible(sliding_window: int | None, position: int) -> int:
    """First position that the token at ``position`` sees in a layer with this sliding window, or None."""
    return 0 if sliding_window is None else max(0, position + 1 - sliding_window)
