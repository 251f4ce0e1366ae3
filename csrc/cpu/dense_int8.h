// SPDX-License-Identifier: Apache-2.0
// Attention of few query rows over tokens of an int8 ring, in integers: bytes are multiplied by 16-bit queries
// and 16-bit probabilities, as the codes of pages are (decode.h). Scales of keys go to the scores, scales of
// values to the probabilities before they are rounded.
//
// Loads take 32 channels, and with head sizes that are no multiple of 32 sixteen bytes more than a token has.
// They are multiplied by 0 or not stored, and are still in the ring page: scales follow its last token.
#pragma once

#include "decode.h"
#include "dense.h"

namespace {

// Rows of numbers rounded to 16 bits with one factor each. NaN anywhere in a row makes its factor NaN.
struct RoundedRows {
  alignas(64) uint16_t v[kMaxRows][kMaxDim];
  float factor[kMaxRows];

  // count: a multiple of 16. Zero up to the next of 32.
  void set(int row, const float* x, int count) {
    const float top = largest_magnitude(x, count);
    const F inverse = set_f(top > 0 ? kLargest / top : 0.0f);
    for (int i = 0; i < count; i += 16) narrow_u16(v[row] + i, round_to_int(load_f(x + i) * inverse));
    if (count % 32) memset(v[row] + count, 0, 32);
    factor[row] = top / kLargest;
  }
};

constexpr int kInt8Rows = kParts == 1 ? 4 : 2;  // at once

template <int ROWS>
inline void int8_scores(const RoundedRows& query, int row0, int dim, const TokenTile& tile, float* scores) {
  for (int t = 0; t < tile.count; t += 4) {
    prefetch_tokens(tile.key, t + 16, tile.count, dim);
    prefetch_tokens(tile.value, t, tile.count, dim);
    I sums[ROWS][4];
    _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
      _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sums[row][i] = zero_i();
    const int8_t* key[4];
    for (int i = 0; i < 4; i++) key[i] = static_cast<const int8_t*>(tile.key[min_of(t + i, tile.count - 1)]);
    for (int c = 0; c < dim; c += 32) {
      I k[4];
      _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) k[i] = widen_bytes(key[i] + c);
      _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++) {
        const I q = load_i(query.v[row0 + row] + c);
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sums[row][i] = dot16(sums[row][i], k[i], q);
      }
    }
    _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
      reduce4<false>(to_float(sums[row][0]), to_float(sums[row][1]), to_float(sums[row][2]), to_float(sums[row][3]),
                     scores + (row0 + row) * kTile + t);
  }
}

// Of CHUNKS * 32 channels from `channel` on.
template <int ROWS, int CHUNKS>
inline void int8_values(const RoundedRows& weights, int row0, int dim, const TokenTile& tile, int channel,
                        float* output) {
  I sums[ROWS][CHUNKS][2];  // of even channels, of odd channels
  _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
    _Pragma("GCC unroll 2") for (int j = 0; j < CHUNKS; j++) sums[row][j][0] = sums[row][j][1] = zero_i();
  for (int t = 0; t < tile.count; t += 2) {  // two tokens are the halves of a lane
    const int8_t* first = static_cast<const int8_t*>(tile.value[t]) + channel;
    const int8_t* second = static_cast<const int8_t*>(tile.value[min_of(t + 1, tile.count - 1)]) + channel;
    I values[CHUNKS][2];
    _Pragma("GCC unroll 2") for (int j = 0; j < CHUNKS; j++) {
      const I a = widen_bytes(first + 32 * j), b = widen_bytes(second + 32 * j), low = set_i(0xffff);
      values[j][0] = merge_bits(low, a, shift_left<16>(b));
      values[j][1] = merge_bits(low, shift_right<16>(a), b);
    }
    _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++) {
      int32_t both;
      memcpy(&both, weights.v[row0 + row] + t, 4);
      const I w = set_i(both);
      _Pragma("GCC unroll 2") for (int j = 0; j < CHUNKS; j++)
        _Pragma("GCC unroll 2") for (int odd = 0; odd < 2; odd++)
          sums[row][j][odd] = dot16(sums[row][j][odd], values[j][odd], w);
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int j = 0; j < CHUNKS; j++) {
      int32_t channels[32];
      store_interleaved(channels, sums[row][j][0], sums[row][j][1]);
      for (int c = channel + 32 * j, i = 0; i < 32 && c + i < dim; i += 16) {
        float* out = output + (row0 + row) * dim + c + i;
        store(out, fma(to_float(load_i(channels + i)), set_f(weights.factor[row0 + row]), load_f(out)));
      }
    }
}

template <class Visible>
inline void attend_int8(const DenseState& d, const Shape& s, const float* query, const TokenTile& tile,
                        Visible visible) {
  constexpr int kChunks = kParts == 1 ? 2 : 1;
  const int padded = (tile.count + 15) / 16 * 16;
  RoundedRows rounded;
  for (int row = 0; row < d.rows; row++) rounded.set(row, query + row * s.dim, s.dim);
  by_rows<kInt8Rows>(d.rows, [&](int row, auto rows) { int8_scores<rows>(rounded, row, s.dim, tile, d.scores); });
  const auto scale = [&](int row, const float* by, float factor) {
    float* x = d.scores + row * kTile;
    for (int i = 0; i < padded; i += 16) store(x + i, load_f(x + i) * (load_f(by + i) * set_f(factor)));
  };
  for (int row = 0; row < d.rows; row++) scale(row, tile.key_scale, rounded.factor[row]);
  soften(d, s, tile.count, visible, ScoresAreLogits());
  for (int row = 0; row < d.rows; row++) {
    scale(row, tile.value_scale, 1.0f);
    rounded.set(row, d.scores + row * kTile, padded);
  }
  by_rows<kInt8Rows>(d.rows, [&](int row, auto rows) {
    int c = 0;
    for (; c + 32 * kChunks <= s.dim; c += 32 * kChunks)
      int8_values<rows, kChunks>(rounded, row, s.dim, tile, c, d.output);
    for (; c < s.dim; c += 32) int8_values<rows, 1>(rounded, row, s.dim, tile, c, d.output);
  });
}

}  // namespace
