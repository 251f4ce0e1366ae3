# SPDX-License-Identifier: Apache-2.0
"""What a cache gives back for a block, stated a second time: NumPy in float64, of the product only a preset's numbers.

From the paper (sections 3.2 and 3.3) and the prose of docs/design.md, without bytes and their order. Blocks are
``[..., 128, H, D]``, keys after RoPE.
"""

from __future__ import annotations

import numpy as np


def sylvester(order: int) -> np.ndarray:
    """The normalised Hadamard matrix whose signs are the parities of ``row & column``."""
    at = np.arange(order)
    return (-1.0) ** np.bitwise_count(at[:, None] & at) / np.sqrt(order)


def fp16(x: np.ndarray) -> np.ndarray:
    return x.clip(-65504, 65504).astype(np.float16).astype(np.float64)


def e4m3(x: np.ndarray) -> np.ndarray:
    """Three bits behind the leading one, down to steps of 1/512, up to 448."""
    exponent = np.frexp(x)[1] - 1  # of the leading bit
    step = 2.0 ** (np.maximum(exponent, -6) - 3)
    return (np.round(x / step) * step).clip(-448, 448)


def grouped(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """``axis`` (negative) in groups of ``size``: two axes in its place, at most the whole of it."""
    size = min(size, x.shape[axis])
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :])


def quantized(x: np.ndarray, span: np.ndarray, axis: int, bits: int, clip: float, rounded) -> tuple[np.ndarray, ...]:
    """Codes, scale and zero of ``x`` with codes for the middle ``clip`` of the range of ``span`` along ``axis``."""
    low, high = span.min(axis, keepdims=True), span.max(axis, keepdims=True)
    levels = 2**bits - 1
    scale = rounded((high - low) * clip / levels)
    zero = rounded((high + low) / 2 - (high - low) * clip / 2)
    return np.round((x - zero) / scale).clip(0, levels), scale, zero


def gain(x: np.ndarray, coded: np.ndarray) -> np.ndarray:
    """What ``coded`` is multiplied by to be as long as ``x`` in the direction of ``x``."""
    return (x * x).sum(-1, keepdims=True) / (x * coded).sum(-1, keepdims=True)


def our_keys(x: np.ndarray, preset, first: bool) -> np.ndarray:
    norm = fp16(np.sqrt((x * x).mean(-1, keepdims=True)))
    unit = x / norm
    span = groups = grouped(unit, -3, preset.key_group)  # [..., groups, tokens, H, D]
    if first:  # one range for all groups, of all tokens but the first
        span = unit[..., None, 1:, :, :]
    rounded = e4m3 if preset.key_param.value == "e4m3" else fp16
    codes, scale, zero = quantized(groups, span, -3, preset.key_bits, preset.key_clip, rounded)
    coded = (codes * scale + zero).reshape(x.shape)
    coded *= fp16(norm * gain(unit, coded)) if preset.key_gain else norm
    if first:
        coded[..., 0, :, :] = ring(x[..., 0, :, :])
    return coded


def our_values(x: np.ndarray, preset, first: bool) -> np.ndarray:
    groups = grouped(x, -1, preset.value_group)
    codes, scale, zero = quantized(groups, groups, -1, preset.value_bits, preset.value_clip, fp16)
    if preset.value_gain:
        factor = gain(groups, codes * scale + zero)
        scale, zero = fp16(scale * factor), fp16(zero * factor)
    coded = (codes * scale + zero).reshape(x.shape)
    if first:
        token = grouped(x[..., 0, :, :], -1, preset.value_group)
        codes, scale, zero = quantized(token, token, -1, 8, 1.0, fp16)
        coded[..., 0, :, :] = (codes * scale + zero).reshape(x[..., 0, :, :].shape)
    return coded


def paper_group(x: np.ndarray, axis: int) -> np.ndarray:
    """Min/max INT2 along ``axis``. The zero point is an integer of any size."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = fp16((high - low) / 3)
    zero_point = np.round(-low / scale)
    return scale * ((np.round(x / scale) + zero_point).clip(0, 3) - zero_point)


def paper(key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A block as the paper quantizes it, rotated."""
    norm = fp16(np.sqrt((key * key).mean((-2, -1), keepdims=True)))  # one per token over all heads
    coded = paper_group(grouped(key / norm, -3, 32), -3).reshape(key.shape) * norm
    return coded, paper_group(grouped(value, -1, 32), -1).reshape(value.shape)


def block(key: np.ndarray, value: np.ndarray, preset, first: bool, rotation: np.ndarray | None = None):
    """Key and value of a block, and with ``first`` of a sequence's first one, as pages of ``preset`` give them back."""
    rotation = sylvester(key.shape[-1]) if rotation is None else rotation
    key, value = key.astype(np.float64) @ rotation, value.astype(np.float64) @ rotation
    if preset.name == "oscar_paper":
        key, value = paper(key, value)
    else:
        key, value = our_keys(key, preset, first), our_values(value, preset, first)
    return key @ rotation.T, value @ rotation.T


def ring(x: np.ndarray) -> np.ndarray:
    """Tokens ``[..., D]`` as eight bits with one scale each give them back."""
    x = x.astype(np.float64)
    scale = fp16(np.abs(x).max(-1, keepdims=True) / 127)
    return np.round(x / np.where(scale > 0, scale, 1)).clip(-127, 127) * scale
