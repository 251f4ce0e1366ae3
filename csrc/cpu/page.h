// SPDX-License-Identifier: Apache-2.0
// Reading a page (vllm_oscar/core/format.py): shape, parameters, code planes.
#pragma once

#include <type_traits>

#include "oscar/step.h"
#include "scratch.h"
#include "simd.h"
#include "softmax.h"

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

enum class Numbers { kE4m3, kFp16, kInt8 };

inline void load_quads(const uint8_t* p, Numbers type, const Shape& s, Quads& out) {
  const int bytes = type == Numbers::kFp16 ? 2 : 1;
  // A last part of a vector must not pick up what follows: it may be NaN.
  alignas(64) uint8_t padded[2 * kMaxDim];
  if (s.quads != s.words) {
    memcpy(padded, p, s.dim * bytes);
    memset(padded + s.dim * bytes, 0, (4 * s.quads - s.dim) * bytes);
    p = padded;
  }
  for (int i = 0; i < s.quads; i += 16) {
    F v[4];
    if (type == Numbers::kE4m3) load_quads_e4m3(p + 4 * i, v);
    else if (type == Numbers::kInt8) load_quads_int8(p + 4 * i, v);
    else load_quads_fp16(p + 8 * i, v);
    for (int m = 0; m < 4; m++) store(out.v + m * s.quads + i, v[m]);
  }
}

inline void load_key_params(const uint8_t* page, const Shape& s, int group, Quads& scale, Quads& zero) {
  const int bytes = s.format.key_param_bytes;
  const Numbers type = bytes == 1 ? Numbers::kE4m3 : Numbers::kFp16;
  const uint8_t* p = page + s.format.k_params + group * 2 * s.dim * bytes;
  load_quads(p, type, s, scale);
  load_quads(p + s.dim * bytes, type, s, zero);
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
  return first_page && s.format.first_token ? 0 : token / s.format.key_group;
}

// The first token's value, by channel: what its value scales multiply.
inline void load_first_value(const uint8_t* page, const Shape& s, float* out) {
  const uint8_t* p = page + s.format.first_value;
  for (int g = 0; g < 8; g++)
    for (int tile = 0; tile < s.tiles; tile++)
      for (int j0 = 0; j0 < 2; j0++) out[16 * tile + 8 * j0 + g] = *p++;
}

// ---- codes ---------------------------------------------------------------------------------------
// Calls work(std::integral_constant<int, bits>()): what reads codes is compiled for each width.
template <class Work>
inline void with_bits(int bits, Work work) {
  if (bits == 2) work(std::integral_constant<int, 2>());
  else if (bits == 3) work(std::integral_constant<int, 3>());
  else work(std::integral_constant<int, 4>());
}

constexpr float middle_code(int bits) { return ((1 << bits) - 1) / 2.0f; }

// Codes of the slots (j1, j0) of a word, a byte each. Upper bits are two bits further up, at even slots
// and at odd ones: slots two apart leave room for them.
template <int BITS>
OSCAR_INLINE void join_planes(I low, I high_even, I high_odd, I (&codes)[2][2]) {
  I even = low, odd = shift_right<2>(low);
  if (BITS > 2) {
    even = merge_bits(set_i(0x33333333), even, high_even);
    odd = merge_bits(set_i(0x33333333), odd, high_odd);
  }
  const I mask = set_i(BITS == 2 ? 0x03030303 : BITS == 3 ? 0x07070707 : 0x0f0f0f0f);
  codes[0][0] = even & mask;
  codes[0][1] = odd & mask;
  codes[1][0] = shift_right<4>(even) & mask;
  codes[1][1] = shift_right<4>(odd) & mask;
}

// ---- key codes -----------------------------------------------------------------------------------
// Words are turned so that a vector has the words of 16 tokens at t, tile: word t * tiles + tile, lane
// 2 * g + block. Bytes of two words are then put together by r, so that a byte of a lane has codes of
// one token row: [64-token half][word / 2][r]. Upper bits follow in the same way; those of 3-bit keys
// serve both halves, [word / 2][r] with lane 2 * g + half.
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
  I high = zero_i();
  if (BITS == 4) {
    high = planes[(2 + half) * words + 2 * k + r];
  } else if (BITS == 3) {
    const I both = planes[2 * words + 2 * k + r];
    high = shift_odd_lanes(half ? repeat_pairs<true>(both) : repeat_pairs<false>(both));
  }
  join_planes<BITS>(planes[half * words + 2 * k + r], shift_left<2>(high), high, codes);
}

// ---- the whole page, for many query rows --------------------------------------------------------
// What a page has per token: key norms, and value scales and zeros [group][token].
struct TokenParams {
  alignas(64) float norms[kPage], v_scale[kMaxValueGroups * kPage], v_zero[kMaxValueGroups * kPage];
  alignas(64) float first_value[kMaxDim];  // by channel
  const bool has_first;                    // the page has a first token in 8 bits

  // Tokens that are not seen are zero.
  TokenParams(const uint8_t* page, const Shape& s, bool first, Seen seen)
      : has_first(first && s.format.first_token) {
    if (has_first) load_first_value(page, s, first_value);
    load_norms(page, s, norms);
    load_value_params(page, s, kPage, v_scale, v_zero);
    const auto hide = [&](int i) {
      norms[i] = 0;
      for (int group = 0; group < s.value_groups; group++) v_scale[group * kPage + i] = v_zero[group * kPage + i] = 0;
    };
    for (int i = 0; i < seen.begin; i++) hide(i);
    for (int i = seen.end; i < kPage; i++) hide(i);
  }
};

// Keys [dim][128] (transposed), rotated space. Tokens from `count` on are zero. Without WHOLE they lack their norms.
template <int BITS, bool WHOLE>
inline void dequantize_keys(const uint8_t* page, const Shape& s, bool first, int count, const TokenParams& params,
                            I* planes, float* keys) {
  Quads scale, zero;
  int loaded = -1;
  const I index = lane_index();
  turn_keys<BITS>(page, s, planes);
  for (int pair = 0; pair < 2; pair++) {
    for (int block = 0; block < 2; block++) {
      const int begin = 64 * pair + 32 * block;
      const int group = key_group_of(s, begin, first);
      if (group != loaded) {
        load_key_params(page, s, group, scale, zero);
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
  if (params.has_first) {
    Quads exact;
    load_quads(page + s.format.first_key, Numbers::kInt8, s, exact);
    for (int c = 0; c < s.dim; c++) keys[c * kPage] = exact.v[s.place[c]] * (WHOLE ? params.norms[0] : 1.0f);
  }
}

// Values [128][dim], rotated space, but for what TokenParams::first_value adds. Without WHOLE, codes less the
// middle one.
template <int BITS, bool WHOLE>
inline void dequantize_values(const uint8_t* page, const Shape& s, const TokenParams& params, float* values) {
  // A word has one channel of tokens 16r + 8*j1 + 2t + half in slots (half, r, j1, j0).
  for (int block = 0; block < 4; block++)
    for (int chunk = 0; chunk < s.chunks; chunk++) {
      const int width = s.width(chunk);
      const int64_t block_bytes = 32 * s.tiles * 4;
      const uint8_t* p = page + s.format.v_codes + block * block_bytes + chunk * 512;
      const uint8_t* upper = page + s.format.v_high + (BITS == 3 ? block / 2 : block) * block_bytes + chunk * 512;
      for (int t = 0; t < 4; t++)
        for (int i = 0; i < width; i++) {
          const int channel = 16 * (4 * chunk + i), group = channel / s.format.value_group;
          // Lanes are channels 8*j0 + g: the two halves share a word.
          const auto words = [&](const uint8_t* plane) {
            alignas(64) uint32_t lanes[kLanes];
            for (int g = 0; g < 8; g++) memcpy(lanes + g, plane + ((4 * g + t) * width + i) * 4, 4);
            for (int g = 0; g < 8; g++) lanes[g + 8] = lanes[g] >> 2 | lanes[g] << 30;
            return load_i(lanes);
          };
          const I low = words(p);
          I high = zero_i();
          if (BITS > 2) high = words(upper);
          if (BITS == 3 && block % 2) high = rotate_right<1>(high);
          I codes[2][2];  // [j1][0], bytes (half, r)
          join_planes<BITS>(low, high, high, codes);
          const float *vs = params.v_scale + group * kPage, *vz = params.v_zero + group * kPage;
          for (int j1 = 0; j1 < 2; j1++)
            for (int half = 0; half < 2; half++)
              for (int r = 0; r < 2; r++, codes[j1][0] = shift_right<8>(codes[j1][0])) {
                const int token = 32 * block + 16 * r + 8 * j1 + 2 * t + half;
                const F code = to_float(codes[j1][0] & set_i(0xff));
                const F v = WHOLE ? fma(code, set_f(vs[token]), set_f(vz[token])) : code - set_f(middle_code(BITS));
                store(values + token * s.dim + channel, v);
              }
        }
    }
}

}  // namespace
