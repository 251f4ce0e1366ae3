# SPDX-License-Identifier: Apache-2.0
"""Byte layout, presets and the Hadamard rotation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_oscar.core import format as fmt_
from vllm_oscar.core import hadamard as hadamard_module
from vllm_oscar.core.config import PRESETS, SUPPORTED_HEAD_DIMS, NormScope, OscarConfig, ParamType, get_preset
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.hadamard import hadamard, rotate, unrotate
from vllm_oscar.core.ring import RingType, from_int8, read_tokens, to_int8, write_tokens


def any_config(norm: NormScope, **fields) -> OscarConfig:
    if norm is NormScope.NONE:  # nothing to store them in
        fields |= {"key_gain": False, "first_token": False}
    return OscarConfig("any", norm=norm, **fields)


configs = st.builds(
    any_config,
    key_bits=st.sampled_from([2, 3, 4]),
    value_bits=st.sampled_from([2, 3, 4]),
    key_group=st.sampled_from([32, 64]),
    value_group=st.sampled_from([32, 64, 128, 256]),
    key_param=st.sampled_from(list(ParamType)),
    norm=st.sampled_from(list(NormScope)),
    key_gain=st.booleans(),
    value_gain=st.booleans(),
    integer_zero=st.booleans(),
    window=st.sampled_from([0, 128, 256, 1000]),
    ring=st.sampled_from(list(RingType)),
    first_token=st.booleans(),
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
        + head_dim * config.value_bits
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
        # 48 + 48, 4, 4, 2
        ("oscar_large", 106, 3.3125),
        # 64 + 64, 4, 4, 2
        ("oscar_4bit", 138, 4.3125),
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


@given(configs.filter(lambda config: config.first_token), head_dims)
def test_the_first_token_lies_in_the_unused_key_groups(config, head_dim):
    """One byte a channel for its key, one for its value, aligned for wide loads, in bytes of groups 1 and up."""
    fmt = PageFormat(config, head_dim)
    unused = range(fmt.sections["k_params"].offset + fmt.key_group_bytes, fmt.sections["k_params"].end)
    key, value = fmt.first_key, fmt.first_value
    assert key.nbytes == value.nbytes == head_dim
    assert key.offset == unused.start and key.end == value.offset and value.end <= unused.stop
    assert key.offset % 16 == value.offset % 16 == 0


@given(configs, head_dims, st.sampled_from([2, 4]), st.integers(0, 32))
def test_ring_holds_the_window_and_the_drafts(config, head_dim, itemsize, drafts):
    fmt = PageFormat(config, head_dim)
    tokens = fmt.ring_tokens_per_page(itemsize)
    token_bytes = 2 * head_dim * itemsize if config.ring is RingType.MODEL else 2 * (head_dim + 2)
    assert tokens * token_bytes <= fmt.page_bytes < (tokens + 1) * token_bytes
    pages = fmt.ring_pages(itemsize, drafts)
    assert (pages - 1) * tokens < max(config.window, 128) + 1 + drafts <= pages * tokens


# ---- element order ----------------------------------------------------------------
@given(head_dims, st.sampled_from(["key", "value"]), st.sampled_from([2, 3, 4]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_unpack_inverts_pack(head_dim, operand, bits, seed):
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
    assert torch.equal(fmt_.first_value_order(head_dim).sort().values, torch.arange(head_dim))
    assert torch.equal(fmt_.norm_order().sort().values, torch.arange(128))
    for groups in (1, 2, 8):
        for section in ("v_scale", "v_zero"):
            order = fmt_.value_param_order(groups, section)
            assert torch.equal(order.sort().values, torch.arange(128 * groups))


def word_of(head_dim: int, block: int, tile: int, g: int, t: int) -> int:
    """Where the docstring puts the word of lane (g, t): the last chunk may have fewer than four tiles."""
    chunk = tile // 4
    width = min(4, head_dim // 16 - 4 * chunk)
    return block * head_dim // 16 * 32 + chunk * 128 + (4 * g + t) * width + tile % 4


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("operand", ["key", "value"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("token, channel", [(0, 0), (37, 5), (127, -1), (64, 58), (95, 33)])
def test_a_code_is_where_the_layout_says(head_dim, operand, bits, token, channel):
    """Locate one code by the formulas of the module's docstring."""
    channel %= head_dim
    codes = torch.zeros(1, 128, head_dim, dtype=torch.long)
    codes[0, token, channel] = 2**bits - 1
    low, high = fmt_.pack_codes(codes, bits, operand)
    block, row = divmod(token, 32)
    tile, c = divmod(channel, 16)
    r, row = divmod(row, 16)
    if operand == "key":
        j0, g = divmod(row, 8)
        j1, t, half = c // 8, c % 8 // 2, c % 2
    else:
        j0, g = divmod(c, 8)
        j1, t, half = row // 8, row % 8 // 2, row % 2
    shift = 16 * half + 8 * r + 2 * (2 * j1 + j0)
    word = word_of(head_dim, block, tile, g, t)
    words = low[0].view(torch.int32).long() & 0xFFFFFFFF
    assert words.nonzero().flatten().tolist() == [word]
    assert words[word] == 3 << shift
    words = high[0].view(torch.int32).long() & 0xFFFFFFFF
    if bits == 4:
        rotated = 3 << shift << 2
    if bits == 3:
        word = word_of(head_dim, block // 2, tile, g, t)
        rotated = 1 << shift + block % 2 << 2
    if bits > 2:
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
        ({"value_bits": 1}, "value_bits must be 2, 3 or 4, not 1"),
        ({"key_group": 16}, "key_group must be 32, 64 or 128, not 16"),
        ({"value_group": 100}, "value_group must be"),
        ({"key_clip": 0.0}, r"key_clip must be in \(0, 1\], not 0.0"),
        ({"value_clip": 1.5}, r"value_clip must be in \(0, 1\], not 1.5"),
        ({"key_group": 128}, "first_token needs a second key group"),
        ({"norm": NormScope.NONE, "first_token": False}, "key_gain is stored in the key norms"),
        ({"norm": NormScope.NONE, "key_gain": False}, "first_token is stored in the key norms"),
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


# ---- the ring ---------------------------------------------------------------------
@pytest.mark.parametrize("ring", RingType)
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_a_ring_page_gives_back_its_tokens_and_touches_no_other_byte(ring, head_dim):
    torch.manual_seed(head_dim)
    fmt = PageFormat(OscarConfig("test", ring=ring), head_dim)
    tokens = fmt.ring_tokens_per_page(2)
    memory = torch.full((3, 4, fmt.page_bytes), 0xFF, dtype=torch.uint8)[:, ::2]  # strided heads
    key, value = torch.randn(2, tokens - 1, 2, head_dim).bfloat16()
    block, token = torch.ones(tokens - 1, dtype=torch.long), torch.arange(1, tokens)
    write_tokens(memory, fmt, block, token, key, value)
    got = read_tokens(memory, fmt, block, token, torch.bfloat16)
    for x, y in zip((key, value), got):
        if ring is RingType.MODEL:
            assert torch.equal(x, y)
        else:  # half a step of a token's own scale, and the scale's own rounding
            step = x.float().abs().amax(-1, keepdim=True) / 127
            assert ((x.float() - y).abs() <= 0.51 * step + 1e-3 * x.float().abs()).all()
    assert (memory[[0, 2]] == 0xFF).all()
    written, nbytes = (memory[1] != 0xFF).sum(), 2 * (tokens - 1) * ring.token_bytes(head_dim, 2)
    free = read_tokens(memory, fmt, torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.bfloat16)
    assert all(x.isnan().all() for x in free), "token 0 was not written"
    assert 0.9 * nbytes < written <= nbytes


def test_int8_tokens_keep_zero_nan_and_large_apart():
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [3e38, -1.0], [254.0, -126.0]])
    codes, scale = to_int8(x)
    back = from_int8(codes, scale)
    assert torch.equal(back[0], x[0]) and back[1].isnan().all() and torch.equal(back[3], x[3])
    assert back[2].isfinite().all(), "saturated"
    again = to_int8(back[[0, 2, 3]])
    assert torch.equal(again[0], codes[[0, 2, 3]]), "rounding twice changes nothing"


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_the_rotation_does_not_depend_on_torch_defaults(dim):
    """vLLM makes its layers, and with them our tables, under a default dtype and device of its own."""
    expected = hadamard(dim).double()
    before = torch.get_default_dtype()
    fresh = hadamard_module._hadamard_cpu.__wrapped__
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = fresh(dim)
    finally:
        torch.set_default_dtype(before)
    assert found.device.type == "cpu" and found.dtype == torch.float32 and torch.equal(found.double(), expected)
