// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "oscar/hadamard.cuh"

namespace oscar {

// Eight query rows as B operands, either rotated for pages or as they are for 16-bit
// tokens (exact_attention.cuh). Lane (g, t) holds a quarter of row g.
template <int Tiles>
struct QueryRows {
  uint32_t pairs[2 * Tiles];
  float factor[2];  // rotated only: to log2 units, for columns 2*t and 2*t + 1

  // The row's words as they are; null: zeros. Exact: channels 32*i + 8*t .. + 7 in words
  // 4*i .. 4*i + 3. For rotate(): channels 16*tile + 8*b + 2*t and the next, [tile][b].
  OSCAR_DEVICE void load(const uint8_t* row, bool exact, int lane) {
    const int t = lane & 3;
    if (exact) {
#pragma unroll
      for (int i = 0; i < Tiles / 2; ++i) {
        uint4 v = {};
        if (row) v = *reinterpret_cast<const uint4*>(row + 64 * i + 16 * t);
        pairs[4 * i] = v.x, pairs[4 * i + 1] = v.y, pairs[4 * i + 2] = v.z, pairs[4 * i + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2 * Tiles; ++i) {
        pairs[i] = row ? *reinterpret_cast<const uint32_t*>(row + 16 * i + 4 * t) : 0u;
      }
    }
  }

  // Rotate what load() has loaded; pairs with b = 1 are then divided by 16. Rows are scaled
  // to a common maximum, so that fp16 products with key scales neither overflow nor lose
  // small queries.
  OSCAR_DEVICE void rotate(bool is_bf16, float scale_log2, int lane) {
    constexpr float kTop = 8.f;
    const int t = lane & 3;
    float x[4 * Tiles];
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const float2 pair = is_bf16 ? unpack_bfloat162(pairs[i]) : unpack_half2(pairs[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
    hadamard_registers(x);  // channel bits 0, 3 and up
    hadamard_lanes(x, lane, 1, 4);  // channel bits 1 and 2
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < 4 * Tiles; ++i) top = fmaxf(top, fabsf(x[i]));
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
    const float shrink = top > 0.f ? kTop / top : 0.f;
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const float s = i & 1 ? shrink / 16.f : shrink;
      pairs[i] = pack_half2(x[2 * i] * s, x[2 * i + 1] * s);
    }
    const float own = top / kTop * scale_log2 * rsqrtf(16.f * Tiles);
    factor[0] = __shfl_sync(kFullWarp, own, 8 * t);
    factor[1] = __shfl_sync(kFullWarp, own, 8 * t + 4);
  }
};

}  // namespace oscar
