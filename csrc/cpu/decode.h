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
constexpr int kRowTile = 4;
constexpr int kMaxRows = 16;

// work(row, std::integral_constant<int, n>()) for n rows from `row` on, until all have had their turn.
template <int TILE, class Work>
inline void by_rows(int rows, Work work) {
  int row = 0;
  for (; row + TILE <= rows; row += TILE) work(row, std::integral_constant<int, TILE>());
  switch (rows - row) {
    case 3: return work(row, std::integral_constant<int, 3>());
    case 2: return work(row, std::integral_constant<int, 2>());
    case 1: return work(row, std::integral_constant<int, 1>());
  }
}

// Pages whose probabilities are rounded together, so that sums in integers run over all of them.
constexpr int kGroupPages = 2;
constexpr int kGroupTokens = kGroupPages * kPage;

// Pages to bring into the cache while others are worked on, a few lines at a time: pages are
// scattered, so the machine's own prefetching finds each one too late.
class Prefetch {
 public:
  void begin(const uint8_t* const* pages, int count, int64_t bytes, int steps) {
    pages_ = pages, count_ = count;
    lines_ = (bytes + 63) / 64;
    line_ = 0;
    step_ = count * lines_ / steps + 1;
  }
  OSCAR_INLINE void advance() {
    if (!count_) return;
    const int64_t end = min_of(lines_, line_ + step_);
    for (; line_ < end; line_++) __builtin_prefetch(*pages_ + 64 * line_, 0, 2);
    if (line_ == lines_) pages_++, count_--, line_ = 0;
  }

 private:
  const uint8_t* const* pages_ = nullptr;
  int count_ = 0;
  int64_t lines_ = 0, line_ = 0, step_ = 0;
};

// What a thread needs for one (request, KV head, split): rows of a KV head's query heads.
struct DecodeState {
  int rows;
  float* query;           // [row][4][quads]: rotated, softmax scale applied, in the order of Quads
  int32_t* numbers;       // query times key scales, split: [row][2][quads], or [row][2][quads][2 (block)]
  float* logits;          // [row][token], then probabilities
  int32_t* probs;         // [value group][block][row][j1][2][t]: times value scales, split
  I* planes;
  NativeI* wide;          // codes in 16 bits: WideCodes
  float* output;          // [row][chunk][g][j0][16]: lanes 4 * tile + t, summed over t at the end
  float *maximum, *total;  // [row]
  float* zeros;           // [row][value group]: sum of p * zero
  float* first;           // [row][value group]: p * scale of the first token
  float* first_value;     // [channel]
  bool has_first;         // the two above were set
  float* factor;          // [row][value group]: of probs
  float* decay;           // [row]: factor of what was summed up before this page
  float soft_cap;         // of logits to base two; 0: none
  Prefetch prefetch;

  int probs_group() const { return kGroupTokens / 32 * rows * 16; }
};

// Key codes of 32 tokens, or value codes of 8 channel pairs and some pages.
inline size_t wide_bytes(const Shape& s) {
  return kParts == 1 ? 0 : 64 * max_of(4 * s.words, kGroupTokens / 32 * 8);
}

inline size_t decode_bytes(const Shape& s, int rows) {
  const auto pad = Scratch::padded;
  return 2 * pad(16 * rows * s.quads) + pad(4 * rows * kGroupTokens) +
         pad(4 * rows * s.value_groups * kGroupTokens / 2) + pad(64 * s.words * 4) + wide_bytes(s) +
         pad(4 * rows * s.spread()) +
         3 * pad(4 * rows) + 3 * pad(4 * rows * s.value_groups) + pad(4 * s.dim);
}

inline DecodeState take_decode(Scratch& scratch, const Shape& s, int rows, float soft_cap) {
  DecodeState d;
  d.rows = rows;
  d.soft_cap = soft_cap;
  d.query = scratch.take<float>(rows * 4 * s.quads);
  d.numbers = scratch.take<int32_t>(rows * 4 * s.quads);
  d.logits = scratch.take<float>(rows * kGroupTokens);
  d.probs = scratch.take<int32_t>(rows * s.value_groups * kGroupTokens / 2);
  d.planes = scratch.take<I>(s.words * 4);
  d.wide = scratch.take<NativeI>(wide_bytes(s) / sizeof(NativeI));
  d.output = scratch.take<float>(rows * s.spread());
  d.maximum = scratch.take<float>(rows);
  d.total = scratch.take<float>(rows);
  d.decay = scratch.take<float>(rows);
  d.zeros = scratch.take<float>(rows * s.value_groups);
  d.first = scratch.take<float>(rows * s.value_groups);
  d.first_value = scratch.take<float>(s.dim);
  d.factor = scratch.take<float>(rows * s.value_groups);
  return d;
}

// Start with rotated queries [row][dim].
inline void begin_decode(DecodeState& d, const Shape& s, const float* rotated) {
  if (s.quads != s.words) memset(d.query, 0, 16 * d.rows * s.quads);
  for (int row = 0; row < d.rows; row++)
    for (int c = 0; c < s.dim; c++) d.query[row * 4 * s.quads + s.place[c]] = rotated[row * s.dim + c];
  memset(d.output, 0, 4 * d.rows * s.spread());
  memset(d.zeros, 0, 4 * d.rows * s.value_groups);
  d.has_first = false;
  for (int row = 0; row < d.rows; row++) d.maximum[row] = -__builtin_inff(), d.total[row] = 0;
}

// ---- keys ------------------------------------------------------------------------------------------
// Parameters of one key group.
struct KeyGroup {
  Quads scale, centre;  // centre: value of the middle code
  int index = -1;
};

inline void load_key_group(KeyGroup& group, const uint8_t* page, const Shape& s, int index, float middle) {
  if (group.index == index) return;
  group.index = index;
  load_key_params(page, s, index, group.scale, group.centre);
  for (int i = 0; i < 4 * s.quads; i += 16)
    store(group.centre.v + i, fma(load_f(group.scale.v + i), set_f(middle), load_f(group.centre.v + i)));
}

// 16-bit queries of all rows for the key groups of a pair of blocks, one group or two. Of each row and
// block: the factor, and what is to be added.
inline void round_queries(const DecodeState& d, const Shape& s, const KeyGroup* groups, int count, float middle,
                          float (*factor)[kMaxRows], float (*offset)[kMaxRows]) {
  alignas(64) int32_t numbers[2][2][kMaxDim / 4];
  F peak[2][kMaxRows], dots[2][kMaxRows], sums[2][kMaxRows];
  for (int block = 0; block < count; block++) {
    const KeyGroup& group = groups[block];
    for (int row = 0; row < d.rows; row++) {
      const float* query = d.query + row * 4 * s.quads;
      F top = zero_f(), dot = zero_f();
      for (int i = 0; i < 4 * s.quads; i += 16) {
        const F q = load_f(query + i);
        top = max(top, abs(q * load_f(group.scale.v + i)));
        dot = fma(q, load_f(group.centre.v + i), dot);
      }
      peak[block][row] = top, dots[block][row] = dot;
    }
    reduce<true>(peak[block], d.rows, factor[block]);
    reduce<false>(dots[block], d.rows, offset[block]);
  }
  for (int row = 0; row < d.rows; row++) {
    const float* query = d.query + row * 4 * s.quads;
    int32_t* out = d.numbers + row * 4 * s.quads;
    for (int block = 0; block < count; block++) {
      const float top = factor[block][row];
      const F inverse = set_f(top > 0 ? kLargest / top : 0.0f);
      F sum = zero_f();
      for (int i = 0; i < s.quads; i += 16) {
        I n[4];
        _Pragma("GCC unroll 4") for (int m = 0; m < 4; m++) {
          const F x = load_f(query + m * s.quads + i) * load_f(groups[block].scale.v + m * s.quads + i);
          n[m] = round_to_int(x * inverse);
        }
        sum = sum + to_float(n[0] + n[1] + n[2] + n[3]);
        I first, second;
        split(n[0], n[1], n[2], n[3], first, second);
        store((count == 1 ? out : numbers[block][0]) + i, first);
        store((count == 1 ? out + s.quads : numbers[block][1]) + i, second);
      }
      sums[block][row] = sum;
    }
    if (count == 1) continue;
    for (int which = 0; which < 2; which++)
      for (int i = 0; i < s.quads; i += 16)
        store_interleaved(out + 2 * (which * s.quads + i), load_i(numbers[0][which] + i),
                          load_i(numbers[1][which] + i));
  }
  for (int block = 0; block < count; block++) {
    alignas(64) float sum[kMaxRows];
    reduce<false>(sums[block], d.rows, sum);
    for (int row = 0; row < d.rows; row++) {
      factor[block][row] /= kLargest;
      offset[block][row] -= factor[block][row] * middle * sum[row];
    }
  }
}

#if !defined(__AVX512VNNI__)
// Codes widened to 16 bits once for all rows, since registers are few: [part][step][j0][even, odd byte], where
// a step has codes of four channels or tokens. Sums of four rows, a part of a vector each, fit the registers.
class WideCodes {
 public:
  WideCodes(NativeI* at, int steps) : at_(at), steps_(steps) {}

  void put(int step, const I (&codes)[2]) const {  // [j0]
    const I mask = set_i(0x00ff00ff);
    for (int j0 = 0; j0 < 2; j0++) {
      const I even = codes[j0] & mask, odd = shift_right<8>(codes[j0]) & mask;
      OSCAR_EACH {
        NativeI* out = at_ + (k * steps_ + step) * 4 + 2 * j0;
        out[0] = even.v[k], out[1] = odd.v[k];
      }
    }
  }

  // Sums over all steps; number(part, step, row, which) are the numbers of even and of odd bytes.
  template <int ROWS, class Number>
  void dot(I (&sums)[ROWS][2], Number number) const {  // [row][j0]
    const NativeI* codes = at_;
    for (int part = 0; part < kParts; part++) {
      NativeI all[ROWS][2] = {};
      for (int step = 0; step < steps_; step++, codes += 4)
        _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++) {
          const NativeI even = number(part, step, row, 0), odd = number(part, step, row, 1);
          all[row][0] = dot16(dot16(all[row][0], codes[0], even), codes[1], odd);
          all[row][1] = dot16(dot16(all[row][1], codes[2], even), codes[3], odd);
        }
      _Pragma("GCC unroll 4") for (int row = 0; row < ROWS; row++)
        sums[row][0].v[part] = all[row][0], sums[row][1].v[part] = all[row][1];
    }
  }

 private:
  NativeI* at_;
  int steps_;
};
#endif

// Logits of a row and the tokens r of two blocks, from the products of codes with j0 0 and 1.
OSCAR_INLINE void put_logits(I even, I odd, int row, int pair, int r, const float* const (&factor)[2],
                             const float* const (&offset)[2], const float* norms, float* logits) {
  I blocks[2];
  deinterleave(even, odd, blocks[0], blocks[1]);
  for (int block = 0; block < 2; block++) {
    const int token = 64 * pair + 32 * block + 16 * r;
    const F logit = fma(to_float(blocks[block]), set_f(factor[block][row]), set_f(offset[block][row]));
    store(logits + row * kGroupTokens + token, logit * load_f(norms + token));
  }
}

// Logits of 64 tokens: blocks 2 * pair, 2 * pair + 1. factor, offset: [block][row]. TWO: each block has
// a key group of its own.
#if defined(__AVX512VNNI__)
template <int BITS, bool TWO, int ROWS>
inline void dot_keys(DecodeState& d, const Shape& s, int row0, int pair, const float* const (&factor)[2],
                     const float* const (&offset)[2], const float* norms, float* logits) {
  const int stride = 4 * s.quads;
  for (int r = 0; r < 2; r++) {
    const int32_t* numbers = d.numbers + row0 * stride;
    Sum sums[ROWS][2];  // [row][j0]
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = zero_sum();
    for (int k = 0; k < s.words / 2; k++) {
      d.prefetch.advance();
      I codes[2][2];
      key_codes<BITS>(d.planes, s.words, pair, k, r, codes);
      _Pragma("GCC unroll 2") for (int j1 = 0; j1 < 2; j1++, numbers += 1 + TWO)
        _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) {
          const int32_t* n = numbers + row * stride;
          const I first = TWO ? broadcast_pair(n) : set_i(n[0]);
          const I second = TWO ? broadcast_pair(n + 2 * s.quads) : set_i(n[s.quads]);
          dot(sums[row][0], codes[j1][0], first, second);
          dot(sums[row][1], codes[j1][1], first, second);
        }
    }
    for (int row = 0; row < ROWS; row++)
      put_logits(total(sums[row][0]), total(sums[row][1]), row0 + row, pair, r, factor, offset, norms, logits);
  }
}

template <int BITS, bool TWO>
inline void pair_logits(DecodeState& d, const Shape& s, int pair, const float* const (&factor)[2],
                        const float* const (&offset)[2], const float* norms, float* logits) {
  by_rows<kRowTile>(d.rows, [&](int row, auto rows) {
    dot_keys<BITS, TWO, rows>(d, s, row, pair, factor, offset, norms, logits);
  });
}
#else
template <int BITS, bool TWO>
inline void pair_logits(DecodeState& d, const Shape& s, int pair, const float* const (&factor)[2],
                        const float* const (&offset)[2], const float* norms, float* logits) {
  const WideCodes wide(d.wide, s.words);
  for (int r = 0; r < 2; r++) {
    for (int k = 0; k < s.words / 2; k++) {
      d.prefetch.advance();
      I codes[2][2];
      key_codes<BITS>(d.planes, s.words, pair, k, r, codes);
      for (int j1 = 0; j1 < 2; j1++) wide.put(2 * k + j1, codes[j1]);
    }
    by_rows<kRowTile>(d.rows, [&](int row0, auto rows) {
      const int32_t* numbers = d.numbers + row0 * 4 * s.quads;
      const int stride = 4 * s.quads, next = (1 + TWO) * s.quads;
      I sums[rows][2];
      wide.dot<rows>(sums, [=](int, int step, int row, int which) {
        const int32_t* n = numbers + row * stride + which * next + (1 + TWO) * step;
        return TWO ? native_pair(n) : n[0] - NativeI{};
      });
      for (int row = 0; row < rows; row++)
        put_logits(sums[row][0], sums[row][1], row0 + row, pair, r, factor, offset, norms, logits);
    });
  }
}
#endif

template <int BITS>
inline void page_logits(DecodeState& d, const Shape& s, const uint8_t* page, bool first, float* logits) {
  alignas(64) float norms[kPage];
  load_norms(page, s, norms);
  constexpr float middle = middle_code(BITS);
  alignas(64) float factor[2][kMaxRows], offset[2][kMaxRows];
  KeyGroup groups[2];
  turn_keys<BITS>(page, s, d.planes);
  for (int pair = 0; pair < 2; pair++) {
    const int group[2] = {key_group_of(s, 64 * pair, first), key_group_of(s, 64 * pair + 32, first)};
    const int last = group[1] != group[0];
    if (pair == 0 || groups[0].index != group[0] || last) {
      for (int block = 0; block <= last; block++) load_key_group(groups[block], page, s, group[block], middle);
      round_queries(d, s, groups, last + 1, middle, factor, offset);
    }
    const float* const factors[2] = {factor[0], factor[last]};
    const float* const offsets[2] = {offset[0], offset[last]};
    if (last) pair_logits<BITS, true>(d, s, pair, factors, offsets, norms, logits);
    else pair_logits<BITS, false>(d, s, pair, factors, offsets, norms, logits);
  }
  if (first && s.format.first_token) {
    Quads key;
    load_quads(page + s.format.first_key, Numbers::kInt8, s, key);
    for (int row = 0; row < d.rows; row++) {
      F dot = zero_f();
      for (int i = 0; i < 4 * s.quads; i += 16)
        dot = fma(load_f(d.query + row * 4 * s.quads + i), load_f(key.v + i), dot);
      logits[row * kGroupTokens] = sum(dot) * norms[0];
    }
  }
}

// ---- softmax -----------------------------------------------------------------------------------------
// What only some models have: a cap of the logits, and tokens before a row's sliding window.
template <class Visible>
inline void cap_and_hide(const DecodeState& d, Visible visible, int padded) {
  for (int row = 0; row < d.rows; row++) {
    float* logits = d.logits + row * kGroupTokens;
    if (d.soft_cap > 0)
      for (int i = 0; i < padded; i += 16) store(logits + i, cap_logits(load_f(logits + i), d.soft_cap));
    const int begin = visible(row).begin;
    for (int i = 0; i < begin; i++) logits[i] = -__builtin_inff();
  }
}

// Logits, to base two, of the first `count` tokens to probabilities relative to the running maximum;
// zero up to `padded`.
inline void softmax(const DecodeState& d, int count, int padded) {
  const I index = lane_index();
  const F none = set_f(-__builtin_inff());
  F work[kMaxRows];
  alignas(64) float top[kMaxRows], sums[kMaxRows];
  for (int row = 0; row < d.rows; row++) {
    float* logits = d.logits + row * kGroupTokens;
    F peak = set_f(d.maximum[row]);
    for (int i = 0; i < padded; i += 16) {
      const F x = select(less(index, set_i(count - i)), load_f(logits + i), none);
      store(logits + i, x);
      peak = max(peak, x);
    }
    work[row] = peak;
  }
  reduce<true>(work, d.rows, top);
  for (int row = 0; row < d.rows; row++) {
    float* logits = d.logits + row * kGroupTokens;
    const F base = set_f(top[row] == -__builtin_inff() ? 0.0f : top[row]);
    F sum = zero_f();
    for (int i = 0; i < padded; i += 16) {
      const F p = exp2_nonpositive(load_f(logits + i) - base);
      store(logits + i, p);
      sum = sum + p;
    }
    work[row] = sum;
    d.decay[row] = 1.0f;
    if (d.maximum[row] != top[row]) {
      float lanes[kLanes];
      store(lanes, exp2_nonpositive(set_f(d.maximum[row]) - base));
      d.decay[row] = lanes[0];
    }
    d.maximum[row] = top[row];
  }
  reduce<false>(work, d.rows, sums);
  for (int row = 0; row < d.rows; row++) d.total[row] = d.total[row] * d.decay[row] + sums[row];
}

// ---- values ------------------------------------------------------------------------------------------
// seen: by any row. first: the first of the pages has a first token in 8 bits. It is left out here, but for its zero.
inline void round_probabilities(DecodeState& d, const Shape& s, const uint8_t* const* pages, Seen seen, int padded,
                                bool first) {
  const float middle = middle_code(s.format.value_bits);
  alignas(64) float scale[kMaxValueGroups * kGroupTokens], zero[kMaxValueGroups * kGroupTokens];
  for (int i = 0; i < padded; i += kPage) load_value_params(pages[i / kPage], s, kGroupTokens, scale + i, zero + i);
  for (int group = 0; group < s.value_groups; group++) {  // may be NaN, and 0 * NaN is NaN
    float *vs = scale + group * kGroupTokens, *vz = zero + group * kGroupTokens;
    for (int i = 0; i < seen.begin; i++) vs[i] = vz[i] = 0;
    for (int i = seen.end; i < padded; i++) vs[i] = vz[i] = 0;
  }
  if (d.has_first)
    for (int row = 0; row < d.rows; row++)
      for (int group = 0; group < s.value_groups; group++) d.first[row * s.value_groups + group] *= d.decay[row];
  if (first) {
    d.has_first = true;
    load_first_value(pages[0], s, d.first_value);
    for (int group = 0; group < s.value_groups; group++) {
      float& vs = scale[group * kGroupTokens];
      for (int row = 0; row < d.rows; row++) d.first[row * s.value_groups + group] = d.logits[row * kGroupTokens] * vs;
      vs = 0;
    }
  }
  for (int group = 0; group < s.value_groups; group++) {
    float *vs = scale + group * kGroupTokens, *vz = zero + group * kGroupTokens;
    for (int i = 0; i < padded; i += 16)  // now the value of the middle code
      store(vz + i, fma(load_f(vs + i), set_f(middle), load_f(vz + i)));
  }
  for (int group = 0; group < s.value_groups; group++) {
    const float *vs = scale + group * kGroupTokens, *vz = zero + group * kGroupTokens;
    F peak[kMaxRows], zeros[kMaxRows], sums[kMaxRows];
    alignas(64) float top[kMaxRows], zeros_sum[kMaxRows], sum[kMaxRows];
    for (int row = 0; row < d.rows; row++) {
      const float* p = d.logits + row * kGroupTokens;
      F most = zero_f(), total = zero_f();
      for (int i = 0; i < padded; i += 16) {
        const F x = load_f(p + i);
        most = max(most, x * load_f(vs + i));
        total = fma(x, load_f(vz + i), total);
      }
      peak[row] = most, zeros[row] = total;
    }
    reduce<true>(peak, d.rows, top);
    reduce<false>(zeros, d.rows, zeros_sum);
    for (int row = 0; row < d.rows; row++) {
      const float* p = d.logits + row * kGroupTokens;
      const F inverse = set_f(top[row] > 0 ? kLargest / top[row] : 0.0f);
      F total = zero_f();
      int32_t* out = d.probs + group * d.probs_group() + row * 16;
      for (int i = 0; i < padded; i += 64) {  // lanes (block, j1, t) of (r, half)
        I n[2][2];
        _Pragma("GCC unroll 2") for (int r = 0; r < 2; r++) {
          const int t = i + 16 * r;
          F even, odd;
          deinterleave(load_f(p + t) * load_f(vs + t), load_f(p + t + 32) * load_f(vs + t + 32), even, odd);
          n[r][0] = round_to_int(even * inverse), n[r][1] = round_to_int(odd * inverse);
        }
        total = total + to_float(n[0][0] + n[0][1] + n[1][0] + n[1][1]);
        I first, second;
        split(n[0][0], n[1][0], n[0][1], n[1][1], first, second);
        store_quarters(out + i / 32 * d.rows * 16, d.rows * 16, first, second);
      }
      sums[row] = total;
    }
    reduce<false>(sums, d.rows, sum);
    for (int row = 0; row < d.rows; row++) {
      const int slot = row * s.value_groups + group;
      d.factor[slot] = top[row] / kLargest;
      d.zeros[slot] = d.zeros[slot] * d.decay[row] + zeros_sum[row] - d.factor[slot] * middle * sum[row];
    }
  }
}

// work(codes) for each block of 32 tokens of some pages: codes of a channel pair g of each tile of a chunk.
template <int BITS, class Work>
OSCAR_INLINE void each_block(const Shape& s, const uint8_t* const* pages, int count, int chunk, int g, Work work) {
  const int width = s.width(chunk);
  const int block_bytes = 32 * s.tiles * 4;
  constexpr int kBlocks = BITS == 3 ? 2 : 4;  // that follow each other; two share upper bits of 3-bit codes
  const int64_t upper_bytes = s.format.v_high - s.format.v_codes;  // of 4-bit codes: on from the lower bits
  for (int page = 0; page < count; page++) {
    const int64_t row_of_codes = chunk * 512 + g * 16 * width;
    const uint8_t* low = pages[page] + s.format.v_codes + row_of_codes;
    const uint8_t* upper = pages[page] + s.format.v_high + row_of_codes;
    _Pragma("GCC unroll 2") for (int i = 0; i < 4 / kBlocks; i++) {
      I high = zero_i();
      if (BITS == 3) high = transpose_quarters(load_row(upper + i * block_bytes, width));
      _Pragma("GCC unroll 1") for (int block = 0; block < kBlocks; block++, low += block_bytes) {
        if (BITS == 4) high = transpose_quarters(load_row(low + upper_bytes, width));
        I codes[2][2];
        join_planes<BITS>(transpose_quarters(load_row(low, width)), high, rotate_right<2>(high), codes);
        if (BITS == 3) high = rotate_right<1>(high);
        work(codes);
      }
    }
  }
}

// Factors of a chunk's products and of what its output was, by lane.
template <int ROWS>
struct ChunkFactors {
  F product[ROWS], output[ROWS];

  OSCAR_INLINE ChunkFactors(const DecodeState& d, const Shape& s, int row0, int chunk) {
    for (int row = 0; row < ROWS; row++) {
      alignas(64) float lanes[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int of_lane = min_of(64 * chunk + 16 * (i >> 2), s.dim - 1) / s.format.value_group;
        lanes[i] = d.factor[(row0 + row) * s.value_groups + of_lane];
      }
      product[row] = load_f(lanes);
      output[row] = set_f(d.decay[row0 + row]);
    }
  }

  OSCAR_INLINE void add(int row, I products, float* out) const {
    store(out, fma(to_float(products), product[row], load_f(out) * output[row]));
  }
};

// TWO: tiles 2 and 3 of a chunk have a value group of their own.
#if defined(__AVX512VNNI__)
template <int BITS, bool TWO, int ROWS>
inline void dot_values(DecodeState& d, const Shape& s, const uint8_t* const* pages, int count, int row0, int chunk) {
  const int group = 64 * chunk / s.format.value_group, group_stride = TWO ? d.probs_group() : 0;
  const int32_t* probs = d.probs + group * d.probs_group() + row0 * 16;
  const ChunkFactors<ROWS> factors(d, s, row0, chunk);
  for (int g = 0; g < 8; g++) {
    d.prefetch.advance();
    Sum sums[ROWS][2];
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = zero_sum();
    // Not unrolled: one pointer and fixed distances are all that the registers left over can hold.
    const int32_t* p = probs;
    each_block<BITS>(s, pages, count, chunk, g, [&](const I (&codes)[2][2]) {
      _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
        _Pragma("GCC unroll 2") for (int j1 = 0; j1 < 2; j1++) {
          const int32_t* q = p + 16 * row + 8 * j1;
          const I first = repeat_quarters(q, q + group_stride);
          const I second = repeat_quarters(q + 4, q + 4 + group_stride);
          dot(sums[row][0], codes[j1][0], first, second);
          dot(sums[row][1], codes[j1][1], first, second);
        }
      p += 16 * d.rows;
    });
    for (int row = 0; row < ROWS; row++)
      for (int j0 = 0; j0 < 2; j0++) {
        float* out = d.output + (row0 + row) * s.spread() + ((chunk * 8 + g) * 2 + j0) * kLanes;
        factors.add(row, total(sums[row][j0]), out);
      }
  }
}

template <int BITS, bool TWO>
inline void chunk_values(DecodeState& d, const Shape& s, const uint8_t* const* pages, int count, int chunk) {
  by_rows<kRowTile>(d.rows, [&](int row, auto rows) { dot_values<BITS, TWO, rows>(d, s, pages, count, row, chunk); });
}
#else
template <int BITS, bool TWO>
inline void chunk_values(DecodeState& d, const Shape& s, const uint8_t* const* pages, int count, int chunk) {
  const int group = 64 * chunk / s.format.value_group, group_stride = TWO ? d.probs_group() : 0;
  const WideCodes wide(d.wide, 8 * count);
  for (int g = 0; g < 8; g++) {
    d.prefetch.advance();
    int step = 0;
    each_block<BITS>(s, pages, count, chunk, g, [&](const I (&codes)[2][2]) {
      for (int j1 = 0; j1 < 2; j1++) wide.put(step++, codes[j1]);
    });
    by_rows<kRowTile>(d.rows, [&](int row0, auto rows) {
      const int32_t* probs = d.probs + group * d.probs_group() + row0 * 16;
      const int block_stride = 16 * d.rows;
      I sums[rows][2];
      wide.dot<rows>(sums, [=](int part, int step, int row, int which) {
        const int upper = part * kPartLanes < kLanes / 2 ? 0 : group_stride;
        return native_quarter(probs + upper + (step >> 1) * block_stride + 16 * row + 8 * (step & 1) + 4 * which);
      });
      const ChunkFactors<rows> factors(d, s, row0, chunk);
      for (int row = 0; row < rows; row++)
        for (int j0 = 0; j0 < 2; j0++)
          factors.add(row, sums[row][j0], d.output + (row0 + row) * s.spread() + ((chunk * 8 + g) * 2 + j0) * kLanes);
    });
  }
}
#endif

template <int BITS>
inline void page_values(DecodeState& d, const Shape& s, const uint8_t* const* pages, int count) {
  for (int chunk = 0; chunk < s.chunks; chunk++) {
    if (s.format.value_group == 32 && s.width(chunk) > 2) chunk_values<BITS, true>(d, s, pages, count, chunk);
    else chunk_values<BITS, false>(d, s, pages, count, chunk);
  }
}

// A group of pages for all rows, of which row 0 sees the earliest tokens. `next`: pages to come.
template <class Visible>
inline void decode_pages(DecodeState& d, const Shape& s, const uint8_t* const* pages, int count, bool first,
                         Visible visible, const uint8_t* const* next, int next_count) {
  const Seen seen = visible(0);
  d.prefetch.begin(next, next_count, s.format.page_bytes, 8 * s.chunks + 2 * s.words * count);
  with_bits(s.format.key_bits, [&](auto bits) {
    for (int i = 0; i < count; i++) page_logits<bits>(d, s, pages[i], first && i == 0, d.logits + i * kPage);
  });
  if (visible(d.rows - 1).begin > 0 || d.soft_cap > 0) cap_and_hide(d, visible, count * kPage);
  softmax(d, seen.end, count * kPage);
  round_probabilities(d, s, pages, seen, count * kPage, first && s.format.first_token);
  with_bits(s.format.value_bits, [&](auto bits) { page_values<bits>(d, s, pages, count); });
}

// Rotated output [row][dim], not normalised.
inline void end_decode(const DecodeState& d, const Shape& s, float* out) {
  for (int row = 0; row < d.rows; row++)
    for (int chunk = 0; chunk < s.chunks; chunk++) {
      I lanes[16];  // [g][j0], then [tile][t]
      for (int i = 0; i < 16; i++) lanes[i] = load_i(d.output + row * s.spread() + (chunk * 16 + i) * kLanes);
      transpose16(lanes);
      for (int i = 0; i < s.width(chunk); i++) {
        const int channel = 16 * (4 * chunk + i);
        const I* t = lanes + 4 * i;
        const F sum = as_float(t[0]) + as_float(t[1]) + (as_float(t[2]) + as_float(t[3]));
        const int slot = row * s.value_groups + channel / s.format.value_group;
        F all = even_then_odd(sum) + set_f(d.zeros[slot]);
        if (d.has_first) all = fma(set_f(d.first[slot]), load_f(d.first_value + channel), all);
        store(out + row * s.dim + channel, all);
      }
    }
}

}  // namespace
