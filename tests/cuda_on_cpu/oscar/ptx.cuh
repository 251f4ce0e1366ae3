// SPDX-License-Identifier: Apache-2.0
// What csrc/include/oscar/ptx.cuh says in assembly, on a CPU. Found first by -I.
#pragma once

#include "emulator.h"

#define OSCAR_DEVICE inline

namespace oscar {

constexpr unsigned kFullWarp = 0xffffffffu;

inline float half_to_float(uint32_t bits) { return static_cast<float>(emulator::value<_Float16>(bits & 0xffff)); }
inline uint32_t float_to_half(float x) {
  return static_cast<uint32_t>(emulator::bits(static_cast<_Float16>(x)));
}
inline float bfloat16_to_float(uint32_t bits) { return emulator::value<float>(bits << 16); }
inline uint32_t float_to_bfloat16(float x) {
  const uint32_t b = static_cast<uint32_t>(emulator::bits(x));
  return x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline float e4m3_to_float(uint32_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 0x7f) == 0x7f) return NAN;
  const float x = exponent ? std::ldexp(1.f + mantissa / 8.f, exponent - 7) : std::ldexp(mantissa / 8.f, -6);
  return byte & 0x80 ? -x : x;
}

inline uint32_t pack_half2(float low, float high) { return float_to_half(low) | float_to_half(high) << 16; }
inline uint32_t pack_bfloat162(float low, float high) { return float_to_bfloat16(low) | float_to_bfloat16(high) << 16; }
inline float2 unpack_half2(uint32_t w) { return {half_to_float(w), half_to_float(w >> 16)}; }
inline float2 unpack_bfloat162(uint32_t w) { return {bfloat16_to_float(w & 0xffff), bfloat16_to_float(w >> 16)}; }
inline uint32_t mul_half2(uint32_t a, uint32_t b) {
  return pack_half2(half_to_float(a) * half_to_float(b), half_to_float(a >> 16) * half_to_float(b >> 16));
}
inline uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  const auto fma = [&](int s) { return std::fma(half_to_float(a >> s), half_to_float(b >> s), half_to_float(c >> s)); };
  return pack_half2(fma(0), fma(16));
}
template <uint32_t Mask>
uint32_t select_bits(uint32_t a, uint32_t b) {  // lop3 with table 0xe4, bit by bit
  uint32_t d = 0;
  for (int i = 0; i < 32; ++i) {
    const int index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (Mask >> i & 1);
    d |= static_cast<uint32_t>(0xe4 >> index & 1) << i;
  }
  return d;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline void e4m3x4_to_half2(uint32_t bytes, uint32_t& low, uint32_t& high) {
  low = pack_half2(e4m3_to_float(bytes & 255), e4m3_to_float(bytes >> 8 & 255));
  high = pack_half2(e4m3_to_float(bytes >> 16 & 255), e4m3_to_float(bytes >> 24));
}

template <float (*ToFloat)(uint32_t)>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto& all = emulator::in_warp({a0 | static_cast<uint64_t>(a1) << 32, a2 | static_cast<uint64_t>(a3) << 32,
                                       b0 | static_cast<uint64_t>(b1) << 32});
  const int g = emulator::lane() >> 2, t = emulator::lane() & 3;
  for (int i = 0; i < 4; ++i) {
    const int upper = i >> 1, column = 2 * t + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {  // register 2 * (k >= 8) + upper, half k & 1, lane (g, k / 2 % 4)
      const uint64_t a = all[4 * g + k / 2 % 4][k / 8] >> (32 * upper) >> (16 * (k & 1));
      const uint64_t b = all[4 * column + k / 2 % 4][2] >> (32 * (k / 8)) >> (16 * (k & 1));
      sum += static_cast<double>(ToFloat(a & 0xffff)) * ToFloat(b & 0xffff);
    }
    d[i] = static_cast<float>(sum);
  }
}
inline void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<half_to_float>(d, a0, a1, a2, a3, b0, b1);
}
inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<bfloat16_to_float>(d, a0, a1, a2, a3, b0, b1);
}
inline uint32_t transpose_8x8(uint32_t x) {
  const auto& all = emulator::in_warp({x});
  const int row = emulator::lane() >> 2, column = 2 * (emulator::lane() & 3);
  const auto element = [&](int r, int c) { return static_cast<uint32_t>(all[4 * r + c / 2][0] >> (16 * (c & 1))) & 0xffff; };
  return element(column, row) | element(column + 1, row) << 16;
}
inline void launch_dependents() {}
inline void wait_for_previous_grid() {}

}  // namespace oscar
