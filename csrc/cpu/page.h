// SPDX-License-Identifier: Apache-2.0
// Reading a page (vllm_oscar/core/format.py): shape, parameters, code planes.
#pragma once

#include "oscar/step.h"
#include "scratch.h"
#include "simd.h"

namespace {

constexpr int kPage = oscar::kPageTokens;
constexpr int kMaxDim = 256;
constexpr int kMaxValueGroups = kMaxDim / 32;

// Where channel c of a pair-ordered row is: pair index and half.
inline int pair_of(int channel, int tiles) {
  const int tile = channel >> 4, b = (channel >> 3) & 1, t = (channel >> 1) & 3;
  return (t * tiles + tile) * 2 + b;
}

struct Shape {
  explicit Shape(const OscarFormat& f)
      : format(f), dim(f.head_dim), tiles(dim / 16), chunks((tiles + 3) / 4), words(dim / 4),
        quads((words + 15) / 16 * 16), key_groups(kPage / f.key_group),
        value_groups((dim + f.value_group - 1) / f.value_group) {
    for (int c = 0; c < dim; c++) {
      const int pair = pair_of(c, tiles);
      place[c] = static_cast<int16_t>(((c & 1) * 2 + ((pair >> 1) & 1)) * quads + (pair >> 2) * 2 + (pair & 1));
    }
  }

  const OscarFormat& format;
  int dim, tiles, chunks;  // chunks of four 16-channel tiles
  int words;               // key words per token lane: a word has four channels of a token
  int quads;               // as many, rounded up to whole vectors: see Quads
  int key_groups, value_groups;
  int16_t place[kMaxDim];  // of a channel among quads

  int width(int chunk) const { return min_of(4, tiles - 4 * chunk); }
  // Floats of one row's output while lanes still hold partial sums.
  int spread() const { return chunks * 16 * kLanes; }
};

// Numbers by channel in the order in which key codes are multiplied: a byte of codes each of two
// words 2k, 2k + 1 and both halves make a quad, 2k + j1. The four members of the quads are kept apart:
// [half][word][quads]. Quads beyond head_dim / 4 are zero.
struct Quads {
  alignas(64) float v[kMaxDim];
};

inline void load_quads(const uint8_t* p, int bytes, const Shape& s, Quads& out) {
  // A last part of a vector must not pick up what follows: it may be NaN.
  alignas(64) uint8_t padded[2 * kMaxDim];
  if (s.quads != s.words) {
    memcpy(padded, p, s.dim * bytes);
    memset(padded + s.dim * bytes, 0, (4 * s.quads - s.dim) * bytes);
    p = padded;
  }
  for (int i = 0; i < s.quads; i += 16) {
    F v[4];
    if (bytes == 1) load_quads_e4m3(p + 4 * i, v);
    else load_quads_fp16(p + 8 * i, v);
    for (int m = 0; m < 4; m++) store(out.v + m * s.quads + i, v[m]);
  }
}

// ---- parameters of tokens, in token order -----------------------------------------------------
inline void load_norms(const uint8_t* page, const Shape& s, float* norms) {
  if (s.format.norm == OSCAR_NORM_NONE) {
    for (int i = 0; i < kPage; i++) norms[i] = 1.0f;
    return;
  }
  const uint8_t* p = page + s.format.norms;
  for (int i = 0; i < kPage; i += 32) {  // two tiles of 16 tokens, [g][j0] each
    const I raw = load_i(p + 2 * i);
    store(norms + i, even_then_odd(fp16_half<false>(raw)));
    store(norms + i + 16, even_then_odd(fp16_half<true>(raw)));
  }
}

// Value scales and zeros: [group][token], groups `stride` apart.
inline void load_value_params(const uint8_t* page, const Shape& s, int stride, float* scale, float* zero) {
  const int groups = s.value_groups;
  const uint8_t *ps = page + s.format.v_scale, *pz = page + s.format.v_zero;
  for (int group = 0; group < groups; group++)
    for (int i = 0; i < kPage; i += 32) {  // two tiles of 16 tokens: pairs of tokens [t][b] each
      I raw[2];
      if (groups == 1) {
        raw[0] = load_i(ps + 2 * i), raw[1] = load_i(pz + 2 * i);
      } else {
        const int tile = i / 16;
        const uint8_t *scales = ps + 8 * (4 * tile * groups + group), *zeros = pz + 32 * (tile * groups + group);
        raw[0] = gather_pairs(scales, scales + 32 * groups, 8 * groups);
        raw[1] = gather_pairs(zeros, zeros + 32 * groups, 8);
      }
      for (int which = 0; which < 2; which++) {
        const I ordered = even_then_odd_by_8(raw[which]);
        float* out = (which ? zero : scale) + group * stride + i;
        store(out, fp16_half<false>(ordered));
        store(out + 16, fp16_half<true>(ordered));
      }
    }
}

inline int key_group_of(const Shape& s, int token, bool first_page) {
  return first_page && s.format.exact_first_key ? 0 : token / s.format.key_group;
}

// ---- key codes -----------------------------------------------------------------------------------
// Words are turned so that a vector has the words of 16 tokens at t, tile: word t * tiles + tile, lane
// 2 * g + block. Bytes of two words are then put together by r, so that a byte of a lane has codes of
// one token row: [64-token half][word / 2][r]. Upper bits follow in the same way; those of 3-bit keys
// serve both halves, [word / 2][r] with lane 2 * g + half.
template <int BITS>
constexpr int planes_per_word() { return BITS == 2 ? 2 : BITS == 3 ? 3 : 4; }

// Bytes (half, r) of two words to bytes (half, word) of r = 0 and of r = 1.
OSCAR_INLINE void join_words(I a, I b, I* out) {
  const I even = set_i(0x00ff00ff);
  out[0] = merge_bits(even, a, shift_left<8>(b));
  out[1] = merge_bits(even, shift_right<8>(a), b);
}

// Turn 16 rows, two for each g, `stride` bytes apart. UPPER: undo their rotation by two bits.
template <bool UPPER>
OSCAR_INLINE void turn_words(const uint8_t* rows, int64_t stride, int width, int tiles, I* out) {
  I r[16];
  _Pragma("GCC unroll 8") for (int g = 0; g < 8; g++) {
    r[2 * g] = load_row(rows + g * 16 * width, width);
    r[2 * g + 1] = load_row(rows + g * 16 * width + stride, width);
  }
  transpose16(r);
  if (UPPER) _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) r[i] = rotate_right<2>(r[i]);
  _Pragma("GCC unroll 4") for (int t = 0; t < 4; t++)
    _Pragma("GCC unroll 2") for (int i = 0; i < 4; i += 2) {
      if (tiles & 1) {
        if (i < width) out[t * tiles + i] = r[4 * t + i];
        if (i + 1 < width) out[t * tiles + i + 1] = r[4 * t + i + 1];
      } else if (i < width) {
        join_words(r[4 * t + i], r[4 * t + i + 1], out + t * tiles + i);
      }
    }
}

template <bool UPPER>
inline void turn_plane(const uint8_t* rows, const Shape& s, I* out) {
  const int64_t block_bytes = 32 * s.tiles * 4;
  for (int chunk = 0; chunk < s.chunks; chunk++) {
    if (s.width(chunk) == 4) turn_words<UPPER>(rows + 512 * chunk, block_bytes, 4, s.tiles, out + 4 * chunk);
    else turn_words<UPPER>(rows + 512 * chunk, block_bytes, s.width(chunk), s.tiles, out + 4 * chunk);
  }
  if (s.tiles & 1)  // words 2k, 2k + 1 may be of different chunks
    for (int i = 0; i < s.words; i += 2) join_words(out[i], out[i + 1], out + i);
}

template <int BITS>
inline void turn_keys(const uint8_t* page, const Shape& s, I* planes) {
  const int64_t pair_bytes = 2 * 32 * s.tiles * 4;
  const uint8_t *low = page + s.format.k_codes, *high = page + s.format.k_high;
  turn_plane<false>(low, s, planes);
  turn_plane<false>(low + pair_bytes, s, planes + s.words);
  if (BITS > 2) turn_plane<true>(high, s, planes + 2 * s.words);
  if (BITS > 3) turn_plane<true>(high + pair_bytes, s, planes + 3 * s.words);
}

// Codes of quads 2k and 2k + 1, tokens r, of a 64-token half: codes[j1][j0], a byte each.
template <int BITS>
OSCAR_INLINE void key_codes(const I* planes, int words, int half, int k, int r, I (&codes)[2][2]) {
  const I low = planes[half * words + 2 * k + r];
  I even = low, odd = shift_right<2>(low);
  if (BITS > 2) {  // slots two apart leave room for the upper bits between them
    I high;
    if (BITS == 4) {
      high = planes[(2 + half) * words + 2 * k + r];
    } else {
      const I both = planes[2 * words + 2 * k + r];
      high = shift_odd_lanes(half ? repeat_pairs<true>(both) : repeat_pairs<false>(both));
    }
    even = merge_bits(set_i(0x33333333), even, shift_left<2>(high));
    odd = merge_bits(set_i(0x33333333), odd, high);
  }
  const I mask = set_i(BITS == 2 ? 0x03030303 : BITS == 3 ? 0x07070707 : 0x0f0f0f0f);
  codes[0][0] = even & mask;
  codes[0][1] = odd & mask;
  codes[1][0] = shift_right<4>(even) & mask;
  codes[1][1] = shift_right<4>(odd) & mask;
}

// ---- the whole page, for many query rows --------------------------------------------------------
// What a page has per token: key norms, and value scales and zeros [group][token].
struct TokenParams {
  alignas(64) float norms[kPage], v_scale[kMaxValueGroups * kPage], v_zero[kMaxValueGroups * kPage];

  // Tokens from `count` on are zero.
  TokenParams(const uint8_t* page, const Shape& s, int count) {
    load_norms(page, s, norms);
    load_value_params(page, s, kPage, v_scale, v_zero);
    for (int i = count; i < kPage; i++) {
      norms[i] = 0;
      for (int group = 0; group < s.value_groups; group++) v_scale[group * kPage + i] = v_zero[group * kPage + i] = 0;
    }
  }
};

constexpr float kMiddleCode = 1.5f;  // of values

// keys: [dim][128] (transposed), values: [128][dim], rotated space. Tokens from `count` on are zero.
// Without WHOLE, keys lack their norms and values are codes less kMiddleCode.
template <int BITS, bool WHOLE>
inline void dequantize_page(const uint8_t* page, const Shape& s, bool first, int count, const TokenParams& params,
                            I* planes, float* keys, float* values) {
  Quads scale, zero;
  int loaded = -1;
  const I index = lane_index();
  turn_keys<BITS>(page, s, planes);
  for (int pair = 0; pair < 2; pair++) {
    for (int block = 0; block < 2; block++) {
      const int begin = 64 * pair + 32 * block;
      const int group = key_group_of(s, begin, first);
      if (group != loaded) {
        const uint8_t* p = page + s.format.k_params + group * 2 * s.dim * s.format.key_param_bytes;
        load_quads(p, s.format.key_param_bytes, s, scale);
        load_quads(p + s.dim * s.format.key_param_bytes, s.format.key_param_bytes, s, zero);
        loaded = group;
      }
      for (int r = 0; r < 2; r++) {
        const int token = begin + 16 * r;
        const F norm = WHOLE ? load_f(params.norms + token) : set_f(1.0f);
        const I valid = less(index, set_i(count - token));
        for (int k = 0; k < s.words / 2; k++) {
          I c[2][2];  // [j1][j0]
          key_codes<BITS>(planes, s.words, pair, k, r, c);
          for (int j1 = 0; j1 < 2; j1++) {
            I blocks[2];
            deinterleave(c[j1][0], c[j1][1], blocks[0], blocks[1]);
            I codes = blocks[block];
            for (int m = 0; m < 4; m++, codes = shift_right<8>(codes)) {  // m: half, word
              const int word = 2 * k + (m & 1), place = m * s.quads + 2 * k + j1;
              const int channel = 16 * (word % s.tiles) + 8 * j1 + 2 * (word / s.tiles) + (m >> 1);
              const F key = fma(to_float(codes & set_i(0xff)), set_f(scale.v[place]), set_f(zero.v[place])) * norm;
              store(keys + channel * kPage + token, select(valid, key, zero_f()));
            }
          }
        }
      }
    }
  }
  if (first && s.format.exact_first_key && count) {
    Quads exact;
    load_quads(page + s.format.k_params + 2 * s.dim * s.format.key_param_bytes, 2, s, exact);
    for (int c = 0; c < s.dim; c++) keys[c * kPage] = exact.v[s.place[c]] * (WHOLE ? params.norms[0] : 1.0f);
  }

  // A word has one channel of tokens 16r + 8*j1 + 2t + half in slots (half, r, j1, j0).
  for (int block = 0; block < 4; block++)
    for (int chunk = 0; chunk < s.chunks; chunk++) {
      const int width = s.width(chunk);
      const uint8_t* p = page + s.format.v_codes + (block * 32 * s.tiles + chunk * 128) * 4;
      for (int t = 0; t < 4; t++)
        for (int i = 0; i < width; i++) {
          const int channel = 16 * (4 * chunk + i), group = channel / s.format.value_group;
          alignas(64) uint32_t lanes[kLanes];  // channel 8*j0 + g: the two halves share a word
          for (int g = 0; g < 8; g++) memcpy(lanes + g, p + ((4 * g + t) * width + i) * 4, 4);
          for (int g = 0; g < 8; g++) lanes[g + 8] = lanes[g] >> 2;
          const I w = load_i(lanes);
          const float *vs = params.v_scale + group * kPage, *vz = params.v_zero + group * kPage;
          const auto put = [&](int token, I codes) {
            F v = to_float(codes & set_i(3));
            v = WHOLE ? fma(v, set_f(vs[token]), set_f(vz[token])) : v - set_f(kMiddleCode);
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
