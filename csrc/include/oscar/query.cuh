// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "oscar/ptx.cuh"

namespace oscar {

// Eight query rows as B operands: rotated for pages, in fp16 for int8 tokens (ring_attention.cuh), or as they
// are for 16-bit tokens (token_attention.cuh). Lane (g, t) holds a quarter of row g.
template <int Tiles>
struct QueryRows {
  uint32_t pairs[2 * Tiles];
  float factor[2];  // rotated or in fp16: to log2 units, for columns 2*t and 2*t + 1

  // The row as it is; null: zeros. Channels 32*i + 8*t .. + 7 in words 4*i .. 4*i + 3.
  OSCAR_DEVICE void load(const uint8_t* row, int lane) {
#pragma unroll
    for (int i = 0; i < Tiles / 2; ++i) {
      uint4 v = {};
      if (row) v = *reinterpret_cast<const uint4*>(row + 64 * i + 16 * (lane & 3));
      pairs[4 * i] = v.x, pairs[4 * i + 1] = v.y, pairs[4 * i + 2] = v.z, pairs[4 * i + 3] = v.w;
    }
  }

  // What load() has loaded in fp16. Rows are scaled by powers of two to a common magnitude, so that
  // bfloat16 rows neither overflow nor lose anything but channels a hundred thousand times smaller than others.
  OSCAR_DEVICE void to_half(bool is_bf16, float scale_log2, int lane) {
    const auto unpack = [&](uint32_t word) { return is_bf16 ? unpack_bfloat162(word) : unpack_half2(word); };
    float top = 0x1p-100f;
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const float2 pair = unpack(pairs[i]);
      top = fmaxf(top, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
    const float power = __uint_as_float(__float_as_uint(top) & 0x7f800000u), shrink = 4.f / power;
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const float2 pair = unpack(pairs[i]);
      pairs[i] = pack_half2(pair.x * shrink, pair.y * shrink);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      factor[c] = __shfl_sync(kFullWarp, power, 4 * (2 * (lane & 3) + c)) / 4.f * scale_log2;
    }
  }

  // Rotate what load() has loaded: then channels 16*tile + 8*b + 2*t and the next are in word
  // [tile][b], those with b = 1 divided by 16. Rows are scaled to a common maximum, so that
  // fp16 products with key scales neither overflow nor lose small queries.
  OSCAR_DEVICE void rotate(bool is_bf16, float scale_log2, int lane) {
    constexpr float kTop = 8.f;
    float x[Tiles][4];
    if (is_bf16) multiply_by_signs<true>(x, lane);
    else multiply_by_signs<false>(x, lane);
    hadamard_tiles(x);
    float top[2] = {};
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) top[j & 1] = fmaxf(top[j & 1], fabsf(x[i][j]));
    }
    float shrink[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) top[c] = fmaxf(top[c], __shfl_xor_sync(kFullWarp, top[c], d));
      shrink[c] = top[c] > 0.f ? kTop / top[c] : 0.f;
      factor[c] = top[c] / kTop * scale_log2 * rsqrtf(16.f * Tiles);
    }
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      pairs[2 * i] = transpose_8x8(pack_half2(x[i][0] * shrink[0], x[i][1] * shrink[1]));
      pairs[2 * i + 1] = transpose_8x8(pack_half2(x[i][2] * (shrink[0] / 16.f), x[i][3] * (shrink[1] / 16.f)));
    }
  }

 private:
  // The butterflies over channel bits 0..4, as products with the 32x32 Hadamard matrix: tensor
  // cores need no shuffles. Result fragments: channels 16*tile + 0..15 by query rows.
  template <bool Bf16>
  OSCAR_DEVICE void multiply_by_signs(float (&x)[Tiles][4], int lane) const {
    constexpr uint32_t kSigns = 0x80008000u;
    const int g = lane >> 2, t = lane & 3;
    const auto sign = [](int bit) { return bit & 1 ? kSigns : 0u; };
    // Element (row, channel) is negative where row & channel has odd parity. Row: 16*m + 8*upper + g;
    // channel, in the order of load(): 8*t + 4*k + 2*b + half.
    const uint32_t base = (Bf16 ? 0x3f803f80u : 0x3c003c00u) ^ (sign(g) & 0x80000000u);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < Tiles / 2; ++i) x[2 * i + m][0] = x[2 * i + m][1] = x[2 * i + m][2] = x[2 * i + m][3] = 0.f;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t a = base ^ (m ? sign(t >> 1) : 0u) ^ (k ? sign(g >> 2) : 0u);
        const uint32_t a1 = a ^ sign(t), a2 = a ^ sign(g >> 1), a3 = a1 ^ sign(g >> 1);
#pragma unroll
        for (int i = 0; i < Tiles / 2; ++i) {
          const uint32_t b0 = pairs[4 * i + 2 * k], b1 = pairs[4 * i + 2 * k + 1];
          if constexpr (Bf16) mma_bf16(x[2 * i + m], a, a1, a2, a3, b0, b1);
          else mma_f16(x[2 * i + m], a, a1, a2, a3, b0, b1);
        }
      }
    }
  }

  // The butterflies over the remaining channel bits.
  OSCAR_DEVICE static void hadamard_tiles(float (&x)[Tiles][4]) {
#pragma unroll
    for (int bit = 2; bit < Tiles; bit <<= 1) {
#pragma unroll
      for (int i = 0; i < Tiles; ++i) {
        if (i & bit) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float a = x[i][j], b = x[i | bit][j];
          x[i][j] = a + b;
          x[i | bit][j] = a - b;
        }
      }
    }
  }
};

}  // namespace oscar
