# SPDX-License-Identifier: Apache-2.0
"""Normative encoder, decoder and attention. Every kernel is judged by this file.

Plain PyTorch in float32, vectorised over pages and heads; clear before fast.
Shapes use ``N`` pages, ``H`` KV heads, ``D`` head_dim, 128 tokens a page.
"""

from __future__ import annotations

import torch

from vllm_oscar.core import format as fmt_
from vllm_oscar.core.config import PAGE_TOKENS, NormScope, ParamType
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.hadamard import rotate, unrotate
from vllm_oscar.core.lossless import LosslessFormat

_FP16_MAX = 65504.0
_E4M3_MAX = 448.0


def _to_fp16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-_FP16_MAX, _FP16_MAX).half()


def _to_param(x: torch.Tensor, kind: ParamType) -> torch.Tensor:
    """Round to the storage type of key parameters, saturating."""
    if kind is ParamType.FP16:
        return _to_fp16(x)
    return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def _affine_params(low, high, levels: int, clip: float, integer_zero: bool, round_to):
    """Scale and zero of ``levels + 1`` codes over the clipped range ``low..high``."""
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    scale = round_to(2 * half / levels)
    zero = middle - half
    if integer_zero:
        step = scale.float()
        zero = -torch.where(step > 0, torch.round(-low / step).clamp(0, levels), 0.0) * step
    return scale, round_to(zero)


def _quantize(x, scale, zero, levels: int) -> torch.Tensor:
    """Nearest code (ties to even) for stored, that is rounded, parameters."""
    scale, zero = scale.float(), zero.float()
    code = torch.where(scale > 0, torch.round((x - zero) / scale), 0.0)
    return torch.nan_to_num(code).clamp(0, levels).to(torch.uint8)


def _encode_keys(key: torch.Tensor, fmt: PageFormat, first: torch.Tensor) -> dict[str, torch.Tensor]:
    """Key sections of pages. ``key``: rotated, ``[N, H, 128, D]``; ``first``: bool ``[N]``."""
    config, (n, heads, _, dim) = fmt.config, key.shape
    sections = {}
    if config.norm is NormScope.NONE:
        unit = key
    else:
        axes = (1, 3) if config.norm is NormScope.JOINT else (3,)
        norm = _to_fp16(key.square().mean(axes, keepdim=True).sqrt()).expand(n, heads, PAGE_TOKENS, 1)
        unit = torch.where(norm > 0, key / norm.float(), 0.0)
        sections["norms"] = norm[..., fmt_.norm_order().to(key.device), 0].contiguous().view(torch.uint8)

    # Which tokens shape which group's range: in a first page all of them, but token 0, shape group 0.
    low = unit.unflatten(2, (fmt.key_groups, -1)).amin(3)  # [N, H, groups, D]
    high = unit.unflatten(2, (fmt.key_groups, -1)).amax(3)
    if config.exact_first_key:
        is_first = first.view(n, 1, 1, 1)
        low = torch.where(is_first, unit[:, :, 1:].amin(2, keepdim=True), low)
        high = torch.where(is_first, unit[:, :, 1:].amax(2, keepdim=True), high)
    levels = 2**config.key_bits - 1
    scale, zero = _affine_params(
        low, high, levels, config.key_clip, config.integer_zero, lambda x: _to_param(x, config.key_param)
    )
    codes = _quantize(
        unit.unflatten(2, (fmt.key_groups, -1)), scale.unsqueeze(3), zero.unsqueeze(3), levels
    ).flatten(2, 3)
    codes_low, codes_high = fmt_.pack_codes(codes.flatten(0, 1), config.key_bits, "key")
    sections["k_codes"] = codes_low.view(n, heads, -1)
    sections["k_high"] = codes_high.view(n, heads, -1)

    order = fmt_.key_param_order(dim).to(key.device)
    params = torch.stack([scale.float()[..., order], zero.float()[..., order]], 3)  # [N, H, groups, 2, D]
    params = _to_param(params, config.key_param).flatten(2).view(torch.uint8)
    if config.exact_first_key:
        begin = fmt.key_group_bytes
        exact = _to_fp16(unit[:, :, 0, order]).view(torch.uint8)
        params[:, :, begin : begin + 2 * dim] = torch.where(
            first.view(n, 1, 1), exact, params[:, :, begin : begin + 2 * dim]
        )
    sections["k_params"] = params
    return sections


def _encode_values(value: torch.Tensor, fmt: PageFormat) -> dict[str, torch.Tensor]:
    """Value sections of pages. ``value``: rotated, ``[N, H, 128, D]``."""
    config, (n, heads, _, _) = fmt.config, value.shape
    scales, zeros, codes = [], [], []
    for part in value.split(config.value_group, dim=3):
        scale, zero = _affine_params(
            part.amin(3, keepdim=True), part.amax(3, keepdim=True), 3, config.value_clip, config.integer_zero, _to_fp16
        )
        scales.append(scale)
        zeros.append(zero)
        codes.append(_quantize(part, scale, zero, 3))
    sections = {"v_codes": fmt_.pack_codes(torch.cat(codes, 3).flatten(0, 1), 2, "value")[0].view(n, heads, -1)}
    for name, parts in (("v_scale", scales), ("v_zero", zeros)):
        order = fmt_.value_param_order(fmt.value_groups, name).to(value.device)
        sections[name] = torch.cat(parts, 3).flatten(2)[..., order].contiguous().view(torch.uint8)
    return sections


def encode_pages(key: torch.Tensor, value: torch.Tensor, fmt: PageFormat, first: torch.Tensor) -> torch.Tensor:
    """Quantize full blocks.

    Args:
        key, value: ``[N, 128, H, D]``, any float dtype, keys after RoPE, not rotated.
        fmt: the page layout.
        first: bool ``[N]``, which pages begin a sequence (``exact_first_key``).

    Returns:
        uint8 ``[N, H, page_bytes]``.
    """
    if isinstance(fmt, LosslessFormat):
        return fmt.encode(key, value)
    rotated_key = rotate(key).transpose(1, 2)
    rotated_value = rotate(value).transpose(1, 2)
    parts = _encode_keys(rotated_key, fmt, first) | _encode_values(rotated_value, fmt)
    pages = torch.zeros(*rotated_key.shape[:2], fmt.page_bytes, dtype=torch.uint8, device=key.device)
    for name, section in fmt.sections.items():
        if section.nbytes:
            pages[..., section.slice] = parts[name]
    return pages


def decode_pages_rotated(
    pages: torch.Tensor, fmt: PageFormat, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize ``pages`` (uint8 ``[N, H, page_bytes]``) in the rotated space.

    ``first``: bool ``[N]``. Returns key and value, float32 ``[N, H, 128, D]``.
    """
    config, dim, (n, heads, _) = fmt.config, fmt.head_dim, pages.shape

    def section(name: str) -> torch.Tensor:
        return pages[..., fmt.sections[name].slice].contiguous()

    def ordered(data: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(data)
        out[..., order.to(pages.device)] = data
        return out

    param_dtype = torch.half if config.key_param is ParamType.FP16 else torch.float8_e4m3fn
    params = section("k_params").view(param_dtype).float().view(n, heads, fmt.key_groups, 2, dim)
    if config.exact_first_key:
        params = torch.where(first.view(n, 1, 1, 1, 1), params[:, :, :1], params)
    params = ordered(params, fmt_.key_param_order(dim)).repeat_interleave(config.key_group, dim=2)
    codes = fmt_.unpack_codes(
        section("k_codes").flatten(0, 1), section("k_high").flatten(0, 1), config.key_bits, "key", dim
    ).view(n, heads, PAGE_TOKENS, dim)
    key = params[:, :, :, 0] * codes + params[:, :, :, 1]
    if config.exact_first_key:
        exact = pages[..., fmt.first_key.slice].contiguous().view(torch.half).float()
        exact = ordered(exact, fmt_.key_param_order(dim))
        key[:, :, 0] = torch.where(first.view(n, 1, 1), exact, key[:, :, 0])
    if config.norm is not NormScope.NONE:
        key = key * ordered(section("norms").view(torch.half).float(), fmt_.norm_order())[..., None]

    def value_param(name: str) -> torch.Tensor:
        data = ordered(section(name).view(torch.half).float(), fmt_.value_param_order(fmt.value_groups, name))
        data = data.view(n, heads, PAGE_TOKENS, fmt.value_groups)
        return data.repeat_interleave(config.value_group, dim=3)[..., :dim]

    codes = section("v_codes").flatten(0, 1)
    codes = fmt_.unpack_codes(codes, codes[:, :0], 2, "value", dim).view(n, heads, PAGE_TOKENS, dim)
    return key, value_param("v_scale") * codes + value_param("v_zero")


def decode_pages(
    pages: torch.Tensor, fmt: PageFormat, first: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of :func:`encode_pages`: key and value ``[N, 128, H, D]`` in the model's own space.

    float32, or with the lossless codec ``dtype``, the one that was stored.
    """
    if isinstance(fmt, LosslessFormat):
        return fmt.decode(pages, dtype)
    key, value = decode_pages_rotated(pages, fmt, first)
    return unrotate(key).transpose(1, 2), unrotate(value).transpose(1, 2)


def encode_page(key: torch.Tensor, value: torch.Tensor, fmt: PageFormat, *, first: bool = False) -> torch.Tensor:
    """Quantize one block: ``[128, H, D]`` key and value to uint8 ``[H, page_bytes]``.

    ``first`` marks the first page of a sequence.
    """
    return encode_pages(key[None], value[None], fmt, torch.tensor([first], device=key.device))[0]


def decode_page(page: torch.Tensor, fmt: PageFormat, *, first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of :func:`encode_page`: float32 key and value ``[128, H, D]``, not rotated."""
    key, value = decode_pages(page[None], fmt, torch.tensor([first], device=page.device))
    return key[0], value[0]


# ---- the ring ------------------------------------------------------------------
def ring_view(ring: torch.Tensor, fmt: PageFormat, dtype: torch.dtype) -> torch.Tensor:
    """Ring pages as tokens of the model's dtype.

    ``ring``: uint8 ``[B, H, page_bytes]``, heads may be strided. Returns a view
    ``[B, H, tokens_per_page, 2, D]``; index 3 is key, value.
    """
    tokens = fmt.ring_tokens_per_page(dtype.itemsize)
    used = ring[..., : tokens * 2 * fmt.head_dim * dtype.itemsize]
    return used.view(dtype).unflatten(-1, (tokens, 2, fmt.head_dim))


def ring_slots(ring_table: torch.Tensor, position: torch.Tensor, tokens_per_page: int, pages: int):
    """Page and offset of sequence positions in a request's ring.

    ``ring_table``: ``[..., >= pages]`` block ids, aligned with ``position``.
    """
    slot = position % (tokens_per_page * pages)
    page = ring_table.gather(-1, (slot // tokens_per_page).unsqueeze(-1)).squeeze(-1)
    return page.long(), slot % tokens_per_page


# ---- attention --------------------------------------------------------------------
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    ring_key: torch.Tensor,
    ring_value: torch.Tensor,
    context: int,
    ring_start: int,
    scale: float,
    fmt: PageFormat,
) -> torch.Tensor:
    """Causal attention of one request over pages, tail and in-flight tokens.

    Args:
        query: ``[Q, Hq, D]``; ``key``, ``value``: ``[Q, H, D]``, the tokens at
            positions ``context .. context + Q - 1``, not yet stored.
        pages: uint8 ``[P, H, page_bytes]``, the pages of positions ``0 .. 128*P - 1``.
        ring_key, ring_value: ``[context - ring_start, H, D]``, exact copies of the
            tokens at positions ``ring_start .. context - 1``; they replace the pages there.
        context: tokens before the first query.
        ring_start: first position read from the ring; ``ring_start <= 128 * P``.
        scale: softmax scale.

    Returns:
        ``[Q, Hq, D]`` in the dtype of ``query``. Computed in float32 (float64 inputs:
        float64 softmax and products).
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    count = -(-ring_start // PAGE_TOKENS)
    if count:
        first = torch.arange(count, device=pages.device) == 0
        old_key, old_value = decode_pages(pages[:count], fmt, first, key.dtype)
        old_key = old_key.flatten(0, 1)[:ring_start]
        old_value = old_value.flatten(0, 1)[:ring_start]
    else:
        old_key = old_value = key.new_empty(0, *key.shape[1:])
    keys = torch.cat([old_key.to(compute), ring_key.to(compute), key.to(compute)])
    values = torch.cat([old_value.to(compute), ring_value.to(compute), value.to(compute)])
    return dense_attention(query, keys, values, context, scale)


def dense_attention(query, keys, values, context: int, scale: float) -> torch.Tensor:
    """Causal attention of ``query [Q, Hq, D]`` over ``keys, values [context + Q, H, D]``."""
    group = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.to(keys.dtype), keys) * scale
    position = torch.arange(keys.shape[0], device=query.device)
    visible = position[None, :] <= context + torch.arange(query.shape[0], device=query.device)[:, None]
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    # A weight of 0 does not silence NaN or inf: they may reach only queries that see them.
    finite = values.isfinite()
    out = torch.einsum("hqk,khd->qhd", weights, torch.where(finite, values, 0.0))
    if not finite.all():
        seen = torch.einsum("qk,khd->qhd", visible.to(values.dtype), (~finite).to(values.dtype))
        out = out.masked_fill(seen > 0, float("nan"))
    return out.to(query.dtype)
