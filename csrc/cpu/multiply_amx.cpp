// SPDX-License-Identifier: Apache-2.0
#include "multiply.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace {

// All eight tiles have 16 rows of 64 bytes: sums in tiles 0 to 3 (16 x 16 of fp32, two rows of two), two
// tiles of A (16 x 32 of bf16) in 4 and 5, two of B (16 x 16 pairs of bf16) in 6 and 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 16 * ROWS rows by 16 * COLUMNS columns. The instructions want tile numbers that are constants.
template <int ROWS, int COLUMNS>
void multiply_tiles(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int depth, bool add) {
  float* below = c + 16 * ldc;
  if (add) {
    _tile_loadd(0, c, 4 * ldc);
    if (COLUMNS == 2) _tile_loadd(1, c + 16, 4 * ldc);
    if (ROWS == 2) _tile_loadd(2, below, 4 * ldc);
    if (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, below + 16, 4 * ldc);
  } else {
    _tile_zero(0);
    if (COLUMNS == 2) _tile_zero(1);
    if (ROWS == 2) _tile_zero(2);
    if (ROWS == 2 && COLUMNS == 2) _tile_zero(3);
  }
  for (int k = 0; k < depth; k += 32) {
    _tile_loadd(4, a + k, 2 * lda);
    _tile_loadd(6, b + k / 2 * ldb, 4 * ldb);
    _tile_dpbf16ps(0, 4, 6);
    if (COLUMNS == 2) {
      _tile_loadd(7, b + k / 2 * ldb + 16, 4 * ldb);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (ROWS == 2) {
      _tile_loadd(5, a + 16 * lda + k, 2 * lda);
      _tile_dpbf16ps(2, 5, 6);
      if (COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 4 * ldc);
  if (COLUMNS == 2) _tile_stored(1, c + 16, 4 * ldc);
  if (ROWS == 2) _tile_stored(2, below, 4 * ldc);
  if (ROWS == 2 && COLUMNS == 2) _tile_stored(3, below + 16, 4 * ldc);
}

template <int COLUMNS>
void multiply_columns(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int depth,
                      bool add) {
  int i = 0;
  for (; i + 16 < rows; i += 32) multiply_tiles<2, COLUMNS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, add);
  if (i < rows) multiply_tiles<1, COLUMNS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, add);
}

void multiply(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int columns,
              int depth, bool add) {
  const TileConfig config;
  _tile_loadconfig(&config);
  int j = 0;
  for (; j + 32 <= columns; j += 32) multiply_columns<2>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
  if (j < columns) multiply_columns<1>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
  _tile_release();
}

}  // namespace

const MultiplyBf16 oscar_multiply_amx = multiply;
#else
const MultiplyBf16 oscar_multiply_amx = nullptr;
#endif
