// SPDX-License-Identifier: Apache-2.0
// From logits to weights: what all attention here shares. Logits are to base two.
#pragma once

#include "simd.h"

namespace {

constexpr float kLog2e = 1.44269504088896341f;

// Of the tokens at hand those that a query row sees: begin .. end - 1.
struct Seen {
  int begin, end;
};

inline Seen seen_of(int begin, int end, int count) { return {min_of(max_of(begin, 0), count), min_of(end, count)}; }

inline float exp2_nonpositive(float x) {
  float lanes[kLanes];
  store(lanes, exp2_nonpositive(set_f(x)));
  return lanes[0];
}

// cap * tanh(x / cap), with an error below cap * 3e-7; NaN stays NaN.
OSCAR_INLINE F cap_logits(F x, float cap) {
  const F size = abs(x), one = set_f(1.0f);
  // e = 2^(-2 log2(e) |x| / cap), by Taylor's polynomial: the one of exp2_nonpositive is too coarse for a difference.
  const F least = set_f(-64.0f), magic = set_f(12582912.0f);
  const F y = max(least, size * set_f(-2.0f * kLog2e / cap)), shifted = y + magic;
  const F r = y - (shifted - magic);
  F p = set_f(1.5403530393e-4f);
  p = fma(p, r, set_f(1.3333558146e-3f));
  p = fma(p, r, set_f(9.6181291076e-3f));
  p = fma(p, r, set_f(5.5504108665e-2f));
  p = fma(p, r, set_f(2.4022650696e-1f));
  p = fma(p, r, set_f(6.9314718056e-1f));
  p = fma(p, r, one);
  const F e = as_float(bits(p) + shift_left<23>(bits(shifted)));
  const F capped = set_f(cap) * ((one - e) / (one + e));
  return as_float(bits(capped) | (bits(x) & set_i(static_cast<int32_t>(0x80000000))));
}

}  // namespace
