# SPDX-License-Identifier: Apache-2.0
"""The ring: how the newest tokens of a request lie in its ring pages.

A ring page has as many bytes as a quantized page and belongs to one KV head. Position ``p`` of
the sequence is in slot ``p % (pages * n)``, ``n`` being the tokens of a ring page: ring page
``slot // n``, token ``slot % n``. Tokens are in the model's own space, not rotated::

    MODEL   [n][key, value][head_dim]  in the model's dtype
    INT8    [n][key, value][head_dim]  signed bytes
            [n][key, value]            fp16 scales, right behind

An INT8 element is ``scale * byte``, with ``scale = fp16(max|x| / 127)`` over the channels of the
token's key or value, saturating, and ``byte = clamp(round(x / scale), -127, 127)``, ties to even,
0 where the scale is 0 or the quotient is NaN. A NaN in a token makes its scale NaN, and so the
token, but no other. At the same memory as with 16 bits, the window is twice as long.
"""

from __future__ import annotations

from enum import Enum

import torch

_FP16_MAX = 65504.0
_SCALE_BYTES = 2  # fp16


class RingType(str, Enum):
    """In what the ring holds keys and values."""

    MODEL = "model"  # the model's dtype
    INT8 = "int8"

    def token_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of a token's key and value for a model whose elements have ``itemsize`` bytes."""
        return 2 * head_dim * itemsize if self is RingType.MODEL else 2 * (head_dim + _SCALE_BYTES)


def ring_slots(
    ring_table: torch.Tensor, position: torch.Tensor, tokens_per_page: int, pages: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and token-in-page of sequence positions in a request's ring.

    ``ring_table``: ``[..., >= pages]`` block ids, aligned with ``position``.
    """
    slot = position % (tokens_per_page * pages)
    block = ring_table.gather(-1, (slot // tokens_per_page).unsqueeze(-1)).squeeze(-1)
    return block.long(), slot % tokens_per_page


def to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (int8, shape of ``x``) and fp16 scales (last dimension 1) of tokens ``[..., head_dim]``."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(max=_FP16_MAX).half()
    quotient = torch.where(scale > 0, torch.round(x / scale.float()), 0.0)
    return torch.nan_to_num(quotient).clamp(-127, 127).to(torch.int8), scale


def from_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 tokens; exact."""
    return x.float() * scale.float()


def write_tokens(ring: torch.Tensor, fmt, block, token, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store tokens ``key, value [n, H, D]`` at ``(block, token)``, each ``[n]``.

    ``ring``: uint8 ``[blocks, H, page_bytes]``, heads may be strided. ``fmt``: a page format.
    """
    both = torch.stack([key, value], 2)  # [n, H, 2, D]
    if fmt.ring_type is RingType.MODEL:
        _elements(ring, fmt, key.dtype)[block, :, token] = both
        return
    codes, scales = to_int8(both)
    _elements(ring, fmt, torch.int8)[block, :, token] = codes
    _scales(ring, fmt)[block, :, token] = scales[..., 0]


def read_tokens(ring: torch.Tensor, fmt, block, token, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[n, H, D]`` at ``(block, token)``: in the model's ``dtype``, of an INT8 ring in float32."""
    if fmt.ring_type is RingType.MODEL:
        both = _elements(ring, fmt, dtype)[block, :, token]
    else:
        codes, scales = _elements(ring, fmt, torch.int8)[block, :, token], _scales(ring, fmt)[block, :, token]
        both = from_int8(codes, scales[..., None])
    return both[:, :, 0], both[:, :, 1]


def _elements(ring: torch.Tensor, fmt, dtype: torch.dtype) -> torch.Tensor:
    """A view ``[blocks, H, n, 2, D]``; index 3 is key, value."""
    tokens = fmt.ring_tokens_per_page(dtype.itemsize)
    return ring[..., : tokens * 2 * fmt.head_dim * dtype.itemsize].view(dtype).unflatten(-1, (tokens, 2, fmt.head_dim))


def _scales(ring: torch.Tensor, fmt) -> torch.Tensor:
    """A view ``[blocks, H, n, 2]`` of an INT8 ring's scales."""
    tokens = fmt.ring_tokens_per_page(1)
    begin = tokens * 2 * fmt.head_dim
    return ring[..., begin : begin + tokens * 2 * _SCALE_BYTES].view(torch.half).unflatten(-1, (tokens, 2))
