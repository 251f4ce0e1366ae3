// SPDX-License-Identifier: Apache-2.0
// Code words to the A operand of mma.m16n8k16.
//
// After masking, a 32-bit register holds two fp16 subnormals code * 4^slot * 2^-24,
// exact on tensor cores. Slot 2*j1 + j0 is register a[2*j1 + j0]: j1 selects the upper
// eight k indices, whose B operand the caller divides by 16; j0 selects rows 8..15,
// whose results are four times too large. kCodeUnit undoes the 2^-24.
#pragma once

#include "oscar/layout.cuh"
#include "oscar/ptx.cuh"

namespace oscar {

constexpr float kCodeUnit = 16777216.f;        // 2^24
constexpr float kCodeUnitUpper = 4194304.f;    // 2^24 / 4: rows 8..15
constexpr uint32_t kHalf2Sixteenth = 0x2c002c00u;
constexpr uint32_t kHalf2Sixteen = 0x4c004c00u;

struct Fragment {
  uint32_t a[4];
};

// 2-bit codes, 16 rows: `r` selects the upper or lower half of the 32-row word.
OSCAR_DEVICE Fragment two_bit_fragment(uint32_t word, int r) {
  const uint32_t x = r ? word >> 8 : word;
  return {{x & 0x00030003u, x & 0x000c000cu, x & 0x00300030u, x & 0x00c000c0u}};
}

// The codes of one word of any width. Wider codes merge their two planes once per
// word: even and odd slots separately, since neighbours would overlap.
template <int Bits>
struct CodeWord {
  uint32_t even, odd;

  // `high` is already rotated right by the block's index in its pair (3 bits).
  OSCAR_DEVICE CodeWord(uint32_t low, uint32_t high)
      : even(select_bits<0x33333333u>(low, high)), odd(select_bits<0xccccccccu>(low, high)) {}

  OSCAR_DEVICE Fragment fragment(int r) const {
    constexpr uint32_t kMask = Bits == 3 ? 0x00070007u : 0x000f000fu;
    const uint32_t e = r ? even >> 8 : even;
    const uint32_t o = r ? __funnelshift_r(odd, odd, 8) : odd;
    return {{e & kMask, o & (kMask << 2), e & (kMask << 4), o & (kMask << 6)}};
  }
};

template <>
struct CodeWord<2> {
  uint32_t word;
  OSCAR_DEVICE CodeWord(uint32_t low, uint32_t) : word(low) {}
  OSCAR_DEVICE Fragment fragment(int r) const { return two_bit_fragment(word, r); }
};

// The four words of chunk `chunk` of 32-token block `block` for this lane.
OSCAR_DEVICE uint4 load_words(const uint8_t* section, int block, int chunk, int chunks, int lane) {
  return *reinterpret_cast<const uint4*>(section + (block * chunks + chunk) * 512 + lane * 16);
}

// The same words of the high plane: of 3-bit codes, those of two blocks together.
template <int Bits>
OSCAR_DEVICE uint4 load_high_words(const uint8_t* section, int block, int chunk, int chunks, int lane) {
  if constexpr (Bits == 2) return uint4{};
  else return load_words(section, Bits == 3 ? block / 2 : block, chunk, chunks, lane);
}

// A word of the high plane as CodeWord expects it.
template <int Bits>
OSCAR_DEVICE uint32_t align_high(uint32_t word, int block) {
  return Bits == 3 ? __funnelshift_r(word, word, block & 1) : word;
}

// Four int8 bytes, each with 128 added modulo 256: bytes `Selector & 3` and `Selector >> 8 & 3` as fp16
// numbers, in units of 1/128. 0x64 above a byte makes it 1024 + byte; all of this is exact.
template <uint32_t Selector>
OSCAR_DEVICE uint32_t bytes_to_half2(uint32_t biased) {
  constexpr uint32_t kHalf2Unit = 0x20002000u, kHalf2MinusNine = 0xc880c880u;  // 1/128; (1024 + 128) / 128
  return fma_half2(__byte_perm(biased, 0x64646464u, Selector), kHalf2Unit, kHalf2MinusNine);
}
constexpr uint32_t kByteBias = 0x80808080u;
constexpr uint32_t kBytes01 = 0x4140u, kBytes23 = 0x4342u, kBytes02 = 0x4240u, kBytes13 = 0x4341u;

// Key scales or zeros of chunk `chunk` (four tiles) for this lane: fp16 pairs [tile][b].
template <class Layout>
OSCAR_DEVICE void load_key_params(const uint8_t* row, int t, int chunk, uint32_t (&pairs)[8]) {
  const uint4* source = reinterpret_cast<const uint4*>(row) + (t * Layout::kChunks + chunk) * Layout::kParamBytes;
  const uint4 v = source[0];
  if constexpr (Layout::kFp8Params) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      e4m3x4_to_half2(words[i], pairs[2 * i], pairs[2 * i + 1]);
    }
  } else {
    const uint4 w = source[1];
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
    pairs[4] = w.x, pairs[5] = w.y, pairs[6] = w.z, pairs[7] = w.w;
  }
}

}  // namespace oscar
