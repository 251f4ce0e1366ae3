# SPDX-License-Identifier: Apache-2.0
"""The normative codec and attention against plain formulations of the paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_oscar.core.config import PRESETS, SUPPORTED_HEAD_DIMS, NormScope, OscarConfig, ParamType
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.reference import attention, decode_page, decode_pages, encode_page, encode_pages

presets = st.sampled_from(list(PRESETS))
head_dims = st.sampled_from(SUPPORTED_HEAD_DIMS)
seeds = st.integers(0, 2**31)
quick = settings(deadline=None, max_examples=15)


def random_block(head_dim: int, seed: int = 0, heads: int = 2, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 128, heads, head_dim, generator=generator) * scale
    return key, value


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).square().sum() / exact.square().sum()).item()


# ---- the paper, written out ---------------------------------------------------------
def sylvester(order: int) -> torch.Tensor:
    index = torch.arange(order)
    signs = [[(-1.0) ** bin(i & j).count("1") for j in index.tolist()] for i in index.tolist()]
    return torch.tensor(signs, dtype=torch.float64) / order**0.5


def fp16(x: torch.Tensor) -> torch.Tensor:
    return x.half().double()


def asymmetric_int2(group: torch.Tensor) -> torch.Tensor:
    """Min/max INT2 with an integer zero point, as in the paper, of a one-dimensional group."""
    low, high = group.min(), group.max()
    scale = fp16((high - low) / 3)
    if scale == 0:
        return torch.zeros_like(group) + fp16(low) * 0
    zero_point = (-low / scale).round().clamp(0, 3)
    offset = fp16(-zero_point * scale)
    codes = ((group - offset) / scale).round().clamp(0, 3)
    return codes * scale + offset


def paper_codec(key: torch.Tensor, value: torch.Tensor):
    """PAPER sections 3.2-3.3 in float64: rotate, divide by the joint norm, quantize, undo."""
    tokens, heads, dim = key.shape
    rotation = sylvester(dim)
    key, value = key.double() @ rotation, value.double() @ rotation
    norm = fp16(key.square().mean((1, 2)).sqrt())[:, None, None]  # one per token over all heads
    unit = key / norm
    for head in range(heads):
        for first in range(0, tokens, 32):  # keys: per channel over 32 tokens
            for channel in range(dim):
                group = slice(first, first + 32), head, channel
                unit[group] = asymmetric_int2(unit[group])
        for token in range(tokens):  # values: per token over 32 channels
            for first in range(0, dim, 32):
                group = token, head, slice(first, first + 32)
                value[group] = asymmetric_int2(value[group])
    return unit * norm @ rotation.T, value @ rotation.T


@pytest.mark.parametrize("head_dim", [64, 128])
def test_oscar_paper_is_the_paper(head_dim):
    key, value = random_block(head_dim, seed=3)
    fmt = PageFormat.preset("oscar_paper", head_dim)
    found = decode_page(encode_page(key, value, fmt), fmt)
    exact = paper_codec(key, value)
    for have, want, original in zip(found, exact, (key, value)):
        # In float32 a code on a rounding edge may fall to the other side: rare, one step each.
        assert relative(have.double(), want) < 1e-4
        assert ((have.double() - want).norm(dim=-1) > 1e-3 * original.norm(dim=-1)).double().mean() < 0.01


def test_the_paper_error_is_what_its_quantizer_gives_on_gaussians():
    """PAPER.md, table of quantizers: 0.165 (squared error over variance) for groups of 32."""
    key, value = random_block(128, heads=8)
    fmt = PageFormat.preset("oscar_paper", 128)
    for found, exact in zip(decode_page(encode_page(key, value, fmt), fmt), (key, value)):
        assert relative(found, exact) == pytest.approx(0.165, abs=0.01)


@pytest.mark.parametrize(
    "preset, key_error, value_error",
    [("oscar", 0.0336, 0.146), ("oscar_small", 0.125, 0.134), ("oscar_large", 0.0082, 0.146)],
)
def test_our_presets_err_less(preset, key_error, value_error):
    """On Gaussians; the values are recorded, so a change of the quantizer shows."""
    key, value = random_block(128, heads=8)
    fmt = PageFormat.preset(preset, 128)
    found_key, found_value = decode_page(encode_page(key, value, fmt), fmt)
    assert relative(found_key, key) == pytest.approx(key_error, rel=0.03)
    assert relative(found_value, value) == pytest.approx(value_error, rel=0.03)


# ---- properties of every preset -------------------------------------------------------
@given(presets, head_dims, seeds, st.booleans(), st.sampled_from([1e-3, 1.0, 300.0]))
@quick
def test_shapes_and_error(preset, head_dim, seed, first, scale):
    key, value = random_block(head_dim, seed, scale=scale)
    fmt = PageFormat.preset(preset, head_dim)
    page = encode_page(key, value, fmt, first=first)
    assert (page.shape, page.dtype) == ((2, fmt.page_bytes), torch.uint8)
    found_key, found_value = decode_page(page, fmt, first=first)
    assert found_key.shape == found_value.shape == (128, 2, head_dim)
    assert relative(found_key, key) < 0.25
    assert relative(found_value, value) < 0.25


@given(presets, head_dims, seeds)
@quick
def test_each_page_is_coded_alone(preset, head_dim, seed):
    blocks = [random_block(head_dim, seed + i) for i in range(3)]
    fmt = PageFormat.preset(preset, head_dim)
    first = torch.tensor([True, False, True])
    batch = encode_pages(
        torch.stack([key for key, _ in blocks]), torch.stack([value for _, value in blocks]), fmt, first
    )
    for page, (key, value), is_first in zip(batch, blocks, first.tolist()):
        assert torch.equal(page, encode_page(key, value, fmt, first=is_first))


@given(presets.filter(lambda name: PRESETS[name].norm is not NormScope.JOINT), head_dims, seeds)
@quick
def test_a_head_does_not_depend_on_other_heads(preset, head_dim, seed):
    """Hence the numerics do not depend on the tensor-parallel size."""
    key, value = random_block(head_dim, seed, heads=4)
    fmt = PageFormat.preset(preset, head_dim)
    both = encode_page(key, value, fmt)
    for head in range(4):
        assert torch.equal(both[head], encode_page(key[:, [head]], value[:, [head]], fmt)[0])


def test_the_joint_norm_does_depend_on_other_heads():
    key, value = random_block(128, heads=2)
    fmt = PageFormat.preset("oscar_paper", 128)
    assert not torch.equal(encode_page(key, value, fmt)[0], encode_page(key[:, :1], value[:, :1], fmt)[0])


@given(presets.filter(lambda name: PRESETS[name].norm is not NormScope.JOINT), st.sampled_from([torch.nan, torch.inf]))
@quick
def test_nan_in_one_head_stays_there(preset, bad):
    key, value = random_block(128)
    fmt = PageFormat.preset(preset, 128)
    clean = decode_page(encode_page(key, value, fmt), fmt)
    key[40, 0, 7] = value[41, 0, 9] = bad
    found = decode_page(encode_page(key, value, fmt), fmt)
    for have, want in zip(found, clean):
        assert torch.equal(have[:, 1], want[:, 1])


@given(presets, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
@quick
def test_nan_in_a_value_stays_in_its_token(preset, bad):
    key, value = random_block(128)
    fmt = PageFormat.preset(preset, 128)
    clean = decode_page(encode_page(key, value, fmt), fmt)
    value[41, 0, 9] = bad
    found_key, found_value = decode_page(encode_page(key, value, fmt), fmt)
    others = torch.arange(128) != 41
    assert torch.equal(found_key, clean[0])
    assert torch.equal(found_value[others], clean[1][others])


@pytest.mark.parametrize("preset", PRESETS)
def test_zero_and_constant_blocks(preset):
    fmt = PageFormat.preset(preset, 128)
    zero = torch.zeros(128, 2, 128)
    for found in decode_page(encode_page(zero, zero, fmt), fmt):
        assert torch.equal(found, zero)
    same = torch.randn(1, 2, 128, generator=torch.Generator().manual_seed(0)).expand(128, -1, -1)
    found, _ = decode_page(encode_page(same, same, fmt), fmt)
    if not fmt.config.integer_zero:  # integer zero points cannot represent a constant
        assert relative(found, same) < 1e-2


# ---- the first page -------------------------------------------------------------------
FIRST = [name for name, config in PRESETS.items() if config.exact_first_key]


@pytest.mark.parametrize("preset", FIRST)
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_the_first_key_of_a_sequence_is_exact(preset, head_dim):
    key, value = random_block(head_dim)
    key[0] *= 50  # an attention sink
    fmt = PageFormat.preset(preset, head_dim)
    page = encode_page(key, value, fmt, first=True)
    found, _ = decode_page(page, fmt, first=True)
    assert torch.allclose(found[0], key[0], rtol=0, atol=2e-3 * key[0].abs().max().item())
    # It does not widen the others' range: they lose what one group of 127 tokens loses.
    assert relative(found[1:], key[1:]) < (0.22 if fmt.config.key_bits == 2 else 0.06)
    later, _ = decode_page(encode_page(key, value, fmt), fmt)
    assert relative(later[0], key[0]) > 1e-3


@pytest.mark.parametrize("preset", FIRST)
def test_a_first_page_differs_only_in_key_codes_and_params(preset):
    key, value = random_block(128)
    fmt = PageFormat.preset(preset, 128)
    first, later = encode_page(key, value, fmt, first=True), encode_page(key, value, fmt)
    for name in ("v_codes", "v_scale", "v_zero", "norms"):
        section = fmt.sections[name].slice
        assert torch.equal(first[:, section], later[:, section])
    assert not torch.equal(first, later)


def test_the_paper_treats_no_page_specially():
    key, value = random_block(128)
    fmt = PageFormat.preset("oscar_paper", 128)
    assert torch.equal(encode_page(key, value, fmt, first=True), encode_page(key, value, fmt))


# ---- options that no preset uses --------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"norm": NormScope.NONE},
        {"key_group": 128, "exact_first_key": False},
        {"key_param": ParamType.FP16, "value_group": 32},
        {"integer_zero": True, "key_clip": 1.0, "value_clip": 1.0},
        {"key_bits": 4, "key_group": 32, "value_group": 64},
    ],
)
@pytest.mark.parametrize("head_dim", [64, 80, 192])
def test_other_configs(options, head_dim):
    fmt = PageFormat(OscarConfig("other", **options), head_dim)
    key, value = random_block(head_dim)
    for found, exact in zip(decode_page(encode_page(key, value, fmt), fmt), (key, value)):
        assert relative(found, exact) < 0.3


# ---- attention ----------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "context, ring_start", [(0, 0), (5, 0), (128, 128), (128, 0), (300, 256), (300, 172), (400, 384)]
)
def test_attention_reads_pages_then_ring_then_the_step(preset, context, ring_start):
    """Against a loop over single logits in float64."""
    fmt, scale, queries = PageFormat.preset(preset, 64), 0.2, 7
    generator = torch.Generator().manual_seed(context)
    key, value = torch.randn(2, context + queries, 2, 64, generator=generator)
    query = torch.randn(queries, 6, 64, generator=generator)
    count = context // 128
    first = torch.arange(count) == 0
    seen = [x.double().clone() for x in (key, value)]
    pages = torch.empty(0, 2, fmt.page_bytes, dtype=torch.uint8)
    if count:
        blocks = [x[: count * 128].unflatten(0, (count, 128)) for x in (key, value)]
        pages = encode_pages(*blocks, fmt, first)
        for x, coded in zip(seen, decode_pages(pages, fmt, first)):
            x[:ring_start] = coded.flatten(0, 1)[:ring_start].double()
    out = attention(
        query, key[context:], value[context:], pages, key[ring_start:context], value[ring_start:context],
        context, ring_start, scale, fmt,
    )  # fmt: skip
    for row in range(queries):
        for head in range(6):
            length = context + row + 1
            logits = torch.stack([query[row, head].double() @ seen[0][i, head // 3] * scale for i in range(length)])
            weights = (logits - logits.max()).exp()
            want = (weights[:, None] * seen[1][:length, head // 3]).sum(0) / weights.sum()
            assert torch.allclose(out[row, head].double(), want, atol=2e-5)
