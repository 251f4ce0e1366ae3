# SPDX-License-Identifier: Apache-2.0
"""Normalised Hadamard rotations of order 64 to 256 (paper, section 3.2).

The rotation is applied per head, after RoPE: ``rotated = x @ H``. ``H`` is
orthogonal, so ``x = rotated @ H.T`` and ``q @ k`` is unchanged when both are
rotated. For powers of two ``H`` is the Sylvester matrix, which is symmetric;
other head sizes are Kronecker products with a Paley matrix of order 12, 20 or 28.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_PALEY_ORDERS = (12, 20, 28)
# vLLM makes its layers under other defaults for device and dtype.
_PLAIN = {"device": "cpu", "dtype": torch.float32}


def _legendre(q: int) -> torch.Tensor:
    """Jacobsthal matrix of the prime ``q``: entry (i, j) is the Legendre symbol of i - j."""
    squares = {(x * x) % q for x in range(1, q)}
    symbol = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], **_PLAIN)
    index = torch.arange(q, device="cpu")
    return symbol[(index[:, None] - index[None, :]) % q]


def _paley(order: int) -> torch.Tensor:
    """Unnormalised Hadamard matrix of order 12, 20 (Paley I) or 28 (Paley II)."""
    if order in (12, 20):
        q = order - 1
        skew = torch.zeros(order, order, **_PLAIN)
        skew[0, 1:] = 1.0
        skew[1:, 0] = -1.0
        skew[1:, 1:] = _legendre(q)
        return skew + torch.eye(order, **_PLAIN)
    q = order // 2 - 1
    conference = torch.zeros(q + 1, q + 1, **_PLAIN)
    conference[0, 1:] = conference[1:, 0] = 1.0
    conference[1:, 1:] = _legendre(q)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], **_PLAIN)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], **_PLAIN)
    return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, **_PLAIN), diagonal)


@lru_cache(maxsize=None)
def _hadamard_cpu(order: int) -> torch.Tensor:
    base = next((m for m in _PALEY_ORDERS if order % m == 0), 1)
    power = order // base
    if power & (power - 1):
        raise ValueError(f"no Hadamard matrix of order {order} is built in")
    matrix = _paley(base) if base > 1 else torch.ones(1, 1, **_PLAIN)
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], **_PLAIN)
    while matrix.shape[0] < order:
        matrix = torch.kron(sylvester, matrix)
    return matrix / order**0.5


@lru_cache(maxsize=None)
def hadamard(order: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The orthogonal rotation ``H`` of shape ``[order, order]``; cached, do not modify."""
    return _hadamard_cpu(order).to(device=device, dtype=dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """``x @ H`` along the last dimension, in float32. ``x``: ``[..., head_dim]``."""
    return x.float() @ hadamard(x.shape[-1], x.device)


def unrotate(x: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`rotate`, in float32."""
    return x.float() @ hadamard(x.shape[-1], x.device).T
