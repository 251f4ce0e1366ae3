// SPDX-License-Identifier: Apache-2.0
// The few instructions that CUDA C++ does not name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define OSCAR_DEVICE __device__ __forceinline__

namespace oscar {

constexpr unsigned kFullWarp = 0xffffffffu;

// ---- packed arithmetic --------------------------------------------------------
OSCAR_DEVICE uint32_t pack_half2(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

OSCAR_DEVICE uint32_t pack_bfloat162(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

OSCAR_DEVICE float2 unpack_half2(uint32_t word) { return __half22float2(*reinterpret_cast<const __half2*>(&word)); }

OSCAR_DEVICE float2 unpack_bfloat162(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

OSCAR_DEVICE uint32_t mul_half2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

OSCAR_DEVICE uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Bits of `a` where `mask` is set, of `b` elsewhere: one instruction, which the compiler
// does not find in the usual expression with two constants.
template <uint32_t Mask>
OSCAR_DEVICE uint32_t select_bits(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(d) : "r"(a), "r"(b), "n"(Mask));
  return d;
}

OSCAR_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four e4m3 bytes to fp16 numbers, exactly.
OSCAR_DEVICE void e4m3x4_to_half2(uint32_t bytes, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
  asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.rn.f16x2.e4m3x2 %0, l;\n cvt.rn.f16x2.e4m3x2 %1, h;\n}"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
#else
  // Byte i to the top of a half; after a shift the exponent fields overlap, and the biases differ by 8.
  const auto convert = [](uint32_t wide) {
    return mul_half2((wide & 0x80008000u) | ((wide & 0x7f007f00u) >> 1), 0x5c005c00u);  // times 2^8
  };
  low = convert(__byte_perm(bytes, 0, 0x1404));
  high = convert(__byte_perm(bytes, 0, 0x3424));
#endif
}

// The lower two of four e4m3 bytes.
OSCAR_DEVICE uint32_t e4m3x2_to_half2(uint32_t bytes) {
  uint32_t low, high;
  e4m3x4_to_half2(bytes, low, high);
  return low;
}

// ---- tensor cores -------------------------------------------------------------
// d += a * b, m16n8k16, A row-major, B column-major.
OSCAR_DEVICE void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

OSCAR_DEVICE void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transpose an 8x8 matrix of 16-bit elements held as an MMA fragment.
OSCAR_DEVICE uint32_t transpose_8x8(uint32_t fragment) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(fragment));
  return d;
}

// ---- programmatic dependent launch ---------------------------------------------
OSCAR_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

OSCAR_DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace oscar
