// SPDX-License-Identifier: Apache-2.0
// Sylvester-Hadamard transforms of power-of-two order, not normalised.
#pragma once

#include "oscar/ptx.cuh"

namespace oscar {

// Butterflies over the index bits of a register array.
template <int N>
OSCAR_DEVICE void hadamard_registers(float (&x)[N]) {
#pragma unroll
  for (int bit = 1; bit < N; bit <<= 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!(i & bit)) {
        const float a = x[i], b = x[i | bit];
        x[i] = a + b;
        x[i | bit] = a - b;
      }
    }
  }
}

// Butterflies over lane-index bits `first`, `2 * first`, ... below `end`.
template <int N>
OSCAR_DEVICE void hadamard_lanes(float (&x)[N], int lane, int first, int end) {
  for (int bit = first; bit < end; bit <<= 1) {
    const float sign = lane & bit ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fmaf(sign, x[i], __shfl_xor_sync(kFullWarp, x[i], bit));
  }
}

// The same over one lane-index bit, which changes places with index bit RegisterBit: afterwards the registers
// differ in what the lanes differed in, and the lanes in the other. Half the shuffles, and the channels of a lane
// come to lie side by side.
template <int RegisterBit, int N>
OSCAR_DEVICE void hadamard_exchange(float (&x)[N], int lane, int lane_bit) {
  const bool upper = lane & lane_bit;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!(i & RegisterBit)) {
      const float low = x[i], high = x[i | RegisterBit];
      const float other = __shfl_xor_sync(kFullWarp, upper ? low : high, lane_bit);
      const float a = upper ? other : low, b = upper ? high : other;
      x[i] = a + b;
      x[i | RegisterBit] = a - b;
    }
  }
}

}  // namespace oscar
