// SPDX-License-Identifier: Apache-2.0
// Attention over exact or dequantized tokens, with fp32 products: a tile of keys and values at a time, with a running
// softmax. Serves ring and in-flight tokens, and dequantized pages when rows are many.
#pragma once

#include "page.h"
#include "softmax.h"
#include "tokens.h"

namespace {

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

// Rows times a Hadamard matrix or its transpose. Of order two to some power it is Sylvester's
// (hadamard.py): butterflies, and a factor.
template <int VECTORS>
inline void rotate_sylvester(const float* in, float factor, int rows, float* out) {
  for (int row = 0; row < rows; row++, in += 16 * VECTORS, out += 16 * VECTORS) {
    F v[VECTORS];
    _Pragma("GCC unroll 16") for (int i = 0; i < VECTORS; i++)
      v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load_f(in + 16 * i)))));
    _Pragma("GCC unroll 4") for (int by = 1; by < VECTORS; by *= 2)
      _Pragma("GCC unroll 16") for (int i = 0; i < VECTORS; i++)
        if (!(i & by)) {
          const F a = v[i], b = v[i + by];
          v[i] = a + b, v[i + by] = a - b;
        }
    _Pragma("GCC unroll 16") for (int i = 0; i < VECTORS; i++) store(out + 16 * i, v[i] * set_f(factor));
  }
}
inline void rotate(const float* in, const float* matrix, int dim, int rows, float* out) {
  switch (dim) {
    case 64: return rotate_sylvester<4>(in, matrix[0], rows, out);
    case 128: return rotate_sylvester<8>(in, matrix[0], rows, out);
    case 256: return rotate_sylvester<16>(in, matrix[0], rows, out);
  }
  multiply(in, dim, matrix, dim, out, dim, rows, dim, dim, false);
}

// ---- tokens ----------------------------------------------------------------------------------------------
// Keys without their scales to [dim][kTile]; tokens up to a multiple of 16 become zero.
inline void stage_keys(const TokenTile& tile, int dim, float* keys) {
  for (int t = 0; t < tile.count; t += 16)
    for (int c = 0; c < dim; c += 16) {
      I rows[16];
      for (int i = 0; i < 16; i++) {
        rows[i] = zero_i();
        if (t + i >= tile.count) continue;
        const char* key = static_cast<const char*>(tile.key[t + i]);
        rows[i] = bits(load_model(key + c * item_bytes(tile.dtype), tile.dtype));
      }
      transpose16(rows);
      for (int i = 0; i < 16; i++) store(keys + (c + i) * kTile + t, rows[i]);
    }
}

inline void stage_values(const TokenTile& tile, int dim, float* values) {
  for (int t = 0; t < tile.count; t++) load_token(tile.value[t], tile.dtype, dim, values + t * dim);
}

// ---- running softmax ------------------------------------------------------------------------------------
struct DenseState {
  int rows;  // memory is there for a multiple of 16
  float *scores;           // [row][kTile]
  float *output;           // [row][dim], not normalised
  float *maximum, *total;  // [row]
  float soft_cap;          // of logits to base two; 0: none
};

inline size_t dense_bytes(const Shape& s, int rows) {
  const auto pad = Scratch::padded;
  const int padded = (rows + 15) / 16 * 16;
  return pad(4 * padded * kTile) + pad(4 * padded * s.dim) + 2 * pad(4 * rows);
}

inline DenseState take_dense(Scratch& scratch, const Shape& s, int rows, float soft_cap) {
  DenseState d;
  d.rows = rows;
  d.soft_cap = soft_cap;
  const int padded = (rows + 15) / 16 * 16;
  d.scores = scratch.take<float>(padded * kTile);
  d.output = scratch.take<float>(padded * s.dim);
  d.maximum = scratch.take<float>(rows);
  d.total = scratch.take<float>(rows);
  return d;
}

inline void begin_dense(const DenseState& d, const Shape& s) {
  memset(d.output, 0, 4 * d.rows * s.dim);
  for (int row = 0; row < d.rows; row++) d.maximum[row] = -__builtin_inff(), d.total[row] = 0;
}

struct ScoresAreLogits {
  OSCAR_INLINE F operator()(F x, int) const { return x; }
};

// Scores of a tile to probabilities relative to the running maximum. Row r reads the tokens
// visible(r) of `count`; logit(x, i) makes logits of the scores x of tokens i .. i + 15.
template <class Visible, class Logit>
inline void soften_uncapped(const DenseState& d, const Shape& s, int count, Visible visible, Logit logit) {
  const int padded = (count + 15) / 16 * 16;
  const I index = lane_index();
  const F none = set_f(-__builtin_inff());
  for (int row = 0; row < d.rows; row++) {
    float* scores = d.scores + row * kTile;
    const Seen seen = visible(row);
    F peak = none;
    const auto put = [&](int i, F x) {
      store(scores + i, x);
      peak = max(peak, x);
    };
    const auto before_end = [&](int i) {
      return select(less(index, set_i(seen.end - i)), logit(load_f(scores + i), i), none);
    };
    int i = 0;
    for (; i < seen.begin; i += 16) put(i, select(less(index, set_i(seen.begin - i)), none, before_end(i)));
    for (; i < padded; i += 16) put(i, before_end(i));
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
}

// The same with the model's cap of the logits, which few have: a pass of its own.
template <class Visible, class Logit>
inline void soften(const DenseState& d, const Shape& s, int count, Visible visible, Logit logit) {
  if (!(d.soft_cap > 0)) return soften_uncapped(d, s, count, visible, logit);
  for (int row = 0; row < d.rows; row++)
    for (int i = 0; i < count; i += 16) {
      float* scores = d.scores + row * kTile + i;
      store(scores, cap_logits(logit(load_f(scores), i), d.soft_cap));
    }
  soften_uncapped(d, s, count, visible, ScoresAreLogits());
}

// The same of tokens, whose scales go to the scores of keys and to the probabilities of values. factor: of logits.
template <class Visible>
inline void soften_tokens(const DenseState& d, const Shape& s, const TokenTile& tile, float factor, Visible visible) {
  if (tile.dtype != kInt8) return soften(d, s, tile.count, visible, [&](F x, int) { return x * set_f(factor); });
  soften(d, s, tile.count, visible, [&](F x, int i) { return x * (load_f(tile.key_scale + i) * set_f(factor)); });
  for (int row = 0; row < d.rows; row++)
    for (int i = 0; i < tile.count; i += 16) {
      float* p = d.scores + row * kTile + i;
      store(p, load_f(p) * load_f(tile.value_scale + i));
    }
}

// What dequantized values lack of a page's first token.
inline void add_first_value(const DenseState& d, const Shape& s, const TokenParams& params) {
  if (!params.has_first) return;
  for (int row = 0; row < d.rows; row++)
    for (int c = 0; c < s.dim; c += 16) {
      const float weight = d.scores[row * kTile] * params.v_scale[c / s.format.value_group * kPage];
      float* out = d.output + row * s.dim + c;
      store(out, fma(set_f(weight), load_f(params.first_value + c), load_f(out)));
    }
}

// Tiles of tokens for many rows, with fp32 operands.
class Fp32Tiles {
 public:
  static constexpr bool kScaledQueries = true, kWholePages = true;

  static size_t bytes(const Shape& s) { return 2 * Scratch::padded(4 * kTile * s.dim); }

  Fp32Tiles(Scratch& scratch, const Shape& shape, const DenseState& state)
      : s(shape), d(state), keys_(scratch.take<float>(kTile * s.dim)), values_(scratch.take<float>(kTile * s.dim)) {}

  // [row][dim], scaled, for the pages or the tokens that follow.
  void set_rotated_query(const float* query) { query_ = query; }
  void set_query(const float* query) { query_ = query; }

  // A dequantized page, [dim][kTile] and [kTile][dim].
  template <class Visible>
  void page(const float* keys, const float* values, const TokenParams& params, int count, Visible visible) const {
    multiply_keys(keys, count);
    soften(d, s, count, visible, ScoresAreLogits());
    multiply_values(values, count);
    add_first_value(d, s, params);
  }

  template <class Visible>
  void tokens(const TokenTile& tile, Visible visible) const {
    stage_keys(tile, s.dim, keys_);
    stage_values(tile, s.dim, values_);
    multiply_keys(keys_, tile.count);
    soften_tokens(d, s, tile, 1.0f, visible);
    multiply_values(values_, tile.count);
  }

 private:
  void multiply_keys(const float* keys, int count) const {
    multiply(query_, s.dim, keys, kTile, d.scores, kTile, d.rows, (count + 15) / 16 * 16, s.dim, false);
  }
  void multiply_values(const float* values, int count) const {
    multiply(d.scores, kTile, values, s.dim, d.output, s.dim, d.rows, s.dim, count, true);
  }

  const Shape& s;
  const DenseState& d;
  float *keys_, *values_;
  const float* query_ = nullptr;
};

// ---- few rows: tokens are read where they are -----------------------------------------------------------
// Of four tokens from `begin` on, to read soon.
inline void prefetch_tokens(const void* const* tokens, int begin, int count, int bytes) {
  for (int t = begin; t < min_of(begin + 4, count); t++)
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(tokens[t]) + i, 0, 2);
}

template <int DTYPE, int ROWS>
inline void token_scores(const float* query, int dim, const void* const* keys, const void* const* values, int count,
                         float* scores) {
  for (int t = 0; t < count; t += 4) {
    prefetch_tokens(keys, t + 16, count, dim * item_bytes(DTYPE));
    prefetch_tokens(values, t, count, dim * item_bytes(DTYPE));
    F sums[ROWS][4];
    _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
      _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sums[row][i] = zero_f();
    const char* key[4];
    for (int i = 0; i < 4; i++) key[i] = static_cast<const char*>(keys[min_of(t + i, count - 1)]);
    for (int c = 0; c < dim; c += 16) {
      F k[4];
      _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) k[i] = load_model(key[i] + c * item_bytes(DTYPE), DTYPE);
      _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++) {
        const F q = load_f(query + row * dim + c);
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sums[row][i] = fma(q, k[i], sums[row][i]);
      }
    }
    _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
      reduce4<false>(sums[row][0], sums[row][1], sums[row][2], sums[row][3], scores + row * kTile + t);
  }
}

template <int DTYPE, int ROWS, int VECTORS>
inline void token_values(const float* scores, const void* const* values, int count, int dim, int channel, float* out) {
  F sums[ROWS][VECTORS];
  _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) sums[row][j] = load_f(out + row * dim + channel + 16 * j);
  for (int t = 0; t < count; t++) {
    const char* value = static_cast<const char*>(values[t]) + channel * item_bytes(DTYPE);
    F v[VECTORS];
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++)
      v[j] = load_model(value + 16 * j * item_bytes(DTYPE), DTYPE);
    _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++) {
      const F p = set_f(scores[row * kTile + t]);
      _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) sums[row][j] = fma(p, v[j], sums[row][j]);
    }
  }
  _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
    _Pragma("GCC unroll 4") for (int j = 0; j < VECTORS; j++) store(out + row * dim + channel + 16 * j, sums[row][j]);
}

template <int DTYPE, int ROWS>
inline void token_rows(const float* query, const void* const* keys, const void* const* values, int count, int dim,
                       float* scores, float* out) {
  if (query) return token_scores<DTYPE, ROWS>(query, dim, keys, values, count, scores);
  int c = 0;
  for (; c + 16 * kTileVectors <= dim; c += 16 * kTileVectors)
    token_values<DTYPE, ROWS, kTileVectors>(scores, values, count, dim, c, out);
  for (; c < dim; c += 16) token_values<DTYPE, ROWS, 1>(scores, values, count, dim, c, out);
}

// Scores of tokens, or, without a query, the sum of their values.
template <int DTYPE>
inline void token_products(const DenseState& d, int dim, const float* query, const void* const* keys,
                           const void* const* values, int count) {
  constexpr int kRows = kParts == 1 ? 4 : 2;
  for (int row = 0; row < d.rows; row += kRows) {
    const float* q = query ? query + row * dim : nullptr;
    float *scores = d.scores + row * kTile, *out = d.output + row * dim;
    switch (min_of(kRows, d.rows - row)) {
      case 4: token_rows<DTYPE, 4>(q, keys, values, count, dim, scores, out); break;
      case 3: token_rows<DTYPE, 3>(q, keys, values, count, dim, scores, out); break;
      case 2: token_rows<DTYPE, 2>(q, keys, values, count, dim, scores, out); break;
      case 1: token_rows<DTYPE, 1>(q, keys, values, count, dim, scores, out); break;
    }
  }
}

template <class Visible>
inline void attend_in_place(const DenseState& d, const Shape& s, const float* query, const TokenTile& tile,
                       Visible visible) {
  const auto product = tile.dtype == OSCAR_BF16   ? token_products<OSCAR_BF16>
                       : tile.dtype == OSCAR_FP16 ? token_products<OSCAR_FP16>
                                                  : token_products<OSCAR_FP32>;
  product(d, s.dim, query, tile.key, tile.value, tile.count);
  soften(d, s, tile.count, visible, ScoresAreLogits());
  product(d, s.dim, nullptr, tile.key, tile.value, tile.count);
}

}  // namespace
