# SPDX-License-Identifier: Apache-2.0
"""The normative codec and attention against plain formulations of the paper."""

from __future__ import annotations

from dataclasses import replace

import independent_codec
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_oscar.core.config import PRESETS, SUPPORTED_HEAD_DIMS, NormScope, OscarConfig, ParamType
from vllm_oscar.core.format import PageFormat, unpack_codes
from vllm_oscar.core.hadamard import hadamard, rotate
from vllm_oscar.core.reference import _gain, attention, decode_page, decode_pages, encode_page, encode_pages
from vllm_oscar.core.ring import read_tokens, ring_slots, write_tokens
from vllm_oscar.core.softmax import Softmax

OURS = [name for name, config in PRESETS.items() if config.first_token]
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


# ---- the codec, stated a second time ------------------------------------------------------
def independent(key: torch.Tensor, value: torch.Tensor, fmt: PageFormat, first: bool, rotation):
    """What the independent codec gives back, in the model's own space."""
    return map(torch.from_numpy, independent_codec.block(key.numpy(), value.numpy(), fmt.config, first, rotation))


def off_centre(key: torch.Tensor, value: torch.Tensor, rotation: torch.Tensor):
    """Every fourth rotated key channel lies up to seven spans from zero, every second value group three."""
    dim = key.shape[-1]
    shift = torch.linspace(-40, 40, dim) * (torch.arange(dim) % 4 == 0)
    lifted = 12.0 * (torch.arange(dim) // 32 % 2)
    return key + shift @ rotation.T.float(), value + lifted @ rotation.T.float()


@pytest.mark.parametrize("order", [64, 128, 256])
def test_the_rotation_is_the_papers(order):
    torch.testing.assert_close(hadamard(order), torch.from_numpy(independent_codec.sylvester(order)).float())


@pytest.mark.parametrize("preset", OURS)
@pytest.mark.parametrize("head_dim", [64, 112, 256])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("first", [False, True])
def test_our_presets_are_what_is_stated(preset, head_dim, centred, first):
    key, value = random_block(head_dim, seed=5)
    rotation = hadamard(head_dim).double()
    key, value = key * (1 + torch.arange(128) % 7)[:, None, None], value + 0.3  # norms that differ, and a mean
    if not centred:
        key, value = off_centre(key, value, rotation)
    fmt = PageFormat.preset(preset, head_dim)
    found = decode_page(encode_page(key, value, fmt, first=first), fmt, first=first)
    for have, want in zip(found, independent(key, value, fmt, first, rotation.numpy())):
        have, want = have.double() @ rotation, want @ rotation
        error = (have - want).abs().amax(-1) / want.abs().amax(-1)  # of each token and head
        assert error[0].max() < tolerances.INDEPENDENT
        off = error > tolerances.INDEPENDENT
        assert off.double().mean() < tolerances.INDEPENDENT_EDGES
        assert error.max() < 0.5  # a code on a rounding edge: one step


def test_the_ring_is_what_is_stated():
    key, value = random_block(128, seed=6, scale=30.0)
    key[5] = 0.0
    key[6, :, 3] = 2e7  # the scale saturates
    fmt = PageFormat.preset("oscar", 128)
    pages = fmt.ring_pages(2)
    ring = torch.zeros(pages, 2, fmt.page_bytes, dtype=torch.uint8)
    at = ring_slots(torch.arange(pages).expand(128, -1), torch.arange(128), fmt.ring_tokens_per_page(2), pages)
    write_tokens(ring, fmt, *at, key, value)
    for have, exact in zip(read_tokens(ring, fmt, *at, torch.bfloat16), (key, value)):
        want = torch.from_numpy(independent_codec.ring(exact.numpy()))
        torch.testing.assert_close(have.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("centred, steps_off", [(True, 0.01), (False, 0.1)])
def test_oscar_paper_is_the_paper(head_dim, centred, steps_off):
    key, value = random_block(head_dim, seed=3)
    if not centred:
        key, value = off_centre(key, value, hadamard(head_dim))
    fmt = PageFormat.preset("oscar_paper", head_dim)
    found = decode_page(encode_page(key, value, fmt), fmt)
    exact = independent(key, value, fmt, False, None)
    for have, want, original in zip(found, exact, (key, value)):
        # A code on a rounding edge may fall to the other side: in float32 rarely, by a zero point of many
        # steps, which is stored in fp16, more often. That is one step in a token, and no larger error.
        assert relative(have.double(), want) < 1e-4
        error, loss = (have - want).norm(dim=-1), (want - original).norm(dim=-1)
        assert (error > 0.01 * loss).double().mean() < steps_off
        assert relative(have, original) == pytest.approx(relative(want, original), rel=0.001)


def test_the_paper_error_is_what_its_quantizer_gives_on_gaussians():
    """PAPER.md, table of quantizers: 0.165 (squared error over variance) for groups of 32."""
    key, value = random_block(128, heads=8)
    fmt = PageFormat.preset("oscar_paper", 128)
    for found, exact in zip(decode_page(encode_page(key, value, fmt), fmt), (key, value)):
        assert relative(found, exact) == pytest.approx(0.165, abs=0.01)


@pytest.mark.parametrize(
    "preset, key_error, value_error",
    [
        ("oscar", 0.0327, 0.146),
        ("oscar_small", 0.1185, 0.139),
        ("oscar_large", 0.0327, 0.0386),
        ("oscar_4bit", 0.0082, 0.0099),
    ],
)
def test_the_error_of_our_presets_on_gaussians(preset, key_error, value_error):
    """The values are recorded, so a change of the quantizer shows."""
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
    assert relative(found, same) < 1e-2


# ---- the first page -------------------------------------------------------------------
def sink_block(head_dim: int):
    """A block whose first token has a large key and a small value, as attention sinks do."""
    key, value = random_block(head_dim)
    key[0] *= 50
    value[0] *= 0.02
    return key, value


@pytest.mark.parametrize("preset", OURS)
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_the_first_token_of_a_sequence_is_kept_in_eight_bits(preset, head_dim):
    key, value = sink_block(head_dim)
    fmt = PageFormat.preset(preset, head_dim)
    page = encode_page(key, value, fmt, first=True)
    found_key, found_value = decode_page(page, fmt, first=True)
    key_step = rotate(key[0]).abs().amax(-1) / 127
    value_step = (rotate(value[0]).amax(-1) - rotate(value[0]).amin(-1)) / 255
    # Half a step in every channel at worst, and a scale and a zero in fp16.
    assert ((found_key[0] - key[0]).norm(dim=-1) <= (0.5 * key_step + 1e-3 * key_step) * head_dim**0.5).all()
    assert ((found_value[0] - value[0]).norm(dim=-1) <= (0.5 * value_step + 0.1 * value_step) * head_dim**0.5).all()
    # It does not widen the others' range: they lose what one group of 127 tokens loses.
    assert relative(found_key[1:], key[1:]) < (0.24, 0.06, 0.015)[fmt.config.key_bits - 2]
    later_key, later_value = decode_page(encode_page(key, value, fmt), fmt)
    assert relative(later_key[0], key[0]) > 10 * relative(found_key[0], key[0])
    assert relative(later_value[0], value[0]) > 10 * relative(found_value[0], value[0])
    assert torch.equal(later_value[1:], found_value[1:])


@pytest.mark.parametrize("preset", OURS)
def test_a_first_page_without_its_eight_bit_codes_has_no_first_value_but_its_zero(preset):
    """Kernels rely on it: the codes of token 0 are 0 in all planes, and its zero counts as any other."""
    key, value = sink_block(64)
    fmt = PageFormat.preset(preset, 64)
    page = encode_page(key, value, fmt, first=True)
    planes = [page[:, fmt.sections[name].slice].contiguous() for name in ("v_codes", "v_high")]
    assert not unpack_codes(*planes, fmt.config.value_bits, "value", 64)[:, 0].any()
    planes = [page[:, fmt.sections[name].slice].contiguous() for name in ("k_codes", "k_high")]
    assert not unpack_codes(*planes, fmt.config.key_bits, "key", 64)[:, 0].any()
    page[:, fmt.first_value.slice] = 0
    _, found = decode_page(page, fmt, first=True)
    low = rotate(value[0]).amin(-1, keepdim=True).expand(-1, 64)
    assert torch.allclose(rotate(found[0]), low, rtol=2e-3)


@pytest.mark.parametrize("preset", OURS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_byte_of_the_first_token_is_where_the_layout_says(preset, head_dim):
    key, value = sink_block(head_dim)
    fmt = PageFormat.preset(preset, head_dim)
    page = encode_page(key, value, fmt, first=True)
    before = [rotate(x[0]) for x in decode_page(page, fmt, first=True)]
    tiles = head_dim // 16
    channel = 37
    tile, b, t, half = channel // 16, channel // 8 % 2, channel % 8 // 2, channel % 2
    page[:, fmt.first_key.offset + ((t * tiles + tile) * 2 + b) * 2 + half] ^= 64
    j0, g = channel // 8 % 2, channel % 8
    page[:, fmt.first_value.offset + (g * tiles + tile) * 2 + j0] ^= 64
    for have, was in zip(decode_page(page, fmt, first=True), before):
        changed = (rotate(have[0]) - was).abs()
        others = torch.arange(head_dim) != channel
        assert (changed[:, others] < 1e-3 * changed[:, [channel]]).all()
        assert (changed[:, channel] > 0).all()


def test_the_paper_treats_no_page_specially():
    key, value = random_block(128)
    fmt = PageFormat.preset("oscar_paper", 128)
    assert torch.equal(encode_page(key, value, fmt, first=True), encode_page(key, value, fmt))


# ---- gains --------------------------------------------------------------------------------
def shrinkage(found: torch.Tensor, exact: torch.Tensor, group: int) -> torch.Tensor:
    """Per token, head and group of channels: how much of ``exact`` is left along itself."""
    found, exact = (x.unflatten(-1, (-1, group)) for x in (found, exact))
    return (found * exact).sum(-1) / exact.square().sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("value_group", [32, 256])
def test_gains_remove_the_shrinkage(bits, value_group):
    key, value = random_block(64, seed=2, heads=4)
    group = min(value_group, 64)
    left = {}
    for gain in (False, True):
        config = OscarConfig("any", bits, bits, value_group=value_group, key_clip=0.8, value_clip=0.6,
                             key_gain=gain, value_gain=gain)  # fmt: skip
        fmt = PageFormat(config, 64)
        found = decode_page(encode_page(key, value, fmt), fmt)
        left[gain] = shrinkage(found[0], key, 64), shrinkage(rotate(found[1]), rotate(value), group)
    for shrunk, whole in zip(left[False], left[True]):
        assert shrunk.mean() < 0.99  # by clipping at every bit width
        assert (whole - 1).abs().max() < 2e-3  # of fp16


def test_a_gain_is_bounded_and_never_nan():
    x = torch.tensor([[1.0, -2.0, 3.0]])
    for coded, gain in ((x, 1), (x / 1.25, 1.25), (x / 8, 2), (8 * x, 0.5), (-x, 1), (0 * x, 1), (torch.nan * x, 1)):
        assert _gain(x, coded).item() == pytest.approx(gain)
    assert _gain(0 * x, 0 * x).item() == 1
    assert _gain(torch.inf * x, torch.inf * x).item() == 1
    assert _gain(1e25 * x, 60000 * x).item() == 2  # a sum of squares beyond float32


def test_gains_are_the_encoders_business():
    """A decoder reads a page alike, whatever made it."""
    key, value = random_block(128)
    fmt = PageFormat.preset("oscar", 128)
    plain = PageFormat(replace(fmt.config, key_gain=False, value_gain=False), 128)
    page = encode_page(key, value, fmt, first=True)
    assert fmt.sections == plain.sections
    for have, want in zip(decode_page(page, plain, first=True), decode_page(page, fmt, first=True)):
        assert torch.equal(have, want)


# ---- options that no preset uses --------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"norm": NormScope.NONE, "key_gain": False, "first_token": False},
        {"norm": NormScope.JOINT},
        {"key_group": 128, "first_token": False},
        {"key_param": ParamType.FP16, "value_group": 32},
        {"integer_zero": True, "key_clip": 1.0, "value_clip": 1.0},
        {"key_bits": 4, "key_group": 32, "value_group": 64},
        {"value_bits": 3, "value_group": 64},
        {"value_bits": 4, "key_bits": 2},
    ],
)
@pytest.mark.parametrize("head_dim", [64, 80, 192])
def test_other_configs(options, head_dim):
    fmt = PageFormat(OscarConfig("other", **options), head_dim)
    key, value = random_block(head_dim)
    for first in (False, True):
        page = encode_page(key, value, fmt, first=first)
        for found, exact in zip(decode_page(page, fmt, first=first), (key, value)):
            assert relative(found, exact) < 0.3
            if first and fmt.config.first_token:
                assert relative(found[0], exact[0]) < 1e-4


# ---- attention ----------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "context, ring_start", [(0, 0), (5, 0), (128, 128), (128, 0), (300, 256), (300, 172), (400, 384)]
)
def test_attention_reads_pages_then_ring_then_the_step(preset, context, ring_start):
    check_attention(preset, context, ring_start, Softmax(0.2))


@pytest.mark.parametrize("options", [{}, {"soft_cap": 1.5}, {"sinks": torch.linspace(-2, 3, 6)}])
@pytest.mark.parametrize("sliding_window", [1, 2, 100, 127, 128, 129, 172, 173, 300, 306, 307, 4096])
@pytest.mark.parametrize("context, ring_start", [(0, 0), (128, 0), (300, 256), (300, 172), (400, 384)])
def test_attention_of_a_sliding_window_with_soft_cap_or_sinks(context, ring_start, sliding_window, options):
    check_attention("oscar", context, ring_start, Softmax(0.2, sliding_window, **options))


def check_attention(preset: str, context: int, ring_start: int, softmax: Softmax):
    """Against a loop over single logits in float64."""
    fmt, queries = PageFormat.preset(preset, 64), 7
    first_visible = max(0, context + 1 - (softmax.sliding_window or 1 << 30))
    ring_start = min(max(ring_start, first_visible), context)
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
            coded = coded.flatten(0, 1)[:ring_start].double()
            x[: len(coded)] = coded
    out = attention(
        query, key[context:], value[context:], pages[first_visible // 128 :],
        key[ring_start:context], value[ring_start:context], context, ring_start, softmax, fmt,
    )  # fmt: skip
    for row in range(queries):
        for head in range(6):
            end = context + row + 1
            begin = max(0, end - (softmax.sliding_window or end))
            logits = torch.stack([query[row, head].double() @ seen[0][i, head // 3] for i in range(begin, end)]) * 0.2
            if softmax.soft_cap:
                logits = softmax.soft_cap * (logits / softmax.soft_cap).tanh()
            weights = logits.exp()
            sink = 0.0 if softmax.sinks is None else softmax.sinks[head].double().exp()
            want = (weights[:, None] * seen[1][begin:end, head // 3]).sum(0) / (weights.sum() + sink)
            assert torch.allclose(out[row, head].double(), want, atol=2e-5)
