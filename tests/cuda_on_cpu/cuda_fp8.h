// SPDX-License-Identifier: Apache-2.0
// The conversions to and from e4m3 that the encoder uses, on a CPU.
#pragma once

#include "oscar/ptx.cuh"

enum { __NV_SATFINITE, __NV_E4M3 };

inline __half __nv_cvt_fp8_to_halfraw(uint8_t x, int) { return __half(oscar::e4m3_to_float(x)); }

inline uint8_t __nv_cvt_float_to_fp8(float x, int, int) {  // nearest, ties to even, saturating
  const float magnitude = std::fabs(x);
  int best = 0;
  for (int code = 1; code < 0x7f; ++code) {
    const float distance = std::fabs(oscar::e4m3_to_float(code) - magnitude);
    const float least = std::fabs(oscar::e4m3_to_float(best) - magnitude);
    if (distance < least || (distance == least && !(code & 1))) best = code;
  }
  return static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}
