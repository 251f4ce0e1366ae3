// SPDX-License-Identifier: Apache-2.0
// Attention over tokens held in fp32: a tile of keys and values at a time, with a running
// softmax. Serves ring and in-flight tokens, and dequantized pages when rows are many.
#pragma once

#include "page.h"

namespace {

constexpr int kTile = 128;  // tokens

// ---- C[m][n] = A[m][k] B[k][n] (+ C); n is a multiple of 16 ---------------------------------------
constexpr int kTileRows = kParts == 1 ? 6 : kParts == 2 ? 2 : 4;
constexpr int kTileVectors = kParts == 1 ? 4 : kParts == 2 ? 2 : 1;

template <int ROWS, int VECTORS>
inline void multiply_tile(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int depth, bool add) {
  F acc[ROWS][VECTORS];
  _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++)
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)
      acc[i][j] = add ? load_f(c + i * ldc + 16 * j) : zero_f();
  for (int k = 0; k < depth; k++) {
    F row[VECTORS];
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) row[j] = load_f(b + k * ldb + 16 * j);
    _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++) {
      const F x = set_f(a[i * lda + k]);
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
  }
  _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++)
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) store(c + i * ldc + 16 * j, acc[i][j]);
}

template <int VECTORS>
inline void multiply_columns(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int depth,
                             bool add) {
  int i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    multiply_tile<kTileRows, VECTORS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, add);
  a += i * lda, c += i * ldc;
  switch (rows - i) {
    case 5: multiply_tile<5, VECTORS>(a, lda, b, ldb, c, ldc, depth, add); break;
    case 4: multiply_tile<4, VECTORS>(a, lda, b, ldb, c, ldc, depth, add); break;
    case 3: multiply_tile<3, VECTORS>(a, lda, b, ldb, c, ldc, depth, add); break;
    case 2: multiply_tile<2, VECTORS>(a, lda, b, ldb, c, ldc, depth, add); break;
    case 1: multiply_tile<1, VECTORS>(a, lda, b, ldb, c, ldc, depth, add); break;
  }
}

inline void multiply(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int columns,
                     int depth, bool add) {
  int j = 0;
  for (; j + 16 * kTileVectors <= columns; j += 16 * kTileVectors)
    multiply_columns<kTileVectors>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
  for (; j < columns; j += 16) multiply_columns<1>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
}

// ---- model tokens -------------------------------------------------------------------------------------
OSCAR_INLINE F load_model(const void* p, int dtype) {
  if (dtype == OSCAR_BF16) return load_bf16(static_cast<const uint16_t*>(p));
  if (dtype == OSCAR_FP16) return load_fp16(static_cast<const uint16_t*>(p));
  return load_f(p);
}
inline int item_bytes(int dtype) { return dtype == OSCAR_FP32 ? 4 : 2; }

inline void load_token(const void* p, int dtype, int dim, float* out) {
  const char* bytes = static_cast<const char*>(p);
  for (int i = 0; i < dim; i += 16) store(out + i, load_model(bytes + i * item_bytes(dtype), dtype));
}

inline void store_token(const float* x, int dtype, int dim, void* p) {
  if (dtype == OSCAR_FP32) {
    memcpy(p, x, 4 * dim);
  } else if (dtype == OSCAR_BF16) {
    for (int i = 0; i < dim; i++) static_cast<uint16_t*>(p)[i] = to_bf16(x[i]);
  } else {
    for (int i = 0; i < dim; i++) static_cast<uint16_t*>(p)[i] = to_fp16(x[i]);
  }
}

// Keys of `count` tokens to [dim][kTile]; tokens up to a multiple of 16 become zero.
inline void stage_keys(const void* const* tokens, int count, int dtype, int dim, float* keys) {
  for (int t = 0; t < count; t += 16)
    for (int c = 0; c < dim; c += 16) {
      I rows[16];
      for (int i = 0; i < 16; i++)
        rows[i] = t + i < count
                      ? bits(load_model(static_cast<const char*>(tokens[t + i]) + c * item_bytes(dtype), dtype))
                      : zero_i();
      transpose16(rows);
      for (int i = 0; i < 16; i++) store(keys + (c + i) * kTile + t, rows[i]);
    }
}

inline void stage_values(const void* const* tokens, int count, int dtype, int dim, float* values) {
  for (int t = 0; t < count; t++) load_token(tokens[t], dtype, dim, values + t * dim);
}

// ---- running softmax ------------------------------------------------------------------------------------
struct DenseState {
  int rows;
  float *scores;           // [row][kTile]
  float *output;           // [row][dim], not normalised
  float *maximum, *total;  // [row]
};

inline size_t dense_bytes(const Shape& s, int rows) {
  const auto pad = Scratch::padded;
  return pad(4 * rows * kTile) + pad(4 * rows * s.dim) + 2 * pad(4 * rows) + 2 * pad(4 * kTile * s.dim);
}

inline DenseState take_dense(Scratch& scratch, const Shape& s, int rows) {
  DenseState d;
  d.rows = rows;
  d.scores = scratch.take<float>(rows * kTile);
  d.output = scratch.take<float>(rows * s.dim);
  d.maximum = scratch.take<float>(rows);
  d.total = scratch.take<float>(rows);
  return d;
}

inline void begin_dense(DenseState& d, const Shape& s) {
  memset(d.output, 0, 4 * d.rows * s.dim);
  for (int row = 0; row < d.rows; row++) d.maximum[row] = -__builtin_inff(), d.total[row] = 0;
}

// One tile. Row r reads tokens 0 .. visible(r) - 1 of it, `count` at most; query: [row][dim], scaled.
template <class Visible>
inline void dense_tile(const DenseState& d, const Shape& s, const float* query, const float* keys, const float* values,
                       int count, Visible visible) {
  const int padded = (count + 15) / 16 * 16;
  multiply(query, s.dim, keys, kTile, d.scores, kTile, d.rows, padded, s.dim, false);
  const I index = lane_index();
  const F none = set_f(-__builtin_inff());
  for (int row = 0; row < d.rows; row++) {
    float* scores = d.scores + row * kTile;
    const int seen = visible(row);
    F peak = none;
    for (int i = 0; i < padded; i += 16) {
      const F x = select(less(index, set_i(seen - i)), load_f(scores + i), none);
      store(scores + i, x);
      peak = max(peak, x);
    }
    const float old = d.maximum[row];
    const float top = largest(max(set_f(old), peak));
    const F base = set_f(top == -__builtin_inff() ? 0.0f : top);
    F sums = zero_f();
    for (int i = 0; i < padded; i += 16) {
      const F p = exp2_nonpositive(load_f(scores + i) - base);
      store(scores + i, p);
      sums = sums + p;
    }
    if (old != top) {
      const F decay = exp2_nonpositive(set_f(old) - base);
      float lanes[kLanes];
      store(lanes, decay);
      d.total[row] *= lanes[0];
      float* out = d.output + row * s.dim;
      for (int i = 0; i < s.dim; i += 16) store(out + i, load_f(out + i) * decay);
    }
    d.maximum[row] = top;
    d.total[row] += sum(sums);
  }
  multiply(d.scores, kTile, values, s.dim, d.output, s.dim, d.rows, s.dim, count, true);
}

}  // namespace
