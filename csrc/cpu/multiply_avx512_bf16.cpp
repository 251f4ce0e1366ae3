// SPDX-License-Identifier: Apache-2.0
#include "multiply.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace {

// 24 accumulators, four vectors of B and a pair of A's numbers fit the 32 registers.
constexpr int kRows = 6, kVectors = 4;

template <int ROWS, int VECTORS>
void multiply_tile(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int depth, bool add) {
  __m512 acc[ROWS][VECTORS];
  _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++)
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)
      acc[i][j] = add ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  for (int k = 0; k < depth; k += 2) {
    __m512bh row[VECTORS];
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)
      row[j] = (__m512bh)_mm512_loadu_si512(b + k / 2 * ldb + 16 * j);
    _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++) {
      int32_t pair;
      __builtin_memcpy(&pair, a + i * lda + k, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, row[j]);
    }
  }
  _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++)
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) _mm512_storeu_ps(c + i * ldc + 16 * j, acc[i][j]);
}

template <int VECTORS>
void multiply_columns(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int depth,
                      bool add) {
  for (; rows >= kRows; rows -= kRows, a += kRows * lda, c += kRows * ldc)
    multiply_tile<kRows, VECTORS>(a, lda, b, ldb, c, ldc, depth, add);
  for (; rows >= 2; rows -= 2, a += 2 * lda, c += 2 * ldc)
    multiply_tile<2, VECTORS>(a, lda, b, ldb, c, ldc, depth, add);
  if (rows) multiply_tile<1, VECTORS>(a, lda, b, ldb, c, ldc, depth, add);
}

void multiply(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int columns,
              int depth, bool add) {
  int j = 0;
  for (; j + 16 * kVectors <= columns; j += 16 * kVectors)
    multiply_columns<kVectors>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
  for (; j < columns; j += 16) multiply_columns<1>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
}

}  // namespace

const MultiplyBf16 oscar_multiply_avx512_bf16 = multiply;
#else
const MultiplyBf16 oscar_multiply_avx512_bf16 = nullptr;
#endif
