# SPDX-License-Identifier: Apache-2.0
"""Byte layout, presets and the Hadamard rotation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_oscar.core import format as fmt_
from vllm_oscar.core.config import PRESETS, SUPPORTED_HEAD_DIMS, NormScope, OscarConfig, ParamType, get_preset
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.hadamard import hadamard, rotate, unrotate

configs = st.builds(
    OscarConfig,
    name=st.just("any"),
    key_bits=st.sampled_from([2, 3, 4]),
    key_group=st.sampled_from([32, 64]),
    value_group=st.sampled_from([32, 64, 128, 256]),
    key_param=st.sampled_from(list(ParamType)),
    norm=st.sampled_from(list(NormScope)),
    integer_zero=st.booleans(),
    recent_window=st.booleans(),
    exact_first_key=st.booleans(),
)
head_dims = st.sampled_from(SUPPORTED_HEAD_DIMS)


# ---- sizes ------------------------------------------------------------------------
@given(configs, head_dims)
def test_sections_are_disjoint_aligned_and_fill_the_page(config, head_dim):
    fmt = PageFormat(config, head_dim)
    sections = list(fmt.sections.values())
    assert sections[0].offset == 0
    for before, after in zip(sections, sections[1:]):
        assert before.end == after.offset
    assert all(section.offset % 16 == 0 for section in sections)  # 16-byte loads
    assert 0 <= fmt.page_bytes - sections[-1].end < 128
    assert fmt.page_bytes % 128 == 0


@given(configs, head_dims)
def test_page_bytes_follow_from_the_bit_widths(config, head_dim):
    """Bits counted per token from the definition of each parameter, not from the sections."""
    fmt = PageFormat(config, head_dim)
    param_bits = 16 if config.key_param is ParamType.FP16 else 8
    value_groups = -(-head_dim // config.value_group)
    bits = (
        head_dim * config.key_bits
        + head_dim * 2
        + head_dim * 2 * param_bits / config.key_group
        + value_groups * 32
        + (0 if config.norm is NormScope.NONE else 16)
    )
    assert fmt.bytes_per_token == -(-bits // 8)
    assert fmt.bits_per_element == pytest.approx(fmt.bytes_per_token * 4 / head_dim)
    assert fmt.compression == pytest.approx(4 * head_dim / fmt.bytes_per_token)


@pytest.mark.parametrize(
    "preset, bytes_per_token, bits",
    [
        # 48 key + 32 value codes, 4 key params, 4 value params, 2 norm
        ("oscar", 90, 2.8125),
        # 32 + 32, 8, 4, 2
        ("oscar_small", 78, 2.4375),
        # 64 + 32, 4, 4, 2
        ("oscar_large", 106, 3.3125),
        # 32 + 32, 16, 16, 2: the paper's 3.0 bits and a norm per head
        ("oscar_paper", 98, 3.0625),
    ],
)
def test_presets_at_head_dim_128(preset, bytes_per_token, bits):
    fmt = PageFormat.preset(preset, 128)
    assert (fmt.bytes_per_token, fmt.bits_per_element) == (bytes_per_token, bits)
    assert fmt.compression == pytest.approx(512 / bytes_per_token)


def test_the_default_preset_saves_what_the_project_promises():
    fmt = PageFormat.preset("oscar", 128)
    assert fmt.bytes_per_token <= 96
    assert fmt.compression >= 5.3


@given(configs, head_dims, st.sampled_from([2, 4]), st.integers(0, 32))
def test_ring_holds_the_window_and_the_drafts(config, head_dim, itemsize, drafts):
    fmt = PageFormat(config, head_dim)
    tokens = fmt.ring_tokens_per_page(itemsize)
    token_bytes = 2 * head_dim * itemsize
    assert tokens * token_bytes <= fmt.page_bytes < (tokens + 1) * token_bytes
    pages = fmt.ring_pages(itemsize, drafts)
    assert (pages - 1) * tokens < 128 + 1 + drafts <= pages * tokens


# ---- element order ----------------------------------------------------------------
@given(head_dims, st.sampled_from([("key", 2), ("key", 3), ("key", 4), ("value", 2)]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_unpack_inverts_pack(head_dim, kind, seed):
    operand, bits = kind
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 128, head_dim), generator=generator)
    low, high = fmt_.pack_codes(codes, bits, operand)
    assert low.shape == (2, 128 * head_dim // 4)
    assert high.shape == (2, 128 * head_dim * (bits - 2) // 8)
    assert torch.equal(fmt_.unpack_codes(low, high, bits, operand, head_dim), codes)


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_orders_are_permutations(head_dim):
    for operand in ("key", "value"):
        order = fmt_.code_order(head_dim, operand).flatten()
        assert torch.equal(order.sort().values, torch.arange(128 * head_dim))
    assert torch.equal(fmt_.key_param_order(head_dim).sort().values, torch.arange(head_dim))
    assert torch.equal(fmt_.norm_order().sort().values, torch.arange(128))
    for groups in (1, 2, 8):
        for section in ("v_scale", "v_zero"):
            order = fmt_.value_param_order(groups, section)
            assert torch.equal(order.sort().values, torch.arange(128 * groups))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("token, channel", [(0, 0), (37, 5), (127, 127), (64, 90), (95, 33)])
def test_a_key_code_is_where_the_layout_says(bits, token, channel):
    """Locate one code by the formulas of the module's docstring, written out for head_dim 128."""
    codes = torch.zeros(1, 128, 128, dtype=torch.long)
    codes[0, token, channel] = 2**bits - 1
    low, high = fmt_.pack_codes(codes, bits, "key")
    block, within = divmod(token, 32)
    r, j0, g = within // 16, within // 8 % 2, within % 8
    tile, c = divmod(channel, 16)
    j1, t, half = c // 8, c % 8 // 2, c % 2
    word = block * 8 * 32 + (tile // 4) * 32 * 4 + (4 * g + t) * 4 + tile % 4
    shift = 16 * half + 8 * r + 2 * (2 * j1 + j0)
    words = low[0].view(torch.int32).long() & 0xFFFFFFFF
    assert words.nonzero().flatten().tolist() == [word]
    assert words[word] == 3 << shift
    if bits == 4:
        words = high[0].view(torch.int32).long() & 0xFFFFFFFF
        rotated = (3 << shift) << 2
        assert words[word] == (rotated | rotated >> 32) & 0xFFFFFFFF
    if bits == 3:
        words = high[0].view(torch.int32).long() & 0xFFFFFFFF
        word -= (block - block // 2) * 8 * 32
        rotated = 1 << shift + block % 2 << 2
        assert words.nonzero().flatten().tolist() == [word]
        assert words[word] == (rotated | rotated >> 32) & 0xFFFFFFFF


# ---- rotation ---------------------------------------------------------------------
@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, *SUPPORTED_HEAD_DIMS])
def test_hadamard_is_orthogonal_with_entries_of_one_size(order):
    matrix = hadamard(order, dtype=torch.float64)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("order", [64, 128, 256])
def test_hadamard_of_a_power_of_two_is_sylvester(order):
    index = torch.arange(order)
    parity = torch.tensor([[bin(i & j).count("1") % 2 for j in index.tolist()] for i in index.tolist()])
    assert torch.allclose(hadamard(order) * order**0.5, 1.0 - 2.0 * parity)


def test_hadamard_of_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order 72"):
        hadamard(72)


@given(head_dims, st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_rotation_keeps_products_and_is_inverted(head_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 5, head_dim, generator=generator)
    assert torch.allclose(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-4)
    assert torch.allclose(unrotate(rotate(k)), k, atol=1e-5)


# ---- validation -------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"key_bits": 5}, "key_bits must be 2, 3 or 4, not 5"),
        ({"key_group": 16}, "key_group must be 32, 64 or 128, not 16"),
        ({"value_group": 100}, "value_group must be"),
        ({"key_clip": 0.0}, r"key_clip must be in \(0, 1\], not 0.0"),
        ({"value_clip": 1.5}, r"value_clip must be in \(0, 1\], not 1.5"),
        ({"key_group": 128}, "exact_first_key needs a second key group"),
    ],
)
def test_a_wrong_config_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OscarConfig("wrong", **wrong)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_preset("oscar").key_bits = 4


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown OScaR preset 'int2'; use one of: oscar, oscar_small"):
        PageFormat.preset("int2", 128)


def test_presets_bear_their_names():
    assert all(config.name == name for name, config in PRESETS.items())


@pytest.mark.parametrize("head_dim", [8, 72, 100, 512])
def test_an_unsupported_head_dim_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} is not supported by OScaR pages; supported: 64, 80"):
        PageFormat.preset("oscar", head_dim)
