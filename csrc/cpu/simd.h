// SPDX-License-Identifier: Apache-2.0
// Sixteen 32-bit lanes on any machine.
//
// I and F are one AVX-512 register, two AVX2 registers or four 128-bit registers. Plain
// arithmetic is the compiler's vector extension; only what that cannot express has
// branches per instruction set. Everything here, and in the headers that build on it,
// has internal linkage: each kernels_*.cpp compiles them with other -m flags, and the
// linker must never merge functions across instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = 16;
constexpr int kParts = 64 / kVectorBytes;
constexpr int kPartLanes = kLanes / kParts;

typedef int32_t NativeI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t NativeU __attribute__((vector_size(kVectorBytes)));
typedef float NativeF __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Native16 __attribute__((vector_size(kVectorBytes / 2)));

#define OSCAR_INLINE inline __attribute__((always_inline))
#define OSCAR_EACH _Pragma("GCC unroll 4") for (int k = 0; k < kParts; k++)

struct I {
  NativeI v[kParts];
};
struct F {
  NativeF v[kParts];
};

template <class T>
OSCAR_INLINE T min_of(T a, T b) { return a < b ? a : b; }
template <class T>
OSCAR_INLINE T max_of(T a, T b) { return a > b ? a : b; }

// ---- memory, constants ---------------------------------------------------------------
OSCAR_INLINE I load_i(const void* p) {
  I r;
  OSCAR_EACH memcpy(&r.v[k], static_cast<const char*>(p) + k * kVectorBytes, kVectorBytes);
  return r;
}
OSCAR_INLINE F load_f(const void* p) {
  F r;
  OSCAR_EACH memcpy(&r.v[k], static_cast<const char*>(p) + k * kVectorBytes, kVectorBytes);
  return r;
}
OSCAR_INLINE void store(void* p, I a) {
  OSCAR_EACH memcpy(static_cast<char*>(p) + k * kVectorBytes, &a.v[k], kVectorBytes);
}
OSCAR_INLINE void store(void* p, F a) {
  OSCAR_EACH memcpy(static_cast<char*>(p) + k * kVectorBytes, &a.v[k], kVectorBytes);
}
OSCAR_INLINE I set_i(int32_t x) {
  I r;
  OSCAR_EACH r.v[k] = x - NativeI{};
  return r;
}
OSCAR_INLINE F set_f(float x) {
  F r;
  OSCAR_EACH r.v[k] = x - NativeF{};
  return r;
}
OSCAR_INLINE F zero_f() {
  F r;
  OSCAR_EACH r.v[k] = NativeF{};
  return r;
}
OSCAR_INLINE I zero_i() {
  I r;
  OSCAR_EACH r.v[k] = NativeI{};
  return r;
}
// 0 1 2 ... 15
OSCAR_INLINE I lane_index() {
  const int32_t index[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_i(index);
}

// ---- arithmetic ------------------------------------------------------------------------
#define OSCAR_BINARY(T, op)            \
  OSCAR_INLINE T operator op(T a, T b) { \
    OSCAR_EACH a.v[k] = a.v[k] op b.v[k]; \
    return a;                          \
  }
OSCAR_BINARY(F, +)
OSCAR_BINARY(F, -)
OSCAR_BINARY(F, *)
OSCAR_BINARY(F, /)
OSCAR_BINARY(I, +)
OSCAR_BINARY(I, -)
OSCAR_BINARY(I, &)
OSCAR_BINARY(I, |)
#undef OSCAR_BINARY

// Logical shifts.
template <int BY>
OSCAR_INLINE I shift_right(I a) {
  OSCAR_EACH a.v[k] = (NativeI)((NativeU)a.v[k] >> BY);
  return a;
}
template <int BY>
OSCAR_INLINE I shift_left(I a) {
  OSCAR_EACH a.v[k] = (NativeI)((NativeU)a.v[k] << BY);
  return a;
}
OSCAR_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  c.v[0] = (NativeF)_mm512_fmadd_ps((__m512)a.v[0], (__m512)b.v[0], (__m512)c.v[0]);
#elif defined(__FMA__)
  OSCAR_EACH c.v[k] = (NativeF)_mm256_fmadd_ps((__m256)a.v[k], (__m256)b.v[k], (__m256)c.v[k]);
#else
  OSCAR_EACH c.v[k] = a.v[k] * b.v[k] + c.v[k];  // contracted where the machine can
#endif
  return c;
}
// Of a NaN and a number, `a` decides: max(number, NaN) is NaN, max(NaN, number) the number.
OSCAR_INLINE F max(F a, F b) {
#if defined(__AVX512F__)
  a.v[0] = (NativeF)_mm512_max_ps((__m512)a.v[0], (__m512)b.v[0]);
#else
  OSCAR_EACH a.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k];
#endif
  return a;
}
OSCAR_INLINE F min(F a, F b) {
#if defined(__AVX512F__)
  a.v[0] = (NativeF)_mm512_min_ps((__m512)a.v[0], (__m512)b.v[0]);
#else
  OSCAR_EACH a.v[k] = a.v[k] < b.v[k] ? a.v[k] : b.v[k];
#endif
  return a;
}
OSCAR_INLINE I bits(F a) {
  I r;
  OSCAR_EACH r.v[k] = (NativeI)a.v[k];
  return r;
}
OSCAR_INLINE F as_float(I a) {
  F r;
  OSCAR_EACH r.v[k] = (NativeF)a.v[k];
  return r;
}
OSCAR_INLINE F abs(F a) { return as_float(bits(a) & set_i(0x7fffffff)); }
OSCAR_INLINE F to_float(I a) {
  F r;
  OSCAR_EACH r.v[k] = __builtin_convertvector(a.v[k], NativeF);
  return r;
}
OSCAR_INLINE I to_int(F a) {  // toward zero
  I r;
  OSCAR_EACH r.v[k] = __builtin_convertvector(a.v[k], NativeI);
  return r;
}
// Nearest integer, ties to even, for |a| < 2^22.
OSCAR_INLINE F round_even(F a) {
  const F magic = set_f(12582912.0f);
  return (a + magic) - magic;
}
OSCAR_INLINE I round_to_int(F a) {
  const F magic = set_f(12582912.0f);
  return bits(a + magic) - bits(magic);
}

// ---- selection: masks are all ones or all zeros per lane ----------------------------------
OSCAR_INLINE I less(I a, I b) {
  OSCAR_EACH a.v[k] = a.v[k] < b.v[k];
  return a;
}
OSCAR_INLINE I greater(F a, F b) {
  I r;
  OSCAR_EACH r.v[k] = a.v[k] > b.v[k];
  return r;
}
OSCAR_INLINE I ordered(F a) {
  I r;
  OSCAR_EACH r.v[k] = a.v[k] == a.v[k];
  return r;
}
OSCAR_INLINE F select(I mask, F yes, F no) {
  OSCAR_EACH yes.v[k] = mask.v[k] ? yes.v[k] : no.v[k];
  return yes;
}
OSCAR_INLINE I select(I mask, I yes, I no) {
  OSCAR_EACH yes.v[k] = mask.v[k] ? yes.v[k] : no.v[k];
  return yes;
}
// (a where the mask's bits are set) | (b elsewhere)
OSCAR_INLINE I merge_bits(I mask, I a, I b) {
#if defined(__AVX512F__)
  a.v[0] = (NativeI)_mm512_ternarylogic_epi32((__m512i)mask.v[0], (__m512i)a.v[0], (__m512i)b.v[0], 0xca);
  return a;
#else
  OSCAR_EACH a.v[k] = (mask.v[k] & a.v[k]) | (~mask.v[k] & b.v[k]);
  return a;
#endif
}

// ---- dot products of codes and 16-bit numbers --------------------------------------------------
// A lane has four codes of 8 bits; the four numbers that belong to them are two lanes, as `split`
// makes them: with VNNI their high and their low bytes, since codes then need no widening, else
// pairs of 16 bits.
constexpr float kLargest = 32639;  // of a number: 127 * 256 + 127

// acc + a.lo * b.lo + a.hi * b.hi of the signed 16-bit halves of each lane.
OSCAR_INLINE NativeI dot16(NativeI acc, NativeI a, NativeI b) {
#if defined(__AVX512VNNI__)
  return (NativeI)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return acc + (NativeI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
OSCAR_INLINE I dot16(I acc, I a, I b) {
  OSCAR_EACH acc.v[k] = dot16(acc.v[k], a.v[k], b.v[k]);
  return acc;
}
#if defined(__AVX512VNNI__)
struct Sum {
  I high, low;
};
OSCAR_INLINE void dot(Sum& sum, I codes, I first, I second) {
  sum.high.v[0] = (NativeI)_mm512_dpbusd_epi32((__m512i)sum.high.v[0], (__m512i)codes.v[0], (__m512i)first.v[0]);
  sum.low.v[0] = (NativeI)_mm512_dpbusd_epi32((__m512i)sum.low.v[0], (__m512i)codes.v[0], (__m512i)second.v[0]);
}
OSCAR_INLINE Sum zero_sum() { return {zero_i(), zero_i()}; }
OSCAR_INLINE I total(const Sum& sum) { return shift_left<8>(sum.high) + sum.low; }
#endif
// Numbers of the codes in bytes 0 to 3 of each lane.
OSCAR_INLINE void split(I n0, I n1, I n2, I n3, I& first, I& second) {
#if defined(__AVX512VNNI__)
  // Low bytes count as signed, so a number's high byte is that of the number plus 128.
  const I even = set_i(0x00ff00ff), half = set_i(128);
  const I a = merge_bits(set_i(0xffff), n0, shift_left<16>(n2));
  const I b = merge_bits(set_i(0xffff), n1, shift_left<16>(n3));
  second = merge_bits(even, a, shift_left<8>(b));
  n0 = n0 + half, n1 = n1 + half, n2 = n2 + half, n3 = n3 + half;
  const I c = merge_bits(set_i(0xffff), n0, shift_left<16>(n2));
  const I d = merge_bits(set_i(0xffff), n1, shift_left<16>(n3));
  first = merge_bits(even, shift_right<8>(c), d);
#else
  first = merge_bits(set_i(0xffff), n0, shift_left<16>(n2));
  second = merge_bits(set_i(0xffff), n1, shift_left<16>(n3));
#endif
}
// Lanes 0, 2, 4, ... hold p[0], lanes 1, 3, 5, ... p[1].
OSCAR_INLINE NativeI native_pair(const int32_t* p) {
  int64_t both;
  memcpy(&both, p, 8);
  typedef int64_t Native64 __attribute__((vector_size(kVectorBytes)));
  return (NativeI)(both - Native64{});
}
OSCAR_INLINE I broadcast_pair(const int32_t* p) {
  I r;
  OSCAR_EACH r.v[k] = native_pair(p);
  return r;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// Lanes FIRST, FIRST + 2, ... of a then of b.
template <int FIRST>
OSCAR_INLINE __m256 alternate_lanes(__m256 a, __m256 b) {
  const __m256 mixed = _mm256_shuffle_ps(a, b, FIRST ? 0xdd : 0x88);
  return (__m256)_mm256_permute4x64_epi64((__m256i)mixed, 0xd8);
}
#endif
// Lanes 0, 2, 4, ... of a then of b; lanes 1, 3, 5, ... of a then of b.
template <class V>
OSCAR_INLINE void deinterleave(V a, V b, V& even, V& odd) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i next = _mm512_add_epi32(index, _mm512_set1_epi32(1));
  const __m512i x = (__m512i)a.v[0], y = (__m512i)b.v[0];
  even.v[0] = (decltype(even.v[0] + even.v[0]))_mm512_permutex2var_epi32(x, index, y);
  odd.v[0] = (decltype(odd.v[0] + odd.v[0]))_mm512_permutex2var_epi32(x, next, y);
#elif defined(__AVX2__)
  typedef decltype(a.v[0] + a.v[0]) Native;
  even.v[0] = (Native)alternate_lanes<0>((__m256)a.v[0], (__m256)a.v[1]);
  even.v[1] = (Native)alternate_lanes<0>((__m256)b.v[0], (__m256)b.v[1]);
  odd.v[0] = (Native)alternate_lanes<1>((__m256)a.v[0], (__m256)a.v[1]);
  odd.v[1] = (Native)alternate_lanes<1>((__m256)b.v[0], (__m256)b.v[1]);
#else
  int32_t from[32], to[2][16];
  store(from, a);
  store(from + 16, b);
  for (int i = 0; i < 16; i++) to[0][i] = from[2 * i], to[1][i] = from[2 * i + 1];
  memcpy(&even, to[0], 64);
  memcpy(&odd, to[1], 64);
#endif
}
// Lane i is lane from[i] of a.
template <class V>
OSCAR_INLINE V permute(V a, const int32_t (&from)[kLanes]) {
#if defined(__AVX512F__)
  a.v[0] = (decltype(a.v[0] + a.v[0]))_mm512_permutexvar_epi32(_mm512_loadu_si512(from), (__m512i)a.v[0]);
#else
  int32_t x[kLanes], y[kLanes];
  store(x, a);
  for (int i = 0; i < kLanes; i++) y[i] = x[from[i]];
  memcpy(&a, y, 64);
#endif
  return a;
}
template <class V>
OSCAR_INLINE V even_then_odd(V a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  typedef decltype(a.v[0] + a.v[0]) Native;
  const __m256 low = (__m256)a.v[0], high = (__m256)a.v[1];
  a.v[0] = (Native)alternate_lanes<0>(low, high);
  a.v[1] = (Native)alternate_lanes<1>(low, high);
  return a;
#endif
  static constexpr int32_t kFrom[kLanes] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
  return permute(a, kFrom);
}
// The same within each half.
OSCAR_INLINE I even_then_odd_by_8(I a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i from = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  OSCAR_EACH a.v[k] = (NativeI)_mm256_permutevar8x32_epi32((__m256i)a.v[k], from);
  return a;
#endif
  static constexpr int32_t kFrom[kLanes] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
  return permute(a, kFrom);
}
// Lane 4i + j becomes lane 4j + i.
OSCAR_INLINE I transpose_quarters(I a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i even = _mm256_permute2x128_si256((__m256i)a.v[0], (__m256i)a.v[1], 0x20);
  const __m256i odd = _mm256_permute2x128_si256((__m256i)a.v[0], (__m256i)a.v[1], 0x31);
  a.v[0] = (NativeI)_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(even, odd), 0xd8);
  a.v[1] = (NativeI)_mm256_permute4x64_epi64(_mm256_unpackhi_epi32(even, odd), 0xd8);
  return a;
#endif
  static constexpr int32_t kFrom[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return permute(a, kFrom);
}
// Every lane twice: 0, 0, 2, 2, 4, 4, ... (ODD: 1, 1, 3, 3, ...).
template <bool ODD>
OSCAR_INLINE I repeat_pairs(I a) {
#if defined(__AVX512F__)
  a.v[0] = (NativeI)_mm512_shuffle_epi32((__m512i)a.v[0], ODD ? (_MM_PERM_ENUM)0xf5 : (_MM_PERM_ENUM)0xa0);
#elif defined(__AVX2__)
  OSCAR_EACH a.v[k] = (NativeI)_mm256_shuffle_epi32((__m256i)a.v[k], ODD ? 0xf5 : 0xa0);
#else
  OSCAR_EACH {
    const NativeI x = a.v[k];
    a.v[k] = ODD ? NativeI{x[1], x[1], x[3], x[3]} : NativeI{x[0], x[0], x[2], x[2]};
  }
#endif
  return a;
}
// Odd lanes shifted right by one bit.
OSCAR_INLINE I shift_odd_lanes(I a) {
#if defined(__AVX512F__)
  a.v[0] = (NativeI)_mm512_srlv_epi32((__m512i)a.v[0], _mm512_set1_epi64(1LL << 32));
  return a;
#else
  const int32_t odd[2] = {0, -1};
  return merge_bits(broadcast_pair(odd), shift_right<1>(a), a);
#endif
}
template <int BY>
OSCAR_INLINE I rotate_right(I a) {
#if defined(__AVX512F__)
  a.v[0] = (NativeI)_mm512_ror_epi32((__m512i)a.v[0], BY);
  return a;
#else
  return shift_right<BY>(a) | shift_left<32 - BY>(a);
#endif
}
// a[0] b[0] a[1] b[1] ..., 32 words.
OSCAR_INLINE void store_interleaved(int32_t* p, I a, I b) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i next = _mm512_add_epi32(index, _mm512_set1_epi32(8));
  const __m512i x = (__m512i)a.v[0], y = (__m512i)b.v[0];
  _mm512_storeu_si512(p, _mm512_permutex2var_epi32(x, index, y));
  _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi32(x, next, y));
#elif defined(__AVX2__)
  OSCAR_EACH {
    const __m256i low = _mm256_unpacklo_epi32((__m256i)a.v[k], (__m256i)b.v[k]);
    const __m256i high = _mm256_unpackhi_epi32((__m256i)a.v[k], (__m256i)b.v[k]);
    __m256i* out = reinterpret_cast<__m256i*>(p) + 2 * k;
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
#else
  int32_t x[16], y[16];
  store(x, a);
  store(y, b);
  for (int i = 0; i < 16; i++) p[2 * i] = x[i], p[2 * i + 1] = y[i];
#endif
}
// 4 * width words, lane 4t + i from p[t * width + i], zero in the lanes without one.
OSCAR_INLINE I load_row(const uint8_t* p, int width) {
  if (width == 4) return load_i(p);
#if defined(__AVX512F__)
  const __mmask16 mask = width == 1 ? 0x1111 : width == 2 ? 0x3333 : 0x7777;
  I r;
  r.v[0] = (NativeI)_mm512_maskz_expandloadu_epi32(mask, p);
  return r;
#else
  int32_t lanes[kLanes] = {};
  for (int t = 0; t < 4; t++) memcpy(lanes + 4 * t, p + 4 * t * width, 4 * width);
  return load_i(lanes);
#endif
}
// Four pairs of words from p on and four from q on, `stride` bytes apart.
OSCAR_INLINE I gather_pairs(const uint8_t* p, const uint8_t* q, int64_t stride) {
  int64_t x[8];
  for (int i = 0; i < 4; i++) {
    memcpy(x + i, p + i * stride, 8);
    memcpy(x + 4 + i, q + i * stride, 8);
  }
#if defined(__AVX512F__)  // in registers: a load of several stores waits for them
  I r;
  r.v[0] = (NativeI)_mm512_setr_epi64(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]);
  return r;
#elif defined(__AVX2__)
  I r;
  OSCAR_EACH r.v[k] = (NativeI)_mm256_setr_epi64x(x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]);
  return r;
#else
  return load_i(x);
#endif
}
#if defined(__AVX512VNNI__)
// p[0] .. p[3] in the lower two quarters of the lanes, q[0] .. q[3] in the upper.
OSCAR_INLINE I repeat_quarters(const int32_t* p, const int32_t* q) {
  I r;
  const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  r.v[0] = (NativeI)x;
  if (p != q)
    r.v[0] = (NativeI)_mm512_mask_broadcast_i32x4(x, 0xff00, _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  asm("" : "+v"(r.v[0]));  // the compiler would rather load again for every use
  return r;
}
#else
// p[0] .. p[3] in every quarter of a part's lanes.
OSCAR_INLINE NativeI native_quarter(const int32_t* p) {
#if defined(__AVX2__)
  return (NativeI)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  NativeI r;
  memcpy(&r, p, sizeof r);
  return r;
#endif
}
#endif
// Quarters of a and b in turn: 16 words at p and 16 at p + next.
OSCAR_INLINE void store_quarters(int32_t* p, int64_t next, I a, I b) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i x = (__m512i)a.v[0], y = (__m512i)b.v[0];
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(x, index, y));
  _mm512_storeu_si512(p + next, _mm512_permutex2var_epi64(x, _mm512_add_epi64(index, _mm512_set1_epi64(4)), y));
#elif defined(__AVX2__)
  OSCAR_EACH {
    const __m256i x = (__m256i)a.v[k], y = (__m256i)b.v[k];
    __m256i* out = reinterpret_cast<__m256i*>(p + k * next);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(x, y, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(x, y, 0x31));
  }
#else
  int32_t lanes[2][kLanes];
  store(lanes[0], a);
  store(lanes[1], b);
  for (int i = 0; i < 8; i++) memcpy(p + (i >> 2) * next + 4 * (i & 3), lanes[i & 1] + 4 * (i >> 1), 16);
#endif
}

// ---- 16-bit and 8-bit floats ------------------------------------------------------------------
OSCAR_INLINE I widen_u16(const uint16_t* p) {
  I r;
  OSCAR_EACH {
    Native16 half;
    memcpy(&half, p + k * kPartLanes, sizeof half);
    r.v[k] = (NativeI)__builtin_convertvector(half, NativeU);
  }
  return r;
}
OSCAR_INLINE void narrow_u16(uint16_t* p, I a) {
  OSCAR_EACH {
    const Native16 half = __builtin_convertvector((NativeU)a.v[k], Native16);
    memcpy(p + k * kPartLanes, &half, sizeof half);
  }
}
OSCAR_INLINE F load_int8(const int8_t* p) {
  I r;
#if defined(__AVX512F__)  // compilers take vectors of bytes apart
  r.v[0] = (NativeI)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  OSCAR_EACH {
    const int8_t* part = p + k * kPartLanes;
    r.v[k] = (NativeI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(part)));
  }
#else
  int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; i++) lanes[i] = p[i];
  r = load_i(lanes);
#endif
  return to_float(r);
}
// Thirty-two bytes, sign-extended to the halves of the lanes.
OSCAR_INLINE I widen_bytes(const int8_t* p) {
  I r;
#if defined(__AVX512F__)
  r.v[0] = (NativeI)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  OSCAR_EACH r.v[k] = (NativeI)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + k));
#else
  int16_t halves[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; i++) halves[i] = p[i];
  r = load_i(halves);
#endif
  return r;
}
// The low byte of each lane.
OSCAR_INLINE void narrow_8(void* p, I a) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)a.v[0]));
#else
  int32_t lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < kLanes; i++) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(lanes[i]);
#endif
}
OSCAR_INLINE F load_bf16(const uint16_t* p) { return as_float(shift_left<16>(widen_u16(p))); }

OSCAR_INLINE F load_fp16(const uint16_t* p) {
#if defined(__AVX512F__)
  F r;
  r.v[0] = (NativeF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return r;
#elif defined(__F16C__)
  F r;
  OSCAR_EACH r.v[k] = (NativeF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + k));
  return r;
#else
  const I h = widen_u16(p);
  const I magnitude = shift_left<13>(h & set_i(0x7fff));
  const F normal = as_float(magnitude + set_i(112 << 23));
  const F special = as_float(magnitude | set_i(255 << 23));
  const F subnormal = as_float(magnitude + set_i(113 << 23)) - set_f(6.103515625e-05f);
  const F positive = select(less(magnitude, set_i(1 << 23)), subnormal,
                            select(less(magnitude, set_i(31 << 23)), normal, special));
  return as_float(bits(positive) | shift_left<16>(h & set_i(0x8000)));
#endif
}
// Sixteen fp16 in the low or high half of a's lanes, as they lie in memory.
template <bool HIGH>
OSCAR_INLINE F fp16_half(I a) {
#if defined(__AVX512F__)
  F r;
  r.v[0] = (NativeF)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)a.v[0], HIGH));
  return r;
#elif defined(__F16C__)
  F r;
  r.v[0] = (NativeF)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)a.v[HIGH]));
  r.v[1] = (NativeF)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)a.v[HIGH], 1));
  return r;
#else
  uint16_t raw[32];
  store(raw, a);
  return load_fp16(raw + (HIGH ? 16 : 0));
#endif
}
// float8_e4m3fn in a byte of each lane; its NaN reads as NaN.
template <int BYTE>
OSCAR_INLINE F e4m3_byte(I a) {
  // Shifting its sign along puts the exponent where fp32 has it, but for the bias.
  I x = shift_left<24 - 8 * BYTE>(a);
  OSCAR_EACH x.v[k] >>= 4;
  x = x & set_i(0x87f00000);
  const F value = as_float(x) * set_f(0x1p120f);
  return select(less(x & set_i(0x7fffffff), set_i(0x07f00000)), value, as_float(set_i(0x7fc00000)));
}
// A signed byte of each lane.
template <int BYTE>
OSCAR_INLINE F signed_byte(I a) {
  I x = shift_left<24 - 8 * BYTE>(a);
  OSCAR_EACH x.v[k] >>= 24;
  return to_float(x);
}
// Parameters of 16 quads (page.h): quad 2k + j1 has pair 4k + j1 and pair 4k + 2 + j1. v: lower
// channel of both pairs, upper channel of both.
OSCAR_INLINE I load_quads_8(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_set_epi16(31, 29, 30, 28, 27, 25, 26, 24, 23, 21, 22, 20, 19, 17, 18, 16,
                                         15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
  I x;
  x.v[0] = (NativeI)_mm512_permutexvar_epi16(index, _mm512_loadu_si512(p));
  return x;
#elif defined(__AVX2__)
  I x = load_i(p);
  OSCAR_EACH x.v[k] = (NativeI)_mm256_shufflehi_epi16(_mm256_shufflelo_epi16((__m256i)x.v[k], 0xd8), 0xd8);
  return x;
#else
  uint8_t lanes[64];
  for (int i = 0; i < 16; i++)
    for (int which = 0; which < 2; which++)
      memcpy(lanes + 4 * i + 2 * which, p + 8 * (i >> 1) + 4 * which + 2 * (i & 1), 2);
  return load_i(lanes);
#endif
}
OSCAR_INLINE void load_quads_e4m3(const uint8_t* p, F (&v)[4]) {
  const I x = load_quads_8(p);
  v[0] = e4m3_byte<0>(x), v[1] = e4m3_byte<2>(x), v[2] = e4m3_byte<1>(x), v[3] = e4m3_byte<3>(x);
}
OSCAR_INLINE void load_quads_int8(const uint8_t* p, F (&v)[4]) {
  const I x = load_quads_8(p);
  v[0] = signed_byte<0>(x), v[1] = signed_byte<2>(x), v[2] = signed_byte<1>(x), v[3] = signed_byte<3>(x);
}
OSCAR_INLINE void load_quads_fp16(const uint8_t* p, F (&v)[4]) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
  const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
  const __m512i x[2] = {_mm512_permutex2var_epi32(a, index, b),
                        _mm512_permutex2var_epi32(a, _mm512_add_epi32(index, _mm512_set1_epi32(2)), b)};
  _Pragma("GCC unroll 2") for (int which = 0; which < 2; which++) {
    v[which].v[0] = (NativeF)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(x[which]));
    v[2 + which].v[0] = (NativeF)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x[which], 16)));
  }
#else
  uint16_t lanes[4][16];
  for (int i = 0; i < 16; i++)
    for (int m = 0; m < 4; m++) memcpy(&lanes[m][i], p + 2 * (8 * (i >> 1) + 4 * (m & 1) + 2 * (i & 1) + (m >> 1)), 2);
  for (int m = 0; m < 4; m++) v[m] = load_fp16(lanes[m]);
#endif
}
// A single float8_e4m3fn.
OSCAR_INLINE float from_e4m3(uint8_t x) {
  int32_t lanes[kLanes] = {x};
  float out[kLanes];
  store(out, e4m3_byte<0>(load_i(lanes)));
  return out[0];
}

// A number rounded to bf16, ties to even, in the high half of each lane; the low half is undefined.
OSCAR_INLINE I round_to_bf16(F a) {
  const I u = bits(a), odd = shift_right<16>(u) & set_i(1);
  return select(ordered(a), u + set_i(0x7fff) + odd, u | set_i(0x400000));
}
// Scalars to bf16 or fp16, ties to even.
inline uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline uint16_t to_fp16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (u >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (u < 0x38800000) {                                              // subnormal: let the adder round
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f;
    memcpy(&u, &f, 4);
    return static_cast<uint16_t>(sign | (u - 0x3f000000));
  }
  u += 0xfff + ((u >> 13) & 1);
  return static_cast<uint16_t>(sign | ((u - 0x38000000) >> 13));
}
inline float from_fp16(uint16_t h) {
  uint32_t u = static_cast<uint32_t>(h & 0x7fff) << 13;
  if (u >= 31u << 23) u |= 255u << 23;
  else if (u >= 1u << 23) u += 112u << 23;
  else {
    u += 113u << 23;
    float f;
    memcpy(&f, &u, 4);
    f -= 6.103515625e-05f;
    memcpy(&u, &f, 4);
  }
  u |= static_cast<uint32_t>(h & 0x8000) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// ---- across lanes ----------------------------------------------------------------------------
#if defined(__AVX2__) && !defined(__AVX512F__)
// Sums, or largest, of lanes four apart.
template <bool LARGEST>
OSCAR_INLINE __m128 quarter(F a) {
  const __m256 low = (__m256)a.v[0], high = (__m256)a.v[1];
  const __m256 x = LARGEST ? _mm256_max_ps(low, high) : _mm256_add_ps(low, high);
  const __m128 y = _mm256_castps256_ps128(x), z = _mm256_extractf128_ps(x, 1);
  return LARGEST ? _mm_max_ps(y, z) : _mm_add_ps(y, z);
}
#endif
OSCAR_INLINE float sum(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a.v[0]);
#elif defined(__AVX2__)
  const __m128 x = quarter<false>(a), y = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
#else
  float lanes[kLanes];
  store(lanes, a);
  for (int width = 8; width; width >>= 1)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}
OSCAR_INLINE float largest(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a.v[0]);
#elif defined(__AVX2__)
  const __m128 x = quarter<true>(a), y = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
#else
  float lanes[kLanes];
  store(lanes, a);
  for (int width = 8; width; width >>= 1)
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
#endif
}

// Of four vectors at once, since each alone is a chain of dependent shuffles.
template <bool LARGEST>
OSCAR_INLINE void reduce4(F a, F b, F c, F d, float* out) {
#if defined(__AVX512F__)
  const auto join = [](__m512i x, __m512i y) {
    return (__m512i)(LARGEST ? _mm512_max_ps((__m512)x, (__m512)y) : _mm512_add_ps((__m512)x, (__m512)y));
  };
  const __m512i va = (__m512i)a.v[0], vb = (__m512i)b.v[0], vc = (__m512i)c.v[0], vd = (__m512i)d.v[0];
  const __m512i ab = join(_mm512_unpacklo_epi32(va, vb), _mm512_unpackhi_epi32(va, vb));
  const __m512i cd = join(_mm512_unpacklo_epi32(vc, vd), _mm512_unpackhi_epi32(vc, vd));
  __m512i all = join(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  all = join(all, _mm512_shuffle_i64x2(all, all, 0x4e));
  all = join(all, _mm512_shuffle_i64x2(all, all, 0xb1));
  _mm_storeu_ps(out, (__m128)_mm512_castsi512_si128(all));
#elif defined(__AVX2__)
  const auto join = [](__m128 x, __m128 y) { return LARGEST ? _mm_max_ps(x, y) : _mm_add_ps(x, y); };
  const __m128 qa = quarter<LARGEST>(a), qb = quarter<LARGEST>(b), qc = quarter<LARGEST>(c), qd = quarter<LARGEST>(d);
  const __m128 ab = join(_mm_movelh_ps(qa, qb), _mm_movehl_ps(qb, qa));
  const __m128 cd = join(_mm_movelh_ps(qc, qd), _mm_movehl_ps(qd, qc));
  _mm_storeu_ps(out, join(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
#else
  out[0] = LARGEST ? largest(a) : sum(a);
  out[1] = LARGEST ? largest(b) : sum(b);
  out[2] = LARGEST ? largest(c) : sum(c);
  out[3] = LARGEST ? largest(d) : sum(d);
#endif
}
// Sums, or largest lanes, of `count` vectors; `out` has room for a multiple of four.
template <bool LARGEST>
OSCAR_INLINE void reduce(const F* v, int count, float* out) {
  for (int i = 0; i < count; i += 4)
    reduce4<LARGEST>(v[i], v[min_of(i + 1, count - 1)], v[min_of(i + 2, count - 1)], v[min_of(i + 3, count - 1)],
                     out + i);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The same of eight rows of eight lanes.
OSCAR_INLINE void transpose8(__m256i r[8]) {
  __m256i a[8], b[8];
  _Pragma("GCC unroll 8") for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  _Pragma("GCC unroll 8") for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}
#endif
// rows[i][j] becomes rows[j][i].
OSCAR_INLINE void transpose16(I rows[16]) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)rows[i].v[0], (__m512i)rows[i + 1].v[0]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i].v[0], (__m512i)rows[i + 1].v[0]);
  }
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    rows[i].v[0] = (NativeI)_mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    rows[i + 8].v[0] = (NativeI)_mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    rows[i + 4].v[0] = (NativeI)_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    rows[i + 12].v[0] = (NativeI)_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
#elif defined(__AVX2__)
  __m256i corners[2][2][8];  // [half of the rows][half of the lanes]
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 2; k++) corners[i / 8][k][i % 8] = (__m256i)rows[i].v[k];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 2; k++) transpose8(corners[half][k]);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 2; k++) rows[i].v[k] = (NativeI)corners[k][i / 8][i % 8];
#else
  int32_t from[16][16], to[16][16];
  for (int i = 0; i < 16; i++) store(from[i], rows[i]);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[j][i] = from[i][j];
  for (int i = 0; i < 16; i++) rows[i] = load_i(to[i]);
#endif
}

// Sums and differences of lanes BY apart: one step of a Hadamard transform.
template <int BY>
OSCAR_INLINE F butterfly(F a) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)a.v[0];
  const __m512 other = BY == 1   ? _mm512_permute_ps(x, 0xb1)
                       : BY == 2 ? _mm512_permute_ps(x, 0x4e)
                       : BY == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1)
                                 : _mm512_shuffle_f32x4(x, x, 0x4e);
  const __mmask16 upper = BY == 1 ? 0xaaaa : BY == 2 ? 0xcccc : BY == 4 ? 0xf0f0 : 0xff00;
  a.v[0] = (NativeF)_mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
  return a;
#else
  float from[kLanes], to[kLanes];
  store(from, a);
  for (int i = 0; i < kLanes; i++) to[i] = i & BY ? from[i ^ BY] - from[i] : from[i] + from[i ^ BY];
  return load_f(to);
#endif
}

// 2^x for x <= 0, relative error below 3e-6; 0 below -125, NaN stays NaN.
OSCAR_INLINE F exp2_nonpositive(F x) {
  const F least = set_f(-125.0f), magic = set_f(12582912.0f);  // the sum's low bits are the integer
  const F clamped = max(least, x), shifted = clamped + magic;
  const F r = clamped - (shifted - magic);
  F p = set_f(9.5828471260e-3f);
  p = fma(p, r, set_f(5.5906423883e-2f));
  p = fma(p, r, set_f(2.4024098747e-1f));
  p = fma(p, r, set_f(6.9312419361e-1f));
  p = fma(p, r, set_f(1.0f));
  return select(greater(least, x), zero_f(), as_float(bits(p) + shift_left<23>(bits(shifted))));
}

}  // namespace
