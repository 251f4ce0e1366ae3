// SPDX-License-Identifier: Apache-2.0
// Soft-cap and online softmax over transposed score fragments: rows are tokens, columns query rows.
// A lane holds columns 2*t and 2*t + 1 of every fragment, in log2 units.
#pragma once

#include "oscar/ptx.cuh"

namespace oscar {

constexpr float kLog2E = 1.4426950408889634f;

// limit * tanh(score / limit), both in log2 units; exact to 1e-6 of the limit, which tanh.approx is not.
struct SoftCap {
  float limit;  // 0: none
  float rate;   // 2 / the limit in natural units, so that exp2(score * rate) is exp(2 * score / limit)

  OSCAR_DEVICE bool used() const { return limit > 0.f; }
  OSCAR_DEVICE float operator()(float score) const {
    return limit - __fdividef(2.f * limit, 1.f + exp2_approx(score * rate));
  }
};

// Start value of the maximum: finite, so that masked scores (-inf) give weight 0.
constexpr float kNoMaximum = -1e30f;

// Rescaling waits until a score exceeds the maximum by this much (log2). Weights stay
// below 2^kSlack, so that weight * value scale fits fp16 for scales up to 4094.
constexpr float kSlack = 4.f;

// Result of one warp for eight query rows.
template <int Tiles>
struct Accumulator {
  float out[Tiles][4];  // channels x query rows
  float extra[4];       // rows 0..7: weights * value zeros, per value group; rows 8..15: sum of weights
  float maximum[2];

  OSCAR_DEVICE void reset() {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) extra[j] = 0.f;
    maximum[0] = maximum[1] = kNoMaximum;
  }
};

// Scores to weights in place, after raising the maximum where needed.
template <int RowTiles, int Tiles>
OSCAR_DEVICE void softmax_step(float (&score)[RowTiles][4], Accumulator<Tiles>& acc) {
  float top0 = fmaxf(score[0][0], score[0][2]), top1 = fmaxf(score[0][1], score[0][3]);
#pragma unroll
  for (int r = 1; r < RowTiles; ++r) {
    top0 = fmaxf(top0, fmaxf(score[r][0], score[r][2]));
    top1 = fmaxf(top1, fmaxf(score[r][1], score[r][3]));
  }
  if (__any_sync(kFullWarp, top0 > acc.maximum[0] + kSlack || top1 > acc.maximum[1] + kSlack)) {
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) {
      top0 = fmaxf(top0, __shfl_xor_sync(kFullWarp, top0, d));
      top1 = fmaxf(top1, __shfl_xor_sync(kFullWarp, top1, d));
    }
    top0 = fmaxf(top0, acc.maximum[0]);
    top1 = fmaxf(top1, acc.maximum[1]);
    const float scale0 = exp2_approx(acc.maximum[0] - top0), scale1 = exp2_approx(acc.maximum[1] - top1);
    acc.maximum[0] = top0;
    acc.maximum[1] = top1;
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      acc.out[i][0] *= scale0, acc.out[i][1] *= scale1;
      acc.out[i][2] *= scale0, acc.out[i][3] *= scale1;
    }
    acc.extra[0] *= scale0, acc.extra[1] *= scale1;
    acc.extra[2] *= scale0, acc.extra[3] *= scale1;
  }
#pragma unroll
  for (int r = 0; r < RowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) score[r][j] = exp2_approx(score[r][j] - acc.maximum[j & 1]);
  }
}

}  // namespace oscar
