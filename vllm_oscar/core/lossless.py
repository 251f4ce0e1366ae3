# SPDX-License-Identifier: Apache-2.0
"""A codec that loses nothing, behind the same pages, ring and metadata.

A test mode (``VLLM_OSCAR_CODEC=lossless``): with it every output must equal
``--kv-cache-dtype auto``, which proves the whole integration apart from the
quantizer. It saves no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_oscar.core.config import PAGE_TOKENS, OscarConfig
from vllm_oscar.core.ring import RingType

_PADDING = 32
"""Bytes that a token has too many, so that pages are never as large as those of layers in the model's dtype."""


@dataclass(frozen=True)
class LosslessFormat:
    """Pages of unquantized K and V; the counterpart of :class:`vllm_oscar.core.format.PageFormat`."""

    config: OscarConfig
    head_dim: int
    itemsize: int

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.head_dim * self.itemsize + _PADDING

    @property
    def page_bytes(self) -> int:
        return self.bytes_per_token * PAGE_TOKENS

    ring_type = RingType.MODEL  # whatever the preset says

    def ring_tokens_per_page(self, itemsize: int) -> int:
        """As few as with a compressed page, so that the ring still spans several pages."""
        return 24

    def ring_pages(self, itemsize: int, drafts: int = 0) -> int:
        """Pages of a request's ring."""
        return -(-self.config.ring_capacity(drafts) // self.ring_tokens_per_page(itemsize))

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``[N, 128, H, D]`` key and value to uint8 ``[N, H, page_bytes]``."""
        both = torch.stack([key, value], 3).transpose(1, 2)  # [N, H, 128, 2, D]
        used = both.contiguous().flatten(2).view(torch.uint8)
        return torch.nn.functional.pad(used, (0, self.page_bytes - used.shape[2]))

    def decode(self, pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of :meth:`encode`: ``[N, 128, H, D]`` in ``dtype``."""
        used = pages[..., : self.page_bytes - _PADDING * PAGE_TOKENS].contiguous()
        both = used.view(dtype).unflatten(2, (PAGE_TOKENS, 2, self.head_dim)).transpose(1, 2)
        return both[:, :, :, 0], both[:, :, :, 1]
