// SPDX-License-Identifier: Apache-2.0
// Attention of many rows over a tile of tokens, with bf16 operands and fp32 sums: dense.h for models
// in bf16 on machines that multiply bf16 faster.
//
// Probabilities are rounded, and little else. Queries, keys and values of the model are bf16 already, and so
// are the bytes of an int8 ring. Of a page, value codes around zero are bf16 numbers, and so, nearly always, are
// keys without their norms (a few bits of code times an e4m3 scale, plus an e4m3 zero; 8 bits of the first).
// Norms, scales and zeros are applied to scores and probabilities in fp32, and rotated queries are the sum of
// two bf16 numbers.
#pragma once

#include "dense.h"
#include "multiply.h"
#include "oscar_cpu.h"

namespace {

// Null: products are in fp32.
inline MultiplyBf16 multiply_bf16_of(int isa, int dtype, const OscarFormat& format, bool pages) {
  if (dtype != OSCAR_BF16) return nullptr;
  if (pages && format.key_param_bytes != 1) return nullptr;  // keys from fp16 parameters are no bf16 numbers
  return isa == OSCAR_AMX ? oscar_multiply_amx : isa == OSCAR_AVX512_BF16 ? oscar_multiply_avx512_bf16 : nullptr;
}

// Sixteen words of two bf16 numbers.
OSCAR_INLINE I bf16_pairs(F low, F high) {
  return merge_bits(set_i(0xffff), shift_right<16>(round_to_bf16(low)), round_to_bf16(high));
}

// Rows of `count` floats (a multiple of 16) to bf16, zero up to the next multiple of 32; map(x, i) is
// applied to columns i .. i + 15 before.
template <class Map>
inline void round_rows(const float* in, int ld, int rows, int count, uint16_t* out, int ldout, Map map) {
  for (int row = 0; row < rows; row++, in += ld, out += ldout)
    for (int i = 0; i < count; i += 32) {
      F even, odd;
      deinterleave(map(load_f(in + i), i), i + 16 < count ? map(load_f(in + i + 16), i + 16) : zero_f(), even, odd);
      store(out + i, bf16_pairs(even, odd));
    }
}

// [depth][columns] to words of two depths, zero up to a depth that is a multiple of 32.
template <class Row>  // row(k, c): columns c .. c + 15 of depth k
inline void pair_rows(int depth, int columns, uint32_t* out, Row row) {
  for (int k = 0; k < (depth + 31) / 32 * 32; k += 2, out += columns)
    for (int c = 0; c < columns; c += 16)
      store(out + c, bf16_pairs(k < depth ? row(k, c) : zero_f(), k + 1 < depth ? row(k + 1, c) : zero_f()));
}

class Bf16Tiles {
 public:
  static constexpr bool kScaledQueries = false, kWholePages = false;

  static size_t bytes(const Shape& s, int rows) {
    const auto pad = Scratch::padded;
    const int depth = (s.dim + 31) / 32 * 32, padded = (rows + 15) / 16 * 16;
    return 2 * pad(2 * padded * depth) + pad(2 * padded * kTile) + pad(2 * kTile * depth) + pad(2 * kTile * s.dim);
  }

  // scale: of scores, to logits to base two.
  Bf16Tiles(Scratch& scratch, const Shape& shape, const DenseState& state, float scale, MultiplyBf16 product)
      : s(shape), d(state), multiply_(product), depth_((s.dim + 31) / 32 * 32), scale_(scale) {
    const int rows = (d.rows + 15) / 16 * 16;
    query_ = scratch.take<uint16_t>(rows * depth_);
    rest_ = scratch.take<uint16_t>(rows * depth_);
    probabilities_ = scratch.take<uint16_t>(rows * kTile);
    keys_ = scratch.take<uint32_t>(depth_ / 2 * kTile);
    values_ = scratch.take<uint32_t>(kTile / 2 * s.dim);
  }

  void set_rotated_query(const float* query) {
    set_query(query);
    round_rows(query, s.dim, d.rows, s.dim, rest_, depth_,
               [](F x, int) { return x - as_float(round_to_bf16(x) & set_i(0xffff0000)); });
  }
  void set_query(const float* query) {
    round_rows(query, s.dim, d.rows, s.dim, query_, depth_, [](F x, int) { return x; });
  }

  template <class Visible>
  void page(const float* keys, const float* values, const TokenParams& params, int count, Visible visible) const {
    pair_rows(s.dim, kTile, keys_, [&](int k, int c) { return load_f(keys + k * kTile + c); });
    pair_rows(count, s.dim, values_, [&](int k, int c) { return load_f(values + k * s.dim + c); });
    add_scores(query_, count, false);
    add_scores(rest_, count, true);
    soften(d, s, count, visible, [&](F x, int i) { return x * (load_f(params.norms + i) * set_f(scale_)); });
    add_first_value(d, s, params);  // in fp32: its bytes less the middle code would be no bf16 numbers
    for (int group = 0; group < s.value_groups; group++) {
      const float *scale = params.v_scale + group * kPage, *zero = params.v_zero + group * kPage;
      const int begin = group * s.format.value_group, channels = min_of(s.format.value_group, s.dim - begin);
      add_middles(scale, zero, count, begin, channels);
      add_values(count, begin, channels, [&](F p, int i) { return p * load_f(scale + i); });
    }
  }

  template <class Visible>
  void tokens(const TokenTile& tile, Visible visible) const {
    const int bytes = item_bytes(tile.dtype);
    const auto at = [&](const void* token, int c) { return static_cast<const char*>(token) + c * bytes; };
    for (int t = 0; t < tile.count; t += 16)
      for (int c = 0; c < depth_; c += 32) {
        I rows[16];
        for (int i = 0; i < 16; i++)
          rows[i] = t + i < tile.count ? load_pairs(at(tile.key[t + i], c), tile.dtype, s.dim - c) : zero_i();
        transpose16(rows);
        for (int i = 0; i < 16; i++) store(keys_ + (c / 2 + i) * kTile + t, rows[i]);
      }
    pair_rows(tile.count, s.dim, values_, [&](int k, int c) { return load_model(at(tile.value[k], c), tile.dtype); });
    add_scores(query_, tile.count, false);
    soften_tokens(d, s, tile, scale_, visible);
    add_values(tile.count, 0, s.dim, [](F p, int) { return p; });
  }

 private:
  // Up to 32 channels of a token, of which `left` are left, as bf16.
  static I load_pairs(const void* p, int dtype, int left) {
    I pairs = zero_i();
    if (dtype == kInt8) {
      alignas(64) uint16_t channels[32] = {};
      for (int i = 0; i < min_of(32, left); i += 16)
        narrow_u16(channels + i, shift_right<16>(bits(load_int8(static_cast<const int8_t*>(p) + i))));
      pairs = load_i(channels);
    } else {
      memcpy(&pairs, p, 2 * min_of(32, left));
    }
    return pairs;
  }

  void add_scores(const uint16_t* query, int count, bool add) const {
    multiply_(query, depth_, keys_, kTile, d.scores, kTile, d.rows, (count + 15) / 16 * 16, depth_, add);
  }

  // Probabilities, through `map`, times some channels of the values.
  template <class Map>
  void add_values(int count, int begin, int channels, Map map) const {
    round_rows(d.scores, kTile, d.rows, (count + 15) / 16 * 16, probabilities_, kTile, map);
    multiply_(probabilities_, kTile, values_ + begin, s.dim, d.output + begin, s.dim, d.rows, channels,
              (count + 31) / 32 * 32, true);
  }

  // Probabilities times what the middle code stands for in a group of channels. With codes around zero
  // rounded probabilities err in proportion to the values, not to their distance from the smallest.
  void add_middles(const float* scale, const float* zero, int count, int begin,
                   int channels) const {
    for (int row = 0; row < d.rows; row++) {
      const float* p = d.scores + row * kTile;
      F sums = zero_f();
      for (int i = 0; i < count; i += 16) {
        const F middle = fma(load_f(scale + i), set_f(middle_code(s.format.value_bits)), load_f(zero + i));
        sums = fma(load_f(p + i), middle, sums);
      }
      const F all = set_f(sum(sums));
      float* out = d.output + row * s.dim + begin;
      for (int i = 0; i < channels; i += 16) store(out + i, load_f(out + i) + all);
    }
  }

  const Shape& s;
  const DenseState& d;
  const MultiplyBf16 multiply_;
  const int depth_;  // dim, rounded up to what a product takes
  const float scale_;
  uint16_t *query_, *rest_;   // [row][depth]: queries, and what rounding took off rotated ones
  uint16_t* probabilities_;   // [row][kTile]
  uint32_t *keys_, *values_;  // [depth / 2][kTile], [kTile / 2][dim]
};

}  // namespace
