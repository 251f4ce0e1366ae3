# SPDX-License-Identifier: Apache-2.0
"""Device code: stored bits to fp16, and products with them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_to_half(byte):
    """Bits of a float8 e4m3 number (not NaN) to fp16, on every architecture."""
    bits = byte.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def slot_codes(words, SHIFT: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr, CODES: tl.constexpr):
    """``((words >> SHIFT) & MASK) << UP`` as fp16: that integer, times 2**-24 if CODES is not 0.

    CODES: 0 portable, 1 subnormals, 2 subnormals, two at a time in PTX.
    """
    if CODES == 2:
        # bits that cross from one half into the other are masked
        WIDE_MASK: tl.constexpr = MASK * 65537
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 t, t, {WIDE_MASK}; shl.b32 $0, t, {UP}; }}",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        bits = words >> SHIFT if SHIFT else words
        bits = bits & MASK
        bits = bits << UP if UP else bits
        return codes_to_half(bits.to(tl.uint16), CODES)


@triton.jit
def codes_to_half(bits, CODES: tl.constexpr):
    """Masked 16-bit halves to fp16, see :func:`slot_codes`."""
    if CODES:
        return bits.to(tl.float16, bitcast=True)
    else:
        return (bits | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def half_dot(a, b, acc, PRECISE: tl.constexpr):
    """``acc + a @ b`` with fp16 ``b``; PRECISE splits a float32 ``a`` in two halves of like size."""
    high = a.to(tl.float16)
    acc = tl.dot(high, b, acc)
    if PRECISE:
        low = (a - high.to(tl.float32)) * 2048
        acc += tl.dot(low.to(tl.float16), b) * (1 / 2048)
    return acc
