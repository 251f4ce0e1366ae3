# SPDX-License-Identifier: Apache-2.0
"""Normative encoder, decoder and attention. Every kernel is judged by this file.

Plain PyTorch in float32, vectorised over pages and heads; clear before fast.
Shapes use ``N`` pages, ``H`` KV heads, ``D`` head_dim, 128 tokens a page.

The encoder's operations, in this order. Every line is float32, each operation rounded by
itself; ``fp16`` and ``param`` round to the storage type, saturating; sums may be taken in any
order. "Sink" is token 0 of the first page of a sequence, where ``first_token`` is set.

Keys, per KV head, ``x`` rotated:

1. norm: ``n = fp16(sqrt(mean(x * x)))`` over the channels (joint: of all heads of the rank);
   sink: ``n = fp16(max|x| / 127)``. Unit key ``u = x / n``, 0 where n is not above 0.
2. range: ``low, high`` of u per channel and key group. In the first page one range serves all
   groups, that of all tokens but the sink.
3. parameters: ``middle = (low + high) / 2``, ``half = (high - low) / 2 * clip``,
   ``scale = param(2 * half / levels)``, ``zero = param(middle - half)``.
4. codes: ``clamp(round((u - zero) / scale), 0, levels)``, ties to even, 0 where the scale is not
   above 0 or the quotient is NaN. Sink: codes 0, and bytes ``clamp(round(u), -127, 127)``, 0 for NaN.
5. gain: ``u' = scale * code + zero``, ``n = fp16(n * gain(u, u'))``; the sink keeps its n.

Values, per token and value group, ``x`` rotated:

1. range, parameters (in fp16) and codes as for keys; sink: 255 levels and no clipping, its codes
   are the bytes, and those of the planes are 0.
2. gain: ``x' = scale * code + zero``, ``g = gain(x, x')``, ``scale = fp16(scale * g)``,
   ``zero = fp16(zero * g)``; the sink keeps its own.

``gain(x, x') = clamp(sum(x * x) / sum(x * x'), 0.5, 2)``, 1 where the divisor is not above 0 or
the quotient is NaN.
"""

from __future__ import annotations

import torch

from vllm_oscar.core import format as fmt_
from vllm_oscar.core.config import PAGE_TOKENS, NormScope, ParamType
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.hadamard import rotate, unrotate
from vllm_oscar.core.lossless import LosslessFormat
from vllm_oscar.core.softmax import Softmax

_FP16_MAX = 65504.0
_E4M3_MAX = 448.0


def _to_fp16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-_FP16_MAX, _FP16_MAX).half()


def _to_param(x: torch.Tensor, kind: ParamType) -> torch.Tensor:
    """Round to the storage type of key parameters, saturating."""
    if kind is ParamType.FP16:
        return _to_fp16(x)
    return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def _affine_params(low, high, levels, clip, integer_zero: bool, round_to):
    """Scale and zero of ``levels + 1`` codes over the clipped range ``low..high``.

    With ``integer_zero`` the zero is a whole number of steps, which may lie far outside
    the codes. Its product with the scale is rounded once to the storage type, by at most
    one part in 2048 of it; codes are chosen for the stored zero, so that this shifts the
    grid of a group but does not widen its error. A group of one value has no steps: its
    zero is that value.
    """
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    scale = round_to(2 * half / levels)
    zero = middle - half
    if integer_zero:
        step = scale.float()
        zero = torch.where(step > 0, -torch.round(-low / step) * step, low)
    return scale, round_to(zero)


def _quantize(x, scale, zero, levels) -> torch.Tensor:
    """Nearest code (ties to even) for stored, that is rounded, parameters."""
    scale, zero = scale.float(), zero.float()
    code = torch.where(scale > 0, torch.round((x - zero) / scale), 0.0)
    return torch.nan_to_num(code).clamp(min=0).clamp(max=levels).to(torch.uint8)


def _gain(x: torch.Tensor, coded: torch.Tensor) -> torch.Tensor:
    """What ``coded`` is to be multiplied by to have no shrinkage along ``x``; last dimension kept as 1.

    Clipping and rounding to the middle of a cell make vectors shorter. A softmax feels that as a higher
    temperature, and attention's output as a smaller one, in all layers alike.
    """
    product = (x * coded).sum(-1, keepdim=True)
    ratio = torch.where(product > 0, x.square().sum(-1, keepdim=True) / product, 1.0)
    return torch.nan_to_num(ratio, nan=1.0).clamp(0.5, 2.0)


def _sinks(fmt: PageFormat, first: torch.Tensor) -> torch.Tensor:
    """Which tokens of pages have 8-bit codes of their own: bool ``[N, 1, 128, 1]``."""
    token = torch.arange(PAGE_TOKENS, device=first.device)
    return (first.view(-1, 1, 1, 1) & (token == 0).view(-1, 1)) & fmt.config.first_token


def _encode_keys(key: torch.Tensor, fmt: PageFormat, first: torch.Tensor) -> dict[str, torch.Tensor]:
    """Key sections of pages. ``key``: rotated, ``[N, H, 128, D]``; ``first``: bool ``[N]``."""
    config, (n, heads, _, dim) = fmt.config, key.shape
    sink, sections = _sinks(fmt, first), {}
    norm = torch.ones(n, heads, PAGE_TOKENS, 1, device=key.device)
    if config.norm is not NormScope.NONE:
        axes = (1, 3) if config.norm is NormScope.JOINT else (3,)
        norm = key.square().mean(axes, keepdim=True).sqrt().expand_as(norm)
        norm = _to_fp16(torch.where(sink, key.abs().amax(3, keepdim=True) / 127, norm)).float()
    unit = torch.where(norm > 0, key / norm, 0.0)

    low = unit.unflatten(2, (fmt.key_groups, -1)).amin(3)  # [N, H, groups, D]
    high = unit.unflatten(2, (fmt.key_groups, -1)).amax(3)
    if config.first_token:
        is_first = first.view(n, 1, 1, 1)
        low = torch.where(is_first, unit[:, :, 1:].amin(2, keepdim=True), low)
        high = torch.where(is_first, unit[:, :, 1:].amax(2, keepdim=True), high)
    levels = 2**config.key_bits - 1
    scale, zero = _affine_params(
        low, high, levels, config.key_clip, config.integer_zero, lambda x: _to_param(x, config.key_param)
    )
    token_scale, token_zero = (x.float().repeat_interleave(config.key_group, dim=2) for x in (scale, zero))
    codes = _quantize(unit, token_scale, token_zero, levels)
    if config.key_gain:
        gain = _gain(unit, token_scale * codes + token_zero)
        norm = torch.where(sink, norm, _to_fp16(norm * gain).float())
    if config.norm is not NormScope.NONE:
        order = fmt_.norm_order().to(key.device)
        sections["norms"] = norm.half()[..., order, 0].contiguous().view(torch.uint8)
    codes = torch.where(sink, 0, codes)
    for name, plane in zip(("k_codes", "k_high"), fmt_.pack_codes(codes.flatten(0, 1), config.key_bits, "key")):
        sections[name] = plane.view(n, heads, -1)

    order = fmt_.key_param_order(dim).to(key.device)
    params = torch.stack([scale.float()[..., order], zero.float()[..., order]], 3)  # [N, H, groups, 2, D]
    params = _to_param(params, config.key_param).flatten(2).view(torch.uint8)
    if config.first_token:
        exact = torch.nan_to_num(torch.round(unit[:, :, 0, order])).clamp(-127, 127).to(torch.int8).view(torch.uint8)
        place = slice(fmt.key_group_bytes, fmt.key_group_bytes + dim)
        params[:, :, place] = torch.where(first.view(n, 1, 1), exact, params[:, :, place])
    sections["k_params"] = params
    return sections


def _encode_values(value: torch.Tensor, fmt: PageFormat, first: torch.Tensor) -> dict[str, torch.Tensor]:
    """Value sections of pages, and ``first_value``. ``value``: rotated, ``[N, H, 128, D]``; ``first``: bool ``[N]``."""
    config, (n, heads, _, dim) = fmt.config, value.shape
    sink = _sinks(fmt, first)
    levels = torch.where(sink, 255, 2**config.value_bits - 1)
    clip = torch.where(sink, 1.0, config.value_clip)
    scales, zeros, codes = [], [], []
    for part in value.split(config.value_group, dim=3):
        low, high = part.amin(3, keepdim=True), part.amax(3, keepdim=True)
        scale, zero = _affine_params(low, high, levels, clip, config.integer_zero, _to_fp16)
        codes.append(_quantize(part, scale, zero, levels))
        if config.value_gain:
            gain = torch.where(sink, 1.0, _gain(part, scale.float() * codes[-1] + zero.float()))
            scale, zero = _to_fp16(scale.float() * gain), _to_fp16(zero.float() * gain)
        scales.append(scale)
        zeros.append(zero)
    codes = torch.cat(codes, 3)
    sections = {"first_value": codes[:, :, 0, fmt_.first_value_order(dim).to(value.device)]}
    planes = fmt_.pack_codes(torch.where(sink, 0, codes).flatten(0, 1), config.value_bits, "value")
    for name, plane in zip(("v_codes", "v_high"), planes):
        sections[name] = plane.view(n, heads, -1)
    for name, parts in (("v_scale", scales), ("v_zero", zeros)):
        order = fmt_.value_param_order(fmt.value_groups, name).to(value.device)
        sections[name] = torch.cat(parts, 3).flatten(2)[..., order].contiguous().view(torch.uint8)
    return sections


def encode_pages(key: torch.Tensor, value: torch.Tensor, fmt: PageFormat, first: torch.Tensor) -> torch.Tensor:
    """Quantize full blocks.

    Args:
        key, value: ``[N, 128, H, D]``, any float dtype, keys after RoPE, not rotated.
        fmt: the page layout.
        first: bool ``[N]``, which pages begin a sequence (``first_token``).

    Returns:
        uint8 ``[N, H, page_bytes]``.
    """
    if isinstance(fmt, LosslessFormat):
        return fmt.encode(key, value)
    rotated_key = rotate(key).transpose(1, 2)
    rotated_value = rotate(value).transpose(1, 2)
    parts = _encode_keys(rotated_key, fmt, first) | _encode_values(rotated_value, fmt, first)
    pages = torch.zeros(*rotated_key.shape[:2], fmt.page_bytes, dtype=torch.uint8, device=key.device)
    for name, section in fmt.sections.items():
        if section.nbytes:
            pages[..., section.slice] = parts[name]
    if fmt.config.first_token:
        place = fmt.first_value.slice
        pages[..., place] = torch.where(first.view(-1, 1, 1), parts["first_value"], pages[..., place])
    return pages


def decode_pages_rotated(
    pages: torch.Tensor, fmt: PageFormat, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize ``pages`` (uint8 ``[N, H, page_bytes]``) in the rotated space.

    ``first``: bool ``[N]``. Returns key and value, float32 ``[N, H, 128, D]``.
    """
    config, dim, (n, heads, _) = fmt.config, fmt.head_dim, pages.shape
    is_first = first.view(n, 1, 1)

    def section(name: str) -> torch.Tensor:
        return pages[..., fmt.sections[name].slice].contiguous()

    def ordered(data: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(data)
        out[..., order.to(pages.device)] = data
        return out

    def codes(letter: str, bits: int, operand: str) -> torch.Tensor:
        planes = (section(f"{letter}_{plane}").flatten(0, 1) for plane in ("codes", "high"))
        return fmt_.unpack_codes(*planes, bits, operand, dim).view(n, heads, PAGE_TOKENS, dim)

    param_dtype = torch.half if config.key_param is ParamType.FP16 else torch.float8_e4m3fn
    params = section("k_params").view(param_dtype).float().view(n, heads, fmt.key_groups, 2, dim)
    if config.first_token:
        params = torch.where(is_first[..., None, None], params[:, :, :1], params)
    params = ordered(params, fmt_.key_param_order(dim)).repeat_interleave(config.key_group, dim=2)
    key = params[:, :, :, 0] * codes("k", config.key_bits, "key") + params[:, :, :, 1]
    if config.first_token:
        exact = pages[..., fmt.first_key.slice].contiguous().view(torch.int8).float()
        key[:, :, 0] = torch.where(is_first, ordered(exact, fmt_.key_param_order(dim)), key[:, :, 0])
    if config.norm is not NormScope.NONE:
        key = key * ordered(section("norms").view(torch.half).float(), fmt_.norm_order())[..., None]

    def value_param(name: str) -> torch.Tensor:
        data = ordered(section(name).view(torch.half).float(), fmt_.value_param_order(fmt.value_groups, name))
        data = data.view(n, heads, PAGE_TOKENS, fmt.value_groups)
        return data.repeat_interleave(config.value_group, dim=3)[..., :dim]

    value_codes = codes("v", config.value_bits, "value")
    if config.first_token:
        exact = ordered(pages[..., fmt.first_value.slice].long(), fmt_.first_value_order(dim))
        value_codes[:, :, 0] = torch.where(is_first, exact, value_codes[:, :, 0])
    return key, value_param("v_scale") * value_codes + value_param("v_zero")


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
    softmax: Softmax,
    fmt: PageFormat,
) -> torch.Tensor:
    """Causal attention of one request over pages, tail and in-flight tokens.

    Args:
        query: ``[Q, Hq, D]``; ``key``, ``value``: ``[Q, H, D]``, the tokens at
            positions ``context .. context + Q - 1``, not yet stored.
        pages: uint8 ``[P, H, page_bytes]``, the pages from that on in which the first query
            sees a token: page ``softmax.first_visible(context) // 128``.
        ring_key, ring_value: ``[context - ring_start, H, D]``, the tokens at positions
            ``ring_start .. context - 1`` as the ring has them; they replace the pages there.
        context: tokens before the first query.
        ring_start: first position read from the ring, a visible one or ``context``.
        softmax: from logits to weights.

    Returns:
        ``[Q, Hq, D]`` in the dtype of ``query``. Computed in float32 (float64 inputs:
        float64 softmax and products).
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    first = softmax.first_visible(context)
    if ring_start > first:
        numbers = torch.arange(first // PAGE_TOKENS, -(-ring_start // PAGE_TOKENS), device=pages.device)
        old_key, old_value = decode_pages(pages[: len(numbers)], fmt, numbers == 0, key.dtype)
        visible = slice(first % PAGE_TOKENS, ring_start - first // PAGE_TOKENS * PAGE_TOKENS)
        old_key, old_value = old_key.flatten(0, 1)[visible], old_value.flatten(0, 1)[visible]
    else:
        old_key = old_value = key.new_empty(0, *key.shape[1:])
    keys = torch.cat([old_key.to(compute), ring_key.to(compute), key.to(compute)])
    values = torch.cat([old_value.to(compute), ring_value.to(compute), value.to(compute)])
    return dense_attention(query, keys, values, softmax)


def dense_attention(query, keys, values, softmax: Softmax) -> torch.Tensor:
    """Causal attention of ``query [Q, Hq, D]`` over the last tokens ``keys, values [K, H, D]``, ``K >= Q``."""
    group = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.to(keys.dtype), keys) * softmax.scale
    if softmax.soft_cap is not None:
        logits = softmax.soft_cap * (logits / softmax.soft_cap).tanh()
    # How far each key lies before each query.
    queries, count = query.shape[0], keys.shape[0]
    at = torch.arange(count, device=query.device)
    distance = at[count - queries :, None] - at[None, :]
    visible = distance >= 0
    if softmax.sliding_window is not None:
        visible &= distance < softmax.sliding_window
    logits = logits.masked_fill(~visible, float("-inf"))
    if softmax.sinks is not None:
        sinks = softmax.sinks.to(logits)[:, None, None].expand(-1, queries, 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., :count]
    # A weight of 0 does not silence NaN or inf: they may reach only queries that see them.
    finite = values.isfinite()
    out = torch.einsum("hqk,khd->qhd", weights, torch.where(finite, values, 0.0))
    if not finite.all():
        seen = torch.einsum("qk,khd->qhd", visible.to(values.dtype), (~finite).to(values.dtype))
        out = out.masked_fill(seen > 0, float("nan"))
    return out.to(query.dtype)
