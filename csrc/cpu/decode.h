// SPDX-License-Identifier: Apache-2.0
// Attention of few query rows over quantized pages, in integers.
//
// Codes are multiplied as they are, by 16-bit queries and 16-bit probabilities: 8 bits would
// move logits by 1e-2, 16 bits by less than 1e-4. Per key group a row's query times the key
// scales is rounded to 16 bits with one fp32 factor; zeros fold into one fp32 dot product per
// group and norms multiply the logits. Likewise probability times value scale.
//
// What rounding does to the sum of the rounded numbers is known, and put right at once: in
// effect codes are multiplied as distances from the middle code, which halves the error.
#pragma once

#include "page.h"

namespace {

// Registers hold row tile x (two or four) accumulators.
constexpr int kRowTile = kParts == 1 ? 4 : 2;
constexpr int kMaxRows = 16;

// A page to bring into the cache while another is worked on, a few lines at a time: pages
// are scattered, so the machine's own prefetching finds each one too late.
class Prefetch {
 public:
  void begin(const uint8_t* page, int64_t bytes, int steps) {
    next_ = page;
    left_ = page ? (bytes + 63) / 64 : 0;
    step_ = left_ / steps + 1;
  }
  OSCAR_INLINE void advance() {
    const int64_t count = min_of(step_, left_);
    for (int64_t i = 0; i < count; i++) __builtin_prefetch(next_ + 64 * i, 0, 2);
    next_ += 64 * count;
    left_ -= count;
  }

 private:
  const uint8_t* next_ = nullptr;
  int64_t left_ = 0, step_ = 0;  // lines
};

// What a thread needs for one (request, KV head, split): rows of a KV head's query heads.
struct DecodeState {
  int rows;
  float *query_low, *query_high;  // [row][half_padded], rotated, softmax scale applied
  int32_t* query;                 // [row][words][2 (j1)][2 (block)] pairs of 16 bits
  float* logits;                  // [row][128], then probabilities
  int32_t* probs;                 // [row][value group][64] pairs of 16 bits
  I* spread_probs;                // [row][16]: lanes 4t .. 4t+3 the pair of t
  I* planes;
  float* output;                  // [row][chunk][g][j0][16]: lanes 4t + tile, summed over t at the end
  float *maximum, *total;         // [row]
  float* zeros;                   // [row][value group]: sum of p * zero
  float* factor;                  // [row][value group]: of probs
  float* decay;                   // [row]: factor of what was summed up before this page
  Prefetch prefetch;
};

inline size_t decode_bytes(const Shape& s, int rows) {
  const auto pad = Scratch::padded;
  return 2 * pad(4 * rows * s.half_padded) + pad(4 * rows * s.words * 4 + 128) + pad(4 * rows * kPage) +
         pad(4 * rows * s.value_groups * 64) + pad(64 * rows * 16) + pad(64 * s.words * 4) +
         pad(4 * rows * s.spread()) + 3 * pad(4 * rows) + 2 * pad(4 * rows * s.value_groups);
}

inline DecodeState take_decode(Scratch& scratch, const Shape& s, int rows) {
  DecodeState d;
  d.rows = rows;
  d.query_low = scratch.take<float>(rows * s.half_padded);
  d.query_high = scratch.take<float>(rows * s.half_padded);
  d.query = scratch.take<int32_t>(rows * s.words * 4 + 32);
  d.logits = scratch.take<float>(rows * kPage);
  d.probs = scratch.take<int32_t>(rows * s.value_groups * 64);
  d.spread_probs = scratch.take<I>(rows * 16);
  d.planes = scratch.take<I>(s.words * 4);
  d.output = scratch.take<float>(rows * s.spread());
  d.maximum = scratch.take<float>(rows);
  d.total = scratch.take<float>(rows);
  d.decay = scratch.take<float>(rows);
  d.zeros = scratch.take<float>(rows * s.value_groups);
  d.factor = scratch.take<float>(rows * s.value_groups);
  return d;
}

// Start with rotated queries [row][dim].
inline void begin_decode(DecodeState& d, const Shape& s, const float* rotated) {
  memset(d.query_low, 0, 4 * d.rows * s.half_padded);
  memset(d.query_high, 0, 4 * d.rows * s.half_padded);
  for (int row = 0; row < d.rows; row++)
    for (int c = 0; c < s.dim; c++)
      (c & 1 ? d.query_high : d.query_low)[row * s.half_padded + pair_of(c, s.tiles)] = rotated[row * s.dim + c];
  memset(d.output, 0, 4 * d.rows * s.spread());
  memset(d.zeros, 0, 4 * d.rows * s.value_groups);
  for (int row = 0; row < d.rows; row++) d.maximum[row] = -__builtin_inff(), d.total[row] = 0;
}

// ---- keys ------------------------------------------------------------------------------------------
// 16-bit query of one row and key group; returns the factor, and what is to be added in `offset`.
// `centre`: value of the middle code. Writes one block's half of every pair, or both.
inline float round_query(const float* low, const float* high, const Pairs& scale, const Pairs& centre, float middle,
                         const Shape& s, int32_t* out, int block, bool both, float& offset) {
  F peak = zero_f(), dot = zero_f();
  for (int i = 0; i < s.half_padded; i += 16) {
    const F a = load_f(low + i), b = load_f(high + i);
    peak = max(peak, max(abs(a * load_f(scale.low + i)), abs(b * load_f(scale.high + i))));
    dot = fma(a, load_f(centre.low + i), dot);
    dot = fma(b, load_f(centre.high + i), dot);
  }
  const float top = largest(peak);
  const F inverse = set_f(top > 0 ? 32767.0f / top : 0.0f);
  I rounded = zero_i();
  for (int i = 0; i < s.half_padded; i += 16) {
    const I a = round_to_int(load_f(low + i) * load_f(scale.low + i) * inverse);
    const I b = round_to_int(load_f(high + i) * load_f(scale.high + i) * inverse);
    rounded = rounded + a + b;
    const I pairs = (a & set_i(0xffff)) | shift_left<16>(b);
    int32_t* p = out + 2 * i;
    if (both && i + 16 <= s.half) {
      store_interleaved(p, pairs, pairs);
    } else {
      alignas(64) int32_t lanes[kLanes];
      store(lanes, pairs);
      for (int j = 0; j < min_of(16, s.half - i); j++) {
        if (both) p[2 * j] = p[2 * j + 1] = lanes[j];
        else p[2 * j + block] = lanes[j];
      }
    }
  }
  const float factor = top / 32767.0f;
  offset = sum(dot) - factor * middle * sum(rounded);
  return factor;
}

template <int BITS, int ROWS, int R>
OSCAR_INLINE void dot_keys_step(const KeyWord<BITS>& w, const int32_t* query, int row_stride, I (&acc)[ROWS][2]) {
  I c[2][2];
  key_codes<BITS, R>(w, c);
  _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) {
    const int32_t* q = query + row * row_stride;
    const I q0 = broadcast_pair(q), q1 = broadcast_pair(q + 2);
    acc[row][0] = dot16(dot16(acc[row][0], c[0][0], q0), c[1][0], q1);
    acc[row][1] = dot16(dot16(acc[row][1], c[0][1], q0), c[1][1], q1);
  }
}

// Logits of 64 tokens. factor, offset: [row][2 blocks].
template <int BITS, int ROWS>
inline void dot_keys(DecodeState& d, const Shape& s, int row0, int pair, const float (*factor)[2],
                     const float (*offset)[2], const float* norms) {
  const int32_t* query = d.query + row0 * s.words * 4;
  I acc[2][ROWS][2];  // [r][row][j0]
  for (int r = 0; r < 2; r++)
    for (int row = 0; row < ROWS; row++) acc[r][row][0] = acc[r][row][1] = zero_i();
  if (kParts == 1) {
    for (int i = 0; i < s.words; i++) {
      if (i & 1) d.prefetch.advance();
      const KeyWord<BITS> w = key_word<BITS>(d.planes, s.words, pair, i);
      dot_keys_step<BITS, ROWS, 0>(w, query + 4 * i, 4 * s.words, acc[0]);
      dot_keys_step<BITS, ROWS, 1>(w, query + 4 * i, 4 * s.words, acc[1]);
    }
  } else {  // fewer registers
    for (int i = 0; i < s.words; i++)
      dot_keys_step<BITS, ROWS, 0>(key_word<BITS>(d.planes, s.words, pair, i), query + 4 * i, 4 * s.words, acc[0]);
    for (int i = 0; i < s.words; i++)
      dot_keys_step<BITS, ROWS, 1>(key_word<BITS>(d.planes, s.words, pair, i), query + 4 * i, 4 * s.words, acc[1]);
  }
  for (int r = 0; r < 2; r++)
    for (int row = 0; row < ROWS; row++) {
      I blocks[2];
      deinterleave(acc[r][row][0], acc[r][row][1], blocks[0], blocks[1]);
      for (int block = 0; block < 2; block++) {
        const int token = 64 * pair + 32 * block + 16 * r;
        const F logit = fma(to_float(blocks[block]), set_f(factor[row0 + row][block]), set_f(offset[row0 + row][block]));
        store(d.logits + (row0 + row) * kPage + token, logit * load_f(norms + token));
      }
    }
}

template <int BITS>
inline void page_logits(DecodeState& d, const Shape& s, const uint8_t* page, bool first) {
  alignas(64) float norms[kPage];
  load_norms(page, s, norms);
  Pairs scale, centre;
  constexpr float middle = ((1 << BITS) - 1) / 2.0f;
  const int bytes = s.args.key_param_bytes;
  float factor[kMaxRows][2], offset[kMaxRows][2];
  int loaded = -1;
  turn_keys<BITS>(page, s, d.planes);
  for (int pair = 0; pair < 2; pair++) {
    const int group[2] = {key_group_of(s, 64 * pair, first), key_group_of(s, 64 * pair + 32, first)};
    for (int block = 0; block < 2; block++) {
      if (group[block] == loaded) continue;
      loaded = group[block];
      const uint8_t* p = page + s.args.k_params + loaded * 2 * s.dim * bytes;
      load_pairs(p, bytes, s, scale);
      load_pairs(p + s.dim * bytes, bytes, s, centre);
      for (int i = 0; i < s.half_padded; i += 16) {
        store(centre.low + i, fma(load_f(scale.low + i), set_f(middle), load_f(centre.low + i)));
        store(centre.high + i, fma(load_f(scale.high + i), set_f(middle), load_f(centre.high + i)));
      }
      const bool both = group[0] == group[1];
      for (int row = 0; row < d.rows; row++) {
        factor[row][block] = round_query(d.query_low + row * s.half_padded, d.query_high + row * s.half_padded, scale,
                                         centre, middle, s, d.query + row * s.words * 4, block, both, offset[row][block]);
        if (both) factor[row][1] = factor[row][0], offset[row][1] = offset[row][0];
      }
    }
    int row = 0;
    for (; row + kRowTile <= d.rows; row += kRowTile)
      dot_keys<BITS, kRowTile>(d, s, row, pair, factor, offset, norms);
    switch (d.rows - row) {
      case 3: dot_keys<BITS, 3>(d, s, row, pair, factor, offset, norms); break;
      case 2: dot_keys<BITS, 2>(d, s, row, pair, factor, offset, norms); break;
      case 1: dot_keys<BITS, 1>(d, s, row, pair, factor, offset, norms); break;
    }
  }
  if (first && s.args.exact_first_key) {
    load_pairs(page + s.args.k_params + 2 * s.dim * bytes, 2, s, scale);
    for (int row = 0; row < d.rows; row++) {
      F dot = zero_f();
      for (int i = 0; i < s.half_padded; i += 16) {
        dot = fma(load_f(d.query_low + row * s.half_padded + i), load_f(scale.low + i), dot);
        dot = fma(load_f(d.query_high + row * s.half_padded + i), load_f(scale.high + i), dot);
      }
      d.logits[row * kPage] = sum(dot) * norms[0];
    }
  }
}

// ---- softmax -----------------------------------------------------------------------------------------
// Logits of the first `count` tokens of a page to probabilities relative to the running maximum.
inline void page_softmax(const DecodeState& d, int count) {
  const I index = lane_index();
  const F none = set_f(-__builtin_inff());
  for (int row = 0; row < d.rows; row++) {
    float* logits = d.logits + row * kPage;
    F peak = none;
    for (int i = 0; i < kPage; i += 16) {
      const F x = select(less(index, set_i(count - i)), load_f(logits + i), none);
      store(logits + i, x);
      peak = max(peak, x);
    }
    const float old = d.maximum[row];
    const float top = largest(max(set_f(old), peak));
    const F base = set_f(top == -__builtin_inff() ? 0.0f : top);
    F sums = zero_f();
    for (int i = 0; i < kPage; i += 16) {
      const F p = exp_nonpositive(load_f(logits + i) - base);
      store(logits + i, p);
      sums = sums + p;
    }
    float decay = 1.0f;
    if (old != top) {
      float lanes[kLanes];
      store(lanes, exp_nonpositive(set_f(old) - base));
      decay = lanes[0];
    }
    d.decay[row] = decay;
    d.maximum[row] = top;
    d.total[row] = d.total[row] * decay + sum(sums);
  }
}

// ---- values ------------------------------------------------------------------------------------------
inline void round_probabilities(const DecodeState& d, const Shape& s, const uint8_t* page, int count) {
  alignas(64) float scale[kMaxValueGroups * kPage], zero[kMaxValueGroups * kPage];
  load_value_params(page, s, scale, zero);
  if (count < kPage)  // may be NaN, and 0 * NaN is NaN
    for (int group = 0; group < s.value_groups; group++)
      for (int i = count; i < kPage; i++) scale[group * kPage + i] = zero[group * kPage + i] = 0;
  for (int i = 0; i < s.value_groups * kPage; i += 16)  // now the value of the middle code
    store(zero + i, fma(load_f(scale + i), set_f(1.5f), load_f(zero + i)));
  for (int row = 0; row < d.rows; row++) {
    const float* p = d.logits + row * kPage;
    for (int group = 0; group < s.value_groups; group++) {
      const float *vs = scale + group * kPage, *vz = zero + group * kPage;
      F peak = zero_f(), zeros = zero_f();
      for (int i = 0; i < kPage; i += 16) {
        const F x = load_f(p + i);
        peak = max(peak, x * load_f(vs + i));
        zeros = fma(x, load_f(vz + i), zeros);
      }
      const float top = largest(peak);
      const int slot = row * s.value_groups + group;
      I rounded = zero_i();
      d.factor[slot] = top / 32767.0f;
      const F inverse = set_f(top > 0 ? 32767.0f / top : 0.0f);
      int32_t* out = d.probs + slot * 64;
      for (int i = 0; i < kPage; i += 32) {
        F even, odd;
        deinterleave(load_f(p + i) * load_f(vs + i), load_f(p + i + 16) * load_f(vs + i + 16), even, odd);
        const I a = round_to_int(even * inverse), b = round_to_int(odd * inverse);
        rounded = rounded + a + b;
        store(out + i / 2, (a & set_i(0xffff)) | shift_left<16>(b));
      }
      d.zeros[slot] = d.zeros[slot] * d.decay[row] + sum(zeros) - d.factor[slot] * 1.5f * sum(rounded);
    }
  }
}

template <int ROWS>
inline void dot_values(DecodeState& d, const Shape& s, const uint8_t* codes, int row0, int chunk) {
  const int width = s.width(chunk);
  const int block_bytes = 32 * s.tiles * 4;
  const uint8_t* base = codes + chunk * 128 * 4;
  const I* probs = d.spread_probs + row0 * 16;
  F factor[ROWS], decay[ROWS];
  for (int row = 0; row < ROWS; row++) {
    alignas(64) float lanes[kLanes];
    for (int i = 0; i < kLanes; i++) {
      const int group = min_of(64 * chunk + 16 * (i & 3), s.dim - 1) / s.args.value_group;
      lanes[i] = d.factor[(row0 + row) * s.value_groups + group];
    }
    factor[row] = load_f(lanes);
    decay[row] = set_f(d.decay[row0 + row]);
  }
  for (int g = 0; g < 8; g++) {
    d.prefetch.advance();
    I acc[ROWS][2];
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) acc[row][0] = acc[row][1] = zero_i();
    _Pragma("GCC unroll 4") for (int block = 0; block < 4; block++) {
      const I w = load_row(base + block * block_bytes + g * 16 * width, width);
      const I mask = set_i(0x00030003);
      const I c[4][2] = {{w & mask, shift_right<2>(w) & mask},
                         {shift_right<4>(w) & mask, shift_right<6>(w) & mask},
                         {shift_right<8>(w) & mask, shift_right<10>(w) & mask},
                         {shift_right<12>(w) & mask, shift_right<14>(w) & mask}};
      _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++)
        _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) {
          const I p = probs[row * 16 + block * 4 + k];
          acc[row][0] = dot16(acc[row][0], p, c[k][0]);
          acc[row][1] = dot16(acc[row][1], p, c[k][1]);
        }
    }
    for (int row = 0; row < ROWS; row++)
      for (int j0 = 0; j0 < 2; j0++) {
        float* out = d.output + (row0 + row) * s.spread() + ((chunk * 8 + g) * 2 + j0) * kLanes;
        store(out, fma(to_float(acc[row][j0]), factor[row], load_f(out) * decay[row]));
      }
  }
}

inline void page_values(DecodeState& d, const Shape& s, const uint8_t* page) {
  const uint8_t* codes = page + s.args.v_codes;
  const int group_tiles = s.args.value_group / 16;
  const I lane = lane_index();
  for (int chunk = 0; chunk < s.chunks; chunk++) {
    const int group = 4 * chunk / group_tiles;
    if (chunk == 0 || group_tiles < 4 || group != 4 * (chunk - 1) / group_tiles) {
      for (int row = 0; row < d.rows; row++)
        for (int k = 0; k < 16; k++) {  // tokens 8k .. 8k+7: (block, r, j1)
          const int32_t* p = d.probs + (row * s.value_groups + group) * 64 + 4 * k;
          I spread = repeat_each_4(p);
          if (group_tiles == 2 && group + 1 < s.value_groups)  // lanes of tiles 2 and 3
            spread = select(less(lane & set_i(3), set_i(2)), spread, repeat_each_4(p + 64));
          d.spread_probs[row * 16 + k] = spread;
        }
    }
    int row = 0;
    for (; row + kRowTile <= d.rows; row += kRowTile) dot_values<kRowTile>(d, s, codes, row, chunk);
    switch (d.rows - row) {
      case 3: dot_values<3>(d, s, codes, row, chunk); break;
      case 2: dot_values<2>(d, s, codes, row, chunk); break;
      case 1: dot_values<1>(d, s, codes, row, chunk); break;
    }
  }
}

// One page for all rows; `count` leading tokens are read. `next`: the page to come, or null.
template <int BITS>
inline void decode_page(DecodeState& d, const Shape& s, const uint8_t* page, bool first, int count,
                        const uint8_t* next) {
  d.prefetch.begin(next, s.args.page_bytes, 8 * s.chunks + s.words);
  page_logits<BITS>(d, s, page, first);
  page_softmax(d, count);
  round_probabilities(d, s, page, count);
  page_values(d, s, page);
}

// Rotated output [row][dim], not normalised.
inline void end_decode(const DecodeState& d, const Shape& s, float* out) {
  for (int row = 0; row < d.rows; row++)
    for (int chunk = 0; chunk < s.chunks; chunk++)
      for (int slot = 0; slot < 16; slot++) {  // 2 * g + j0
        const float* lanes = d.output + row * s.spread() + (chunk * 16 + slot) * kLanes;
        for (int i = 0; i < s.width(chunk); i++) {
          const int channel = 16 * (4 * chunk + i) + 8 * (slot & 1) + (slot >> 1);
          const float zero = d.zeros[row * s.value_groups + channel / s.args.value_group];
          out[row * s.dim + channel] = lanes[i] + lanes[4 + i] + lanes[8 + i] + lanes[12 + i] + zero;
        }
      }
}

}  // namespace
