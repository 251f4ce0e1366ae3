// SPDX-License-Identifier: Apache-2.0
// Attention of one warp over a ring page of int8 tokens in shared memory, sixteen at a time.
//
// Lanes load 8 bytes, eight consecutive channels of a token. Bytes become fp16 numbers in units of 1/128,
// so that all products are of fp16 whatever the model's dtype: QueryRows::to_half(). Key scales multiply
// the scores, value scales the weights, both by 128. Values are transposed as pairs of bytes: half of what
// 16-bit tokens need, and rows g and g + 8 of a tile are neighbouring channels (token_channel()).
#pragma once

#include "oscar/fragments.cuh"
#include "oscar/token_attention.cuh"

namespace oscar {

// Attend to tokens `first` .. `first + 15` of `page`, bit i of `valid` saying whether token first + i may be
// read. What the others hold is arbitrary: any bytes are finite numbers, their scales count for nothing.
// `finish(token, n, c, score)`: the score of token first + `token` and column c of the lane in query tile n.
template <class Layout, int NTiles, class Finish>
OSCAR_DEVICE void attend_int8_tokens(const uint8_t* page, int first, uint32_t valid, const Finish& finish,
                                     const QueryRows<Layout::kTiles> (&query)[NTiles],
                                     Accumulator<Layout::kTiles> (&acc)[NTiles], int lane) {
  constexpr int kTiles = Layout::kTiles, kRow = Layout::kRingRowBytes;
  constexpr uint32_t kOnes = 0x3c003c00u, k128 = 0x58005800u;
  const int g = lane >> 2, t = lane & 3;
  // Rows behind the last token would be those of another warp.
  const uint8_t* lower = page + min(first + g, Layout::kRingTokens - 1) * 2 * kRow + 8 * t;
  const uint8_t* upper = page + min(first + g + 8, Layout::kRingTokens - 1) * 2 * kRow + 8 * t;
  const uint8_t* scales = page + Layout::kRingScales + first * Layout::kRingScaleBytes;
  const auto load = [](const uint8_t* row, int offset) {
    const uint2 v = *reinterpret_cast<const uint2*>(row + offset);
    return uint2{v.x ^ kByteBias, v.y ^ kByteBias};
  };

  constexpr int kChains = NTiles == 1 ? 2 : 1;  // of products, independent of each other
  float part[NTiles][kChains][4] = {};
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) {
    const uint2 a = load(lower, 32 * i), b = load(upper, 32 * i);
    const uint32_t a0 = bytes_to_half2<kBytes01>(a.x), a1 = bytes_to_half2<kBytes23>(a.x);
    const uint32_t b0 = bytes_to_half2<kBytes01>(b.x), b1 = bytes_to_half2<kBytes23>(b.x);
    const uint32_t a2 = bytes_to_half2<kBytes01>(a.y), a3 = bytes_to_half2<kBytes23>(a.y);
    const uint32_t b2 = bytes_to_half2<kBytes01>(b.y), b3 = bytes_to_half2<kBytes23>(b.y);
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
      mma_f16(part[n][0], a0, b0, a1, b1, query[n].pairs[4 * i], query[n].pairs[4 * i + 1]);
      mma_f16(part[n][kChains - 1], a2, b2, a3, b3, query[n].pairs[4 * i + 2], query[n].pairs[4 * i + 3]);
    }
  }
  float key_scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    key_scale[r] = 128.f * unpack_half2(*reinterpret_cast<const uint32_t*>(scales + (8 * r + g) * 4)).x;
  }
  uint32_t value_scale[2];  // of tokens 8 * b + 2 * t and the next
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const uint2 both = *reinterpret_cast<const uint2*>(scales + (8 * b + 2 * t) * 4);
    const uint32_t bits = valid >> (8 * b + 2 * t);
    const uint32_t mask = (bits & 1u ? 0x0000ffffu : 0u) | (bits & 2u ? 0xffff0000u : 0u);
    value_scale[b] = mul_half2(__byte_perm(both.x, both.y, 0x7632) & mask, k128);
  }
  uint32_t weight[NTiles][2];
#pragma unroll
  for (int n = 0; n < NTiles; ++n) {
    float score[1][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = 8 * (j >> 1) + g;
      const float product = kChains == 1 ? part[n][0][j] : part[n][0][j] + part[n][kChains - 1][j];
      const float finished = finish(token, n, j & 1, product * (key_scale[j >> 1] * query[n].factor[j & 1]));
      score[0][j] = valid >> token & 1u ? finished : -INFINITY;
    }
    softmax_step(score, acc[n]);
    const uint32_t b0 = transpose_8x8(pack_half2(score[0][0], score[0][1]));
    const uint32_t b1 = transpose_8x8(pack_half2(score[0][2], score[0][3]));
    mma_f16(acc[n].extra, kOnes, kOnes, kOnes, kOnes, b0, b1);
    weight[n][0] = mul_half2(b0, value_scale[0]);
    weight[n][1] = mul_half2(b1, value_scale[1]);
  }
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) {
    const uint2 a = load(lower, kRow + 32 * i), b = load(upper, kRow + 32 * i);
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const uint32_t x = transpose_8x8(word ? a.y : a.x), y = transpose_8x8(word ? b.y : b.x);
      const uint32_t a0 = bytes_to_half2<kBytes02>(x), a1 = bytes_to_half2<kBytes13>(x);
      const uint32_t a2 = bytes_to_half2<kBytes02>(y), a3 = bytes_to_half2<kBytes13>(y);
#pragma unroll
      for (int n = 0; n < NTiles; ++n) {
        mma_f16(acc[n].out[2 * i + word], a0, a1, a2, a3, weight[n][0], weight[n][1]);
      }
    }
  }
}

}  // namespace oscar
