// SPDX-License-Identifier: Apache-2.0
// Reading a page (vllm_oscar/format.py): shape, parameters, code planes.
#pragma once

#include "oscar_cpu.h"
#include "scratch.h"
#include "simd.h"

namespace {

constexpr int kPage = 128;  // tokens
constexpr int kMaxDim = 256;
constexpr int kMaxValueGroups = kMaxDim / 32;

struct Shape {
  explicit Shape(const OscarArgs& a)
      : args(a), dim(a.head_dim), tiles(dim / 16), chunks((tiles + 3) / 4), words(dim / 4),
        half(dim / 2), half_padded((half + 15) / 16 * 16), key_groups(kPage / a.key_group),
        value_groups((dim + a.value_group - 1) / a.value_group) {}

  const OscarArgs& args;
  int dim, tiles, chunks;  // chunks of four 16-channel tiles
  int words;               // key words per token lane: a word has four channels of a token
  int half, half_padded;   // channel pairs
  int key_groups, value_groups;

  int width(int chunk) const { return min_of(4, tiles - 4 * chunk); }
  // Floats of one row's output while lanes still hold partial sums.
  int spread() const { return chunks * 16 * kLanes; }
};

// Key parameters come as channel pairs; the two channels of a pair are kept apart, so that
// a vector of pairs packs without shuffles. Pairs beyond head_dim / 2 are zero.
struct Pairs {
  alignas(64) float low[kMaxDim / 2], high[kMaxDim / 2];
};

inline void load_pairs(const uint8_t* p, int bytes, const Shape& s, Pairs& out) {
  // A last half vector must not pick up what follows: it may be NaN.
  alignas(64) uint8_t padded[2 * kMaxDim];
  if (s.half_padded != s.half) {
    memcpy(padded, p, s.dim * bytes);
    memset(padded + s.dim * bytes, 0, (2 * s.half_padded - s.dim) * bytes);
    p = padded;
  }
  for (int i = 0; i < s.half_padded; i += 16) {
    F a, b, low, high;
    if (bytes == 1) {
      a = load_e4m3(p + 2 * i), b = load_e4m3(p + 2 * i + 16);
    } else {
      const I raw = load_i(p + 4 * i);
      a = fp16_half<false>(raw), b = fp16_half<true>(raw);
    }
    deinterleave(a, b, low, high);
    store(out.low + i, low);
    store(out.high + i, high);
  }
}

// Where channel c of a pair-ordered row is: pair index and half.
inline int pair_of(int channel, int tiles) {
  const int tile = channel >> 4, b = (channel >> 3) & 1, t = (channel >> 1) & 3;
  return (t * tiles + tile) * 2 + b;
}

// ---- parameters of tokens, in token order -----------------------------------------------------
inline void load_norms(const uint8_t* page, const Shape& s, float* norms) {
  if (s.args.norm == OSCAR_NORM_NONE) {
    for (int i = 0; i < kPage; i++) norms[i] = 1.0f;
    return;
  }
  const uint8_t* p = page + s.args.norms;
  for (int i = 0; i < kPage; i += 32) {  // two tiles of 16 tokens, [g][j0] each
    const I raw = load_i(p + 2 * i);
    store(norms + i, even_then_odd(fp16_half<false>(raw)));
    store(norms + i + 16, even_then_odd(fp16_half<true>(raw)));
  }
}

// Value scales and zeros: [group][token].
inline void load_value_params(const uint8_t* page, const Shape& s, float* scale, float* zero) {
  const int groups = s.value_groups;
  const uint8_t *ps = page + s.args.v_scale, *pz = page + s.args.v_zero;
  for (int group = 0; group < groups; group++)
    for (int i = 0; i < kPage; i += 32) {  // two tiles of 16 tokens: pairs of tokens [t][b] each
      I raw[2];
      if (groups == 1) {
        raw[0] = load_i(ps + 2 * i), raw[1] = load_i(pz + 2 * i);
      } else {
        alignas(64) uint32_t pairs[2][kLanes];
        for (int j = 0; j < kLanes; j++) {
          const int tile = i / 16 + (j >> 3), t = (j >> 1) & 3, b = j & 1;
          memcpy(&pairs[0][j], ps + 4 * (((tile * 4 + t) * groups + group) * 2 + b), 4);
          memcpy(&pairs[1][j], pz + 4 * (((tile * groups + group) * 4 + t) * 2 + b), 4);
        }
        raw[0] = load_i(pairs[0]), raw[1] = load_i(pairs[1]);
      }
      for (int which = 0; which < 2; which++) {
        const I ordered = even_then_odd_by_8(raw[which]);
        float* out = (which ? zero : scale) + group * kPage + i;
        store(out, fp16_half<false>(ordered));
        store(out + 16, fp16_half<true>(ordered));
      }
    }
}

inline int key_group_of(const Shape& s, int token, bool first_page) {
  return first_page && s.args.exact_first_key ? 0 : token / s.args.key_group;
}

// ---- key codes -----------------------------------------------------------------------------------
// Words are turned so that a vector has one channel pair of 16 tokens: word t * tiles + tile,
// lane 2 * g + block. One plane of each 64-token half: [half][word]; then the upper plane of
// 4-bit codes likewise, or of 3-bit codes [word], lane 2 * g + half, serving two blocks.
template <int BITS>
constexpr int planes_per_word() { return BITS == 2 ? 2 : BITS == 3 ? 3 : 4; }

// Turn 16 rows, two for each g, `stride` bytes apart.
OSCAR_INLINE void turn_words(const uint8_t* rows, int64_t stride, int width, int tiles, I* out) {
  I r[16];
  _Pragma("GCC unroll 8") for (int g = 0; g < 8; g++) {
    r[2 * g] = load_row(rows + g * 16 * width, width);
    r[2 * g + 1] = load_row(rows + g * 16 * width + stride, width);
  }
  transpose16(r);
  _Pragma("GCC unroll 4") for (int t = 0; t < 4; t++)
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
      if (i < width) store(out + t * tiles + i, r[4 * t + i]);
}

template <int BITS>
inline void turn_keys(const uint8_t* page, const Shape& s, I* planes) {
  const int64_t block_bytes = 32 * s.tiles * 4;
  const uint8_t *low = page + s.args.k_codes, *high = page + s.args.k_high;
  for (int chunk = 0; chunk < s.chunks; chunk++)
    for (int plane = 0; plane < planes_per_word<BITS>(); plane++) {
      const uint8_t* rows = (plane < 2 ? low + 2 * plane * block_bytes : high + 2 * (plane - 2) * block_bytes) + 512 * chunk;
      I* out = planes + plane * s.words + 4 * chunk;
      if (s.width(chunk) == 4) turn_words(rows, block_bytes, 4, s.tiles, out);
      else turn_words(rows, block_bytes, s.width(chunk), s.tiles, out);
    }
}

// The words of a channel pair of one half, planes lined up: keys of shift 8 * r.
template <int BITS>
struct KeyWord {
  I low, high;
};
template <int BITS>
OSCAR_INLINE KeyWord<BITS> key_word(const I* planes, int words, int half, int word) {
  KeyWord<BITS> w;
  w.low = planes[half * words + word];
  if (BITS == 4) w.high = planes[(2 + half) * words + word];
  if (BITS == 3) {
    const I both = planes[2 * words + word];
    w.high = rotate_odd_lanes(half ? repeat_pairs<true>(both) : repeat_pairs<false>(both));
  }
  return w;
}

// Codes (r, j1, j0), as pairs of 16-bit integers: codes[j1][j0].
template <int BITS, int R>
OSCAR_INLINE void key_codes(const KeyWord<BITS>& w, I (&codes)[2][2]) {
  if (BITS == 2) {
    const I mask = set_i(0x00030003);
    codes[0][0] = shift_right<8 * R>(w.low) & mask;
    codes[0][1] = shift_right<8 * R + 2>(w.low) & mask;
    codes[1][0] = shift_right<8 * R + 4>(w.low) & mask;
    codes[1][1] = shift_right<8 * R + 6>(w.low) & mask;
    return;
  }
  // Slots two apart leave room for the upper bits between them.
  const I low = R ? shift_right<8>(w.low) : w.low, high = R ? rotate_right<8>(w.high) : w.high;
  const I even = merge_bits(set_i(0x00330033), low, high), odd = merge_bits(set_i(0x00cc00cc), low, high);
  const I mask = set_i(BITS == 3 ? 0x00070007 : 0x000f000f);
  codes[0][0] = even & mask;
  codes[0][1] = shift_right<2>(odd) & mask;
  codes[1][0] = shift_right<4>(even) & mask;
  codes[1][1] = shift_right<6>(odd) & mask;
}

// ---- the whole page, for many query rows --------------------------------------------------------
// keys: [dim][128] (transposed), values: [128][dim], rotated space. Tokens from `count` on are zero.
template <int BITS>
inline void dequantize_page(const uint8_t* page, const Shape& s, bool first, int count, I* planes, float* keys,
                            float* values) {
  alignas(64) float norms[kPage], v_scale[kMaxValueGroups * kPage], v_zero[kMaxValueGroups * kPage];
  load_norms(page, s, norms);
  load_value_params(page, s, v_scale, v_zero);
  for (int i = count; i < kPage; i++) norms[i] = 0;
  Pairs scale, zero;
  int loaded = -1;
  const I index = lane_index();
  turn_keys<BITS>(page, s, planes);
  for (int pair = 0; pair < 2; pair++) {
    for (int block = 0; block < 2; block++) {
      const int begin = 64 * pair + 32 * block;
      const int group = key_group_of(s, begin, first);
      if (group != loaded) {
        const uint8_t* p = page + s.args.k_params + group * 2 * s.dim * s.args.key_param_bytes;
        load_pairs(p, s.args.key_param_bytes, s, scale);
        load_pairs(p + s.dim * s.args.key_param_bytes, s.args.key_param_bytes, s, zero);
        loaded = group;
      }
      for (int r = 0; r < 2; r++) {
        const int token = begin + 16 * r;
        const F norm = load_f(norms + token);
        const I valid = less(index, set_i(count - token));
        for (int t = 0; t < 4; t++)
          for (int tile = 0; tile < s.tiles; tile++) {
            const int word = t * s.tiles + tile;
            I c[2][2];  // [j1][j0]
            const KeyWord<BITS> w = key_word<BITS>(planes, s.words, pair, word);
            if (r == 0) key_codes<BITS, 0>(w, c);
            else key_codes<BITS, 1>(w, c);
            for (int j1 = 0; j1 < 2; j1++) {
              I blocks[2];
              deinterleave(c[j1][0], c[j1][1], blocks[0], blocks[1]);
              const I codes = blocks[block];
              const int p = 2 * word + j1, channel = 16 * tile + 8 * j1 + 2 * t;
              const F low = to_float(codes & set_i(0xffff)), high = to_float(shift_right<16>(codes));
              const F a = fma(low, set_f(scale.low[p]), set_f(zero.low[p])) * norm;
              const F b = fma(high, set_f(scale.high[p]), set_f(zero.high[p])) * norm;
              store(keys + channel * kPage + token, select(valid, a, zero_f()));
              store(keys + (channel + 1) * kPage + token, select(valid, b, zero_f()));
            }
          }
      }
    }
  }
  if (first && s.args.exact_first_key && count) {
    Pairs exact;
    load_pairs(page + s.args.k_params + 2 * s.dim * s.args.key_param_bytes, 2, s, exact);
    for (int c = 0; c < s.dim; c++) {
      const int p = pair_of(c, s.tiles);
      keys[c * kPage] = (c & 1 ? exact.high[p] : exact.low[p]) * norms[0];
    }
  }

  // A word has one channel of tokens 16r + 8*j1 + 2t + half in slots (half, r, j1, j0).
  for (int block = 0; block < 4; block++)
    for (int chunk = 0; chunk < s.chunks; chunk++) {
      const int width = s.width(chunk);
      const uint8_t* p = page + s.args.v_codes + (block * 32 * s.tiles + chunk * 128) * 4;
      for (int t = 0; t < 4; t++)
        for (int i = 0; i < width; i++) {
          const int channel = 16 * (4 * chunk + i), group = channel / s.args.value_group;
          alignas(64) uint32_t lanes[kLanes];  // channel 8*j0 + g: the two halves share a word
          for (int g = 0; g < 8; g++) memcpy(lanes + g, p + ((4 * g + t) * width + i) * 4, 4);
          for (int g = 0; g < 8; g++) lanes[g + 8] = lanes[g] >> 2;
          const I w = load_i(lanes);
          const float *vs = v_scale + group * kPage, *vz = v_zero + group * kPage;
          const auto put = [&](int token, I codes) {
            F v = zero_f();
            if (token < count) v = fma(to_float(codes & set_i(3)), set_f(vs[token]), set_f(vz[token]));
            store(values + token * s.dim + channel, v);
          };
          const int token = 32 * block + 2 * t;
          put(token, w);
          put(token + 1, shift_right<16>(w));
          put(token + 8, shift_right<4>(w));
          put(token + 9, shift_right<20>(w));
          put(token + 16, shift_right<8>(w));
          put(token + 17, shift_right<24>(w));
          put(token + 24, shift_right<12>(w));
          put(token + 25, shift_right<28>(w));
        }
    }
}

}  // namespace
