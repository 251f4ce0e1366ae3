# SPDX-License-Identifier: Apache-2.0
"""Byte layout of a page: the single source of truth for every kernel.

A page holds 128 tokens of one KV head in one contiguous run of bytes::

    k_codes   2 bits per element   the low two bits of every key code
    k_high    0, 1 or 2 bits       the remaining bits (3- and 4-bit keys)
    v_codes   2 bits per element   the low two bits of every value code
    v_high    0, 1 or 2 bits       the remaining bits (3- and 4-bit values)
    k_params  per key group: head_dim scales, then head_dim zeros (fp16 or e4m3)
    v_scale   fp16, per token and value group
    v_zero    fp16, per token and value group
    norms     fp16, per token (absent without a key norm)
    padding   up to a whole number of bytes per token

A key element is ``norm * (scale * code + zero)`` and a value element is
``scale * code + zero``, both in the rotated space (:mod:`vllm_oscar.core.hadamard`).

The order inside a section is the order in which a warp consumes it as the A
operand of ``mma.m16n8k16`` (keys: rows are tokens, values: rows are channels), so
that a lane loads its fragments with 16-byte loads and one mask turns a 32-bit
word into two fp16 subnormals, ``code * 4**slot * 2**-24``. With ``lane = 4*g + t``:

* A *code word* covers 32 tokens x 16 channels. Bit ``16*half + 8*r + 2*(2*j1 + j0)``
  of lane ``(g, t)`` starts the code of

  - keys:   token ``16*r + 8*j0 + g``, channel ``8*j1 + 2*t + half``
  - values: token ``16*r + 8*j1 + 2*t + half``, channel ``8*j0 + g``

  Words of 32 tokens are stored in chunks of four 16-channel tiles,
  ``[chunk][lane][tile % 4]``; the last chunk has ``head_dim/16 % 4`` tiles if that
  is not zero. The four 32-token blocks of the page follow each other.
* ``k_high`` and ``v_high`` of 4-bit codes have the same words for the upper two bits,
  rotated left by two. Of 3-bit codes, one word covers two 32-token blocks: where a
  4-bit word has bit b of a code, it has the single upper bit of block b.
  Shifting right (rotating) by 8*r and masking by ``0x000C000C << 2*slot`` (3-bit:
  rotating by 8*r + b, mask ``0x00040004 << 2*slot``) lines it up with the low plane.
* ``k_params``: channel ``16*tile + 8*b + 2*t + half`` is at ``[t][tile][b][half]``.
* ``v_scale``: token ``16*tile + 8*b + 2*t + half`` is at ``[tile][t][group][b][half]``,
  ``v_zero``: at ``[tile][group][t][b][half]``.
* ``norms``: token ``16*tile + 8*j0 + g`` is at ``[tile][g][j0]``.

**The first token.** Where ``first_token`` is set, the first page of a sequence uses the
parameters of key group 0 for all its tokens, and the first ``2*head_dim`` bytes of group 1
hold token 0 in 8 bits; further groups are written as everywhere and never read:

* ``first_key``: ``head_dim`` signed bytes. Key element: ``norms[0] * byte``. The norm of
  this token is a scale, so a kernel puts the product of query and bytes where it has the
  product of query and dequantized unit key, before norms. Order: ``[t][tile][b][half]`` as in
  ``k_params``, in which the lanes hold the query too.
* ``first_value``: ``head_dim`` unsigned bytes. Value element: ``v_scale[0] * byte +
  v_zero[0]``, the formula of every token, with the byte for the code. Channel
  ``16*tile + 8*j0 + g`` is at ``[g][tile][j0]``, as a lane of the value product needs them.

The codes of this token are 0 in all four planes. So the value planes add nothing for it,
its zero counts as any other, and what is missing is ``weight * v_scale[0] * byte``: one more
row, or on tensor cores no product at all. There the slots of token 0 are those of
``t = r = j1 = half = 0``, and the fragments of these lanes get ``byte`` of ``j0 = 0``, and
``byte << 2`` of ``j0 = 1``, by a bitwise or: ten bits of a subnormal hold both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from vllm_oscar.core.config import PAGE_TOKENS, SUPPORTED_HEAD_DIMS, NormScope, OscarConfig, get_preset
from vllm_oscar.core.ring import RingType

FORMAT_VERSION = 2
"""Changes whenever a page of the same configuration would be read otherwise. Native libraries are
built for one version and refused with another. 1: token 0's key alone, in fp16; 2-bit values."""

_LANES = 32
_WORD_BYTES = 4


@dataclass(frozen=True)
class Section:
    """A byte range ``[offset, offset + nbytes)`` of a page."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.end)


@dataclass(frozen=True)
class PageFormat:
    """Layout of one page (128 tokens, one KV head) for a preset and a head size.

    All sizes are bytes unless the name says otherwise.
    """

    config: OscarConfig
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim not in SUPPORTED_HEAD_DIMS:
            known = ", ".join(map(str, SUPPORTED_HEAD_DIMS))
            raise ValueError(f"head_dim {self.head_dim} is not supported by OScaR pages; supported: {known}")

    @staticmethod
    @lru_cache(maxsize=None)
    def preset(name: str, head_dim: int) -> PageFormat:
        """The layout of preset ``name``, e.g. ``PageFormat.preset("oscar", 128)``."""
        return PageFormat(get_preset(name), head_dim)

    # ---- counts -------------------------------------------------------------
    @property
    def tiles(self) -> int:
        """16-channel tiles per token."""
        return self.head_dim // 16

    @property
    def key_groups(self) -> int:
        """Key groups per page."""
        return PAGE_TOKENS // self.config.key_group

    @property
    def value_groups(self) -> int:
        """Value groups per token. The last may cover fewer channels."""
        return -(-self.head_dim // self.config.value_group)

    # ---- sections -----------------------------------------------------------
    @cached_property
    def sections(self) -> dict[str, Section]:
        """Offset and length of every section, in page order."""
        config, dim = self.config, self.head_dim
        value_params = PAGE_TOKENS * self.value_groups * 2
        lengths = {
            "k_codes": PAGE_TOKENS * dim * 2 // 8,
            "k_high": PAGE_TOKENS * dim * (config.key_bits - 2) // 8,
            "v_codes": PAGE_TOKENS * dim * 2 // 8,
            "v_high": PAGE_TOKENS * dim * (config.value_bits - 2) // 8,
            "k_params": self.key_groups * self.key_group_bytes,
            "v_scale": value_params,
            "v_zero": value_params,
            "norms": 0 if config.norm is NormScope.NONE else PAGE_TOKENS * 2,
        }
        sections, offset = {}, 0
        for name, nbytes in lengths.items():
            sections[name] = Section(offset, nbytes)
            offset += nbytes
        return sections

    @property
    def key_group_bytes(self) -> int:
        """Scales and zeros of one key group."""
        return 2 * self.head_dim * self.config.key_param.nbytes

    @property
    def first_key(self) -> Section:
        """Where the first page of a sequence holds token 0's key, int8 (``first_token``)."""
        return Section(self.sections["k_params"].offset + self.key_group_bytes, self.head_dim)

    @property
    def first_value(self) -> Section:
        """Where the first page of a sequence holds token 0's value, uint8 (``first_token``)."""
        return Section(self.first_key.end, self.head_dim)

    @cached_property
    def bytes_per_token(self) -> int:
        """Page bytes per token of one KV head, K and V together, rounded up."""
        return -(-self.sections["norms"].end // PAGE_TOKENS)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: 128 tokens of one KV head."""
        return self.bytes_per_token * PAGE_TOKENS

    @property
    def bits_per_element(self) -> float:
        """Effective bits per K or V element, all metadata and padding included."""
        return self.bytes_per_token * 8 / (2 * self.head_dim)

    @property
    def compression(self) -> float:
        """How many times smaller than 16-bit K and V."""
        return 16 / self.bits_per_element

    # ---- the ring -----------------------------------------------------------
    @property
    def ring_type(self) -> RingType:
        """In what the ring holds tokens."""
        return self.config.ring

    def ring_tokens_per_page(self, itemsize: int) -> int:
        """Tokens of a ring page, for a model whose elements have ``itemsize`` bytes (:mod:`vllm_oscar.core.ring`)."""
        return self.page_bytes // self.ring_type.token_bytes(self.head_dim, itemsize)

    def ring_pages(self, itemsize: int, drafts: int = 0) -> int:
        """Pages of a request's ring, with room for ``drafts`` tokens that may be rejected after a step."""
        return -(-self.config.ring_capacity(drafts) // self.ring_tokens_per_page(itemsize))


# ---- element order inside the sections --------------------------------------
def _word_axes(tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tile and lane of every word of a 32-token block, in storage order."""
    tile_of, lane_of = [], []
    for first in range(0, tiles, 4):
        width = min(4, tiles - first)
        for lane in range(_LANES):
            tile_of += range(first, first + width)
            lane_of += [lane] * width
    return torch.tensor(tile_of), torch.tensor(lane_of)


def _slot_axes() -> tuple[torch.Tensor, ...]:
    """(r, j0, j1, half, shift) of the 16 two-bit slots of a code word."""
    slot = torch.arange(16)
    half, r, j1, j0 = slot >> 3, (slot >> 2) & 1, (slot >> 1) & 1, slot & 1
    return r, j0, j1, half, 2 * slot


@lru_cache(maxsize=None)
def code_order(head_dim: int, operand: str) -> torch.Tensor:
    """Element of every 2-bit slot: ``[4 * words, 16]`` indices ``token * head_dim + channel``.

    ``operand`` is ``"key"`` or ``"value"``. Slot ``s`` of a word is its bits ``2*s, 2*s+1``.
    """
    tile, lane = _word_axes(head_dim // 16)
    g, t = (lane >> 2)[:, None], (lane & 3)[:, None]
    r, j0, j1, half, _ = _slot_axes()
    if operand == "key":
        token, channel = 16 * r + 8 * j0 + g, 8 * j1 + 2 * t + half
    else:
        token, channel = 16 * r + 8 * j1 + 2 * t + half, (8 * j0 + g).expand(-1, 16)
    channel = channel + 16 * tile[:, None]
    block = torch.arange(PAGE_TOKENS // 32)[:, None, None]
    return ((32 * block + token) * head_dim + channel).reshape(-1, 16)


@lru_cache(maxsize=None)
def key_param_order(head_dim: int) -> torch.Tensor:
    """Channel at each position of a scale or zero row: ``[head_dim]``."""
    t, tile, b, half = torch.meshgrid(
        *(torch.arange(n) for n in (4, head_dim // 16, 2, 2)), indexing="ij"
    )
    return (16 * tile + 8 * b + 2 * t + half).reshape(-1)


@lru_cache(maxsize=None)
def first_value_order(head_dim: int) -> torch.Tensor:
    """Channel at each position of ``first_value``: ``[head_dim]``."""
    g, tile, j0 = torch.meshgrid(*(torch.arange(n) for n in (8, head_dim // 16, 2)), indexing="ij")
    return (16 * tile + 8 * j0 + g).reshape(-1)


@lru_cache(maxsize=None)
def value_param_order(groups: int, section: str) -> torch.Tensor:
    """Index ``token * groups + group`` at each position of ``v_scale`` or ``v_zero``."""
    axes = {"tile": PAGE_TOKENS // 16, "t": 4, "group": groups, "b": 2, "half": 2}
    names = ("tile", "t", "group", "b", "half") if section == "v_scale" else ("tile", "group", "t", "b", "half")
    grid = dict(zip(names, torch.meshgrid(*(torch.arange(axes[n]) for n in names), indexing="ij")))
    token = 16 * grid["tile"] + 8 * grid["b"] + 2 * grid["t"] + grid["half"]
    return (token * groups + grid["group"]).reshape(-1)


@lru_cache(maxsize=None)
def norm_order() -> torch.Tensor:
    """Token at each position of ``norms``: ``[128]``."""
    tile, g, j0 = torch.meshgrid(*(torch.arange(n) for n in (PAGE_TOKENS // 16, 8, 2)), indexing="ij")
    return (16 * tile + 8 * j0 + g).reshape(-1)


# ---- codes to words and back -------------------------------------------------
def _rotate_left(words: torch.Tensor, by: int) -> torch.Tensor:
    """32-bit rotation of words held in int64."""
    return ((words << by) | (words >> (32 - by))) & 0xFFFFFFFF


def _pack_slots(fields: torch.Tensor) -> torch.Tensor:
    """``[..., words, 16]`` two-bit fields to ``[..., words]`` words in int64."""
    return (fields.long() << torch.arange(0, 32, 2, device=fields.device)).sum(-1)


def _unpack_slots(words: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_pack_slots`."""
    return (words[..., None] >> torch.arange(0, 32, 2, device=words.device)) & 3


def _words_to_bytes(words: torch.Tensor) -> torch.Tensor:
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.contiguous().view(torch.uint8)


def _bytes_to_words(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def pack_codes(codes: torch.Tensor, bits: int, operand: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[n, 128, head_dim]`` to the bytes of their two planes.

    Returns ``(low, high)``, uint8 ``[n, nbytes]``; ``high`` is empty for 2 bits.
    """
    order = code_order(codes.shape[-1], operand).to(codes.device)
    slots = codes.flatten(1).long()[:, order]  # [n, words, 16]
    low = _words_to_bytes(_pack_slots(slots & 3))
    upper = slots >> 2
    if bits == 2:
        high = low[:, :0]
    elif bits == 4:
        high = _words_to_bytes(_rotate_left(_pack_slots(upper), 2))
    else:  # one bit each of two 32-token blocks side by side
        pairs = upper.unflatten(1, (2, 2, -1))  # [n, 64-token pair, block, words, 16]
        high = _words_to_bytes(_rotate_left(_pack_slots(pairs[:, :, 0] | pairs[:, :, 1] << 1), 2).flatten(1))
    return low, high


def unpack_codes(low: torch.Tensor, high: torch.Tensor, bits: int, operand: str, head_dim: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`: int64 ``[n, 128, head_dim]``."""
    slots = _unpack_slots(_bytes_to_words(low))  # [n, words, 16]
    if bits > 2:
        fields = _unpack_slots(_rotate_left(_bytes_to_words(high), 30))
        if bits == 3:
            fields = fields.unflatten(1, (2, -1))  # [n, pair, words, 16]
            fields = torch.stack([fields & 1, fields >> 1], 2).flatten(1, 3)
        slots = slots | fields << 2
    codes = torch.empty(low.shape[0], PAGE_TOKENS * head_dim, dtype=torch.int64, device=low.device)
    codes[:, code_order(head_dim, operand).to(low.device).flatten()] = slots.flatten(1)
    return codes.view(-1, PAGE_TOKENS, head_dim)
