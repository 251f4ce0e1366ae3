// SPDX-License-Identifier: Apache-2.0
// Attention of one warp over up to 32 tokens in 16 bit: the step's own tokens in global memory, or
// a ring page of such tokens in shared memory. The model's own space, no rotation.
//
// Lanes load 16 bytes, eight consecutive channels. Keys may take the channels of a
// product in any order as long as the query takes the same; values are transposed in
// registers, which permutes the channels of the result (see token_channel()).
#pragma once

#include "oscar/query.cuh"
#include "oscar/softmax.cuh"

namespace oscar {

// Channel of row `g` of result tile `tile`; row g + 8 is the next one.
OSCAR_DEVICE int token_channel(int tile, int g) { return 32 * (tile / 2) + 8 * (g >> 1) + 4 * (tile & 1) + 2 * (g & 1); }

struct Tokens {
  const uint8_t *key, *value;        // of token 0
  int64_t key_stride, value_stride;  // bytes from token to token
  uint32_t valid;                    // bit i: token i may be read
  int position;                      // of token 0 in the step; negative: before the step
  int oldest, turn;                  // of a ring: a position before `oldest` is meant `turn` tokens later
};

OSCAR_DEVICE uint4 load_token(const uint8_t* base, int64_t stride, uint32_t valid, int token, int offset) {
  uint4 v = {};
  if (valid >> token & 1) v = *reinterpret_cast<const uint4*>(base + token * stride + offset);
  return v;
}

// Query row `first_row + column` is token `row / group` of the step and sees `reach` tokens up to itself.
template <bool Bf16, bool Plain, int Tiles, int NTiles>
OSCAR_DEVICE void attend_tokens(const Tokens& tokens, const QueryRows<Tiles> (&query)[NTiles], int first_row, int group,
                                int reach, float scale_log2, const SoftCap& soft_cap,
                                Accumulator<Tiles> (&acc)[NTiles], int lane) {
  const auto mma = [](float(&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    if constexpr (Bf16) mma_bf16(d, a0, a1, a2, a3, b0, b1);
    else mma_f16(d, a0, a1, a2, a3, b0, b1);
  };
  constexpr uint32_t kOnes = Bf16 ? 0x3f803f80u : 0x3c003c00u;
  const int g = lane >> 2, t = lane & 3;

#pragma unroll 1
  for (int first = 0; first < 32; first += 16) {
    const uint32_t valid = tokens.valid >> first;
    if ((valid & 0xffffu) == 0) continue;
    const uint8_t* keys = tokens.key + first * tokens.key_stride + 16 * t;
    const uint8_t* values = tokens.value + first * tokens.value_stride + 16 * t;

    float score[NTiles][1][4] = {};
#pragma unroll
    for (int i = 0; i < Tiles / 2; ++i) {
      const uint4 a = load_token(keys, tokens.key_stride, valid, g, 64 * i);
      const uint4 b = load_token(keys, tokens.key_stride, valid, g + 8, 64 * i);
#pragma unroll
      for (int n = 0; n < NTiles; ++n) {
        mma(score[n][0], a.x, b.x, a.y, b.y, query[n].pairs[4 * i], query[n].pairs[4 * i + 1]);
        mma(score[n][0], a.z, b.z, a.w, b.w, query[n].pairs[4 * i + 2], query[n].pairs[4 * i + 3]);
      }
    }
    uint32_t weight[NTiles][2];
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
      const int column = first_row + 8 * n + 2 * t;
      const int limit[2] = {column / group, (column + 1) / group};
      float(&p)[4] = score[n][0];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = 8 * (j >> 1) + g;
        int position = tokens.position + first + token;
        if (!Plain && position < tokens.oldest) position += tokens.turn;
        const int distance = limit[j & 1] - position;
        p[j] *= scale_log2;
        if (!Plain && soft_cap.used()) p[j] = soft_cap(p[j]);
        if (!(valid >> token & 1) || distance < 0 || (!Plain && distance >= reach)) p[j] = -INFINITY;
      }
      softmax_step(score[n], acc[n]);
      weight[n][0] = transpose_8x8(Bf16 ? pack_bfloat162(p[0], p[1]) : pack_half2(p[0], p[1]));
      weight[n][1] = transpose_8x8(Bf16 ? pack_bfloat162(p[2], p[3]) : pack_half2(p[2], p[3]));
      mma(acc[n].extra, kOnes, kOnes, kOnes, kOnes, weight[n][0], weight[n][1]);
    }
#pragma unroll
    for (int i = 0; i < Tiles / 2; ++i) {
      const uint4 a = load_token(values, tokens.value_stride, valid, g, 64 * i);
      const uint4 b = load_token(values, tokens.value_stride, valid, g + 8, 64 * i);
      // Even channels of two words in one register, odd ones in another: as bytes arrive in ring_attention.cuh.
      const auto even = [](uint32_t x, uint32_t y) { return transpose_8x8(__byte_perm(x, y, 0x5410)); };
      const auto odd = [](uint32_t x, uint32_t y) { return transpose_8x8(__byte_perm(x, y, 0x7632)); };
      const uint32_t a0 = even(a.x, a.y), a1 = odd(a.x, a.y), a2 = even(a.z, a.w), a3 = odd(a.z, a.w);
      const uint32_t b0 = even(b.x, b.y), b1 = odd(b.x, b.y), b2 = even(b.z, b.w), b3 = odd(b.z, b.w);
#pragma unroll
      for (int n = 0; n < NTiles; ++n) {
        mma(acc[n].out[2 * i], a0, a1, b0, b1, weight[n][0], weight[n][1]);
        mma(acc[n].out[2 * i + 1], a2, a3, b2, b3, weight[n][0], weight[n][1]);
      }
    }
  }
}

template <int Tiles>
OSCAR_DEVICE void write_token_result(const Accumulator<Tiles>& acc, float* target, int rows, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (2 * t + c < rows) {
      float* row = target + (2 * t + c) * 16 * Tiles;
#pragma unroll
      for (int i = 0; i < Tiles; ++i) {
        *reinterpret_cast<float2*>(row + token_channel(i, g)) = make_float2(acc.out[i][c], acc.out[i][2 + c]);
      }
    }
  }
}

}  // namespace oscar
