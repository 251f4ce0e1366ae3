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
  alignas(64) uint8_t raw[2 * kMaxDim];
  memcpy(raw, p, s.dim * bytes);
  memset(raw + s.dim * bytes, 0, (2 * s.half_padded - s.dim) * bytes);
  for (int i = 0; i < s.half_padded; i += 16) {
    F a, b, low, high;
    if (bytes == 1) {
      a = load_e4m3(raw + 2 * i), b = load_e4m3(raw + 2 * i + 16);
    } else {
      const uint16_t* r = reinterpret_cast<const uint16_t*>(raw) + 2 * i;
      a = load_fp16(r), b = load_fp16(r + 16);
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
  for (int pair = 0; pair < kPage / 32; pair++) {  // two tiles of 16 tokens, [g][j0] each
    F even, odd;
    alignas(64) float lanes[2][kLanes];
    uint16_t raw[32];
    memcpy(raw, p + 64 * pair, 64);
    deinterleave(load_fp16(raw), load_fp16(raw + 16), even, odd);
    store(lanes[0], even);
    store(lanes[1], odd);
    for (int tile = 0; tile < 2; tile++)
      for (int j0 = 0; j0 < 2; j0++)
        memcpy(norms + 32 * pair + 16 * tile + 8 * j0, lanes[j0] + 8 * tile, 32);
  }
}

// Value scales and zeros: [group][token].
inline void load_value_params(const uint8_t* page, const Shape& s, float* scale, float* zero) {
  const int groups = s.value_groups;
  const uint8_t *ps = page + s.args.v_scale, *pz = page + s.args.v_zero;
  for (int group = 0; group < groups; group++) {
    alignas(64) uint32_t raw[2][kPage / 2];  // pairs of tokens
    for (int tile = 0; tile < kPage / 16; tile++)
      for (int t = 0; t < 4; t++)
        for (int b = 0; b < 2; b++) {
          const int token_pair = 8 * tile + 4 * b + t;
          memcpy(&raw[0][token_pair], ps + 4 * (((tile * 4 + t) * groups + group) * 2 + b), 4);
          memcpy(&raw[1][token_pair], pz + 4 * (((tile * groups + group) * 4 + t) * 2 + b), 4);
        }
    for (int i = 0; i < kPage; i += 16) {
      store(scale + group * kPage + i, load_fp16(reinterpret_cast<const uint16_t*>(raw[0]) + i));
      store(zero + group * kPage + i, load_fp16(reinterpret_cast<const uint16_t*>(raw[1]) + i));
    }
  }
}

inline int key_group_of(const Shape& s, int token, bool first_page) {
  return first_page && s.args.exact_first_key ? 0 : token / s.args.key_group;
}

// ---- key codes -----------------------------------------------------------------------------------
// Planes of 64 tokens, turned so that a vector has one channel pair of 16 tokens: word
// [t * tiles + tile], lane 2 * g + block. Two-bit words stay as they are; of wider codes,
// plane [word][r][j0] has both bit planes of slots j0 and 2 + j0 merged.
template <int BITS>
constexpr int planes_per_word() { return BITS == 2 ? 1 : 4; }

template <int BITS>
inline void key_planes(const uint8_t* page, const Shape& s, int pair, I* planes) {
  const int block_bytes = 32 * s.tiles * 4;
  const uint8_t* low = page + s.args.k_codes + 2 * pair * block_bytes;
  const uint8_t* high = page + s.args.k_high + (BITS == 3 ? 1 : 2) * pair * block_bytes;
  for (int chunk = 0; chunk < s.chunks; chunk++) {
    const int width = s.width(chunk);
    I rows[16];
    for (int g = 0; g < 8; g++)
      for (int block = 0; block < 2; block++)
        rows[2 * g + block] = load_row(low + block * block_bytes + (chunk * 128 + g * 4 * width) * 4, width);
    transpose16(rows);
    if (BITS == 2) {
      for (int t = 0; t < 4; t++)
        for (int i = 0; i < width; i++) planes[t * s.tiles + 4 * chunk + i] = rows[4 * t + i];
      continue;
    }
    I upper[16];
    for (int g = 0; g < 8; g++)
      for (int block = 0; block < 2; block++) {
        const uint8_t* p = high + (BITS == 3 ? 0 : block * block_bytes) + (chunk * 128 + g * 4 * width) * 4;
        const I w = load_row(p, width);
        upper[2 * g + block] = BITS == 3 && block ? shift_right<1>(w) | shift_left<31>(w) : w;
      }
    transpose16(upper);
    for (int t = 0; t < 4; t++)
      for (int i = 0; i < width; i++) {
        I* out = planes + (t * s.tiles + 4 * chunk + i) * 4;
        const I a = rows[4 * t + i], b = upper[4 * t + i];
        const I a8 = shift_right<8>(a), b8 = shift_right<8>(b) | shift_left<24>(b);
        store(out, merge_bits(set_i(0x00330033), a, b));
        store(out + 1, merge_bits(set_i(0x00cc00cc), a, b));
        store(out + 2, merge_bits(set_i(0x00330033), a8, b8));
        store(out + 3, merge_bits(set_i(0x00cc00cc), a8, b8));
      }
  }
}

// Codes (r, j1, j0) of a word as pairs of 16-bit integers.
template <int BITS, int R, int J1, int J0>
OSCAR_INLINE I key_codes(const I* planes, int word) {
  if (BITS == 2) return shift_right<8 * R + 4 * J1 + 2 * J0>(planes[word]) & set_i(0x00030003);
  return shift_right<4 * J1 + 2 * J0>(planes[word * 4 + R * 2 + J0]) & set_i(BITS == 3 ? 0x00070007 : 0x000f000f);
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
  for (int pair = 0; pair < 2; pair++) {
    key_planes<BITS>(page, s, pair, planes);
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
            if (r == 0) {
              c[0][0] = key_codes<BITS, 0, 0, 0>(planes, word), c[0][1] = key_codes<BITS, 0, 0, 1>(planes, word);
              c[1][0] = key_codes<BITS, 0, 1, 0>(planes, word), c[1][1] = key_codes<BITS, 0, 1, 1>(planes, word);
            } else {
              c[0][0] = key_codes<BITS, 1, 0, 0>(planes, word), c[0][1] = key_codes<BITS, 1, 0, 1>(planes, word);
              c[1][0] = key_codes<BITS, 1, 1, 0>(planes, word), c[1][1] = key_codes<BITS, 1, 1, 1>(planes, word);
            }
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
