// SPDX-License-Identifier: Apache-2.0
// Attention of one warp over one quantized page in shared memory.
//
// Both products are transposed, S^T = K Q^T and O^T += V^T P^T, so that the codes are
// the A operand and eight query rows fill N. Key scales are folded into the query once
// per key group, value scales into the weights; zeros take one extra product each, and
// norms multiply the scores. With `lane = 4*g + t` a lane holds rows g and g + 8 and
// columns 2*t and 2*t + 1 of a result fragment.
#pragma once

#include "oscar/fragments.cuh"
#include "oscar/hadamard.cuh"
#include "oscar/query.cuh"
#include "oscar/softmax.cuh"

namespace oscar {

// Products of key zeros and query: row `group` of the result; the other rows mean nothing.
template <class Layout>
OSCAR_DEVICE void zero_products(const uint8_t* params, bool one_group, const QueryRows<Layout::kTiles>& query, int lane,
                                float (&result)[4]) {
  const int g = lane >> 2, t = lane & 3;
  const int group = one_group ? 0 : min(g, Layout::kKeyGroups - 1);
  const uint8_t* row = params + Layout::kKeyParams + group * Layout::kKeyGroupBytes + Layout::kKeyGroupBytes / 2;
  float half[2][4] = {};  // two chains of products instead of a long one
#pragma unroll
  for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
    uint32_t zeros[8];
    load_key_params<Layout>(row, t, chunk, zeros);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const uint32_t* pair = query.pairs + 8 * chunk + i;
      mma_f16(half[i / 2 & 1], zeros[i], 0u, zeros[i + 1], 0u, pair[0], mul_half2(pair[1], kHalf2Sixteen));
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) result[j] = half[0][j] + half[1][j];
}

// The product of the first key's bytes and the query, in every row of the result and units of 1/128.
template <class Layout>
OSCAR_DEVICE void first_key_product(const uint8_t* params, const QueryRows<Layout::kTiles>& query, int lane,
                                    float (&result)[4]) {
  const uint32_t* key = reinterpret_cast<const uint32_t*>(params + Layout::kFirstKey) + (lane & 3) * Layout::kTiles;
#pragma unroll
  for (int j = 0; j < 4; ++j) result[j] = 0.f;
#pragma unroll
  for (int tile = 0; tile < Layout::kTiles; ++tile) {
    const uint32_t bytes = key[tile] ^ kByteBias;
    const uint32_t low = bytes_to_half2<kBytes01>(bytes), high = bytes_to_half2<kBytes23>(bytes);
    mma_f16(result, low, low, high, high, query.pairs[2 * tile],
            mul_half2(query.pairs[2 * tile + 1], kHalf2Sixteen));
  }
}

// Add what the codes of the first token, which are 0, leave out: its bytes, in units as those of codes.
// `weight` is that of attend_page() for the page's first 32 tokens.
template <class Layout, int NTiles>
OSCAR_DEVICE void add_first_value(const uint8_t* params, const uint32_t (&weight)[NTiles][2][Layout::kValueGroups][2],
                                  Accumulator<Layout::kTiles> (&acc)[NTiles], int lane) {
  const uint16_t* bytes = reinterpret_cast<const uint16_t*>(params + Layout::kFirstValue) + (lane >> 2) * Layout::kTiles;
#pragma unroll
  for (int tile = 0; tile < Layout::kTiles; ++tile) {
    const uint32_t pair = (lane & 3) == 0 ? bytes[tile] : 0u;  // token 0 is the lower half of these lanes' registers
    const uint32_t lower = pair & 0xffu, upper = pair >> 6 & 0x3fcu;
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
      mma_f16(acc[n].out[tile], lower, upper, 0u, 0u, weight[n][0][16 * tile / Layout::kValueGroup][0], 0u);
    }
  }
}

// Two 32-token blocks at a time give enough independent products to hide their latency.
template <int Tiles, int NTiles>
constexpr int kBlocksAtOnce = NTiles * Tiles <= 8 ? 2 : 1;

// Attend to a page. `codes` and `params`: the buffers of code words and of everything else, both to be
// indexed by page offsets. `finish(token, n, score)` is called if `unfinished`, with the scores of query
// tile n: score[r][0] and [1] are of token `token + 16 * r`, [2] and [3] of the eighth one behind it.
// `values_ready()` is called before the value codes are read, `keys_done()` after the last use of key codes.
template <class Layout, int NTiles, class Finish, class ValuesReady, class KeysDone>
OSCAR_DEVICE void attend_page(const uint8_t* codes, const uint8_t* params, bool first, bool unfinished,
                              const Finish& finish, const ValuesReady& values_ready, const KeysDone& keys_done,
                              const QueryRows<Layout::kTiles> (&query)[NTiles],
                              Accumulator<Layout::kTiles> (&acc)[NTiles], int lane) {
  constexpr int kTiles = Layout::kTiles, kChunks = Layout::kChunks, kValueGroups = Layout::kValueGroups;
  constexpr int kBlocks = kBlocksAtOnce<kTiles, NTiles>;
  const int g = lane >> 2, t = lane & 3;
  const bool one_group = Layout::kFirstToken && first;

  float zero[NTiles][4];
#pragma unroll
  for (int n = 0; n < NTiles; ++n) zero_products<Layout>(params, one_group, query[n], lane, zero[n]);

#pragma unroll 1
  for (int base = 0; base < 4; base += kBlocks) {
    // ---- scores ----
    float score[NTiles][2 * kBlocks][4];
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) score[n][r][0] = score[n][r][1] = score[n][r][2] = score[n][r][3] = 0.f;
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t scaled[NTiles][8];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int block = base + i;
        if (i == 0 || Layout::kKeyGroup == 32) {
          const int group = one_group ? 0 : block * 32 / Layout::kKeyGroup;
          uint32_t scales[8];
          load_key_params<Layout>(params + Layout::kKeyParams + group * Layout::kKeyGroupBytes, t, chunk, scales);
#pragma unroll
          for (int n = 0; n < NTiles; ++n) {
#pragma unroll
            for (int j = 0; j < 8; ++j) scaled[n][j] = mul_half2(query[n].pairs[8 * chunk + j], scales[j]);
          }
        }
        const uint4 low4 = load_words(codes + Layout::kKeyCodes, block, chunk, kChunks, lane);
        const uint4 high4 = load_high_words<Layout::kKeyBits>(codes + Layout::kKeyHigh, block, chunk, kChunks, lane);
        const uint32_t low[4] = {low4.x, low4.y, low4.z, low4.w};
        const uint32_t high[4] = {high4.x, high4.y, high4.z, high4.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const CodeWord<Layout::kKeyBits> word(low[j], align_high<Layout::kKeyBits>(high[j], block));
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const Fragment f = word.fragment(r);
#pragma unroll
            for (int n = 0; n < NTiles; ++n) {
              mma_f16(score[n][2 * i + r], f.a[0], f.a[1], f.a[2], f.a[3], scaled[n][2 * j], scaled[n][2 * j + 1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
      const float unit0 = kCodeUnit * query[n].factor[0], unit1 = kCodeUnit * query[n].factor[1];
      const float upper0 = kCodeUnitUpper * query[n].factor[0], upper1 = kCodeUnitUpper * query[n].factor[1];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int row = 4 * ((base + i) * 32 / Layout::kKeyGroup);  // lanes that hold this group's zeros
        const float zero0 = __shfl_sync(kFullWarp, zero[n][0], row + t) * query[n].factor[0];
        const float zero1 = __shfl_sync(kFullWarp, zero[n][1], row + t) * query[n].factor[1];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float(&s)[4] = score[n][2 * i + r];
          s[0] = fmaf(s[0], unit0, zero0);
          s[1] = fmaf(s[1], unit1, zero1);
          s[2] = fmaf(s[2], upper0, zero0);
          s[3] = fmaf(s[3], upper1, zero1);
        }
      }
      if (one_group && base == 0) {
        float first_key[4];
        first_key_product<Layout>(params, query[n], lane, first_key);
        if (g == 0) {
          score[n][0][0] = first_key[0] * (128.f * query[n].factor[0]);
          score[n][0][1] = first_key[1] * (128.f * query[n].factor[1]);
        }
      }
    }
    if constexpr (Layout::kHasNorm) {
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
        const float2 norm =
            unpack_half2(*reinterpret_cast<const uint32_t*>(params + Layout::kNorms + (2 * base + r) * 32 + g * 4));
#pragma unroll
        for (int n = 0; n < NTiles; ++n) {
          score[n][r][0] *= norm.x, score[n][r][1] *= norm.x;
          score[n][r][2] *= norm.y, score[n][r][3] *= norm.y;
        }
      }
    }
    if (unfinished) {
#pragma unroll
      for (int n = 0; n < NTiles; ++n) finish(32 * base + g, n, score[n]);
    }
#pragma unroll
    for (int n = 0; n < NTiles; ++n) softmax_step(score[n], acc[n]);

    // ---- values ----
    if (base == 0) values_ready();
    if (base + kBlocks == 4) keys_done();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      uint32_t weight[NTiles][2][kValueGroups][2];  // [.][16 tokens][value group][b], times the value scale
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int rows = 2 * (base + i) + r;
        const uint2* scales = reinterpret_cast<const uint2*>(params + Layout::kValueScale + rows * 32 * kValueGroups);
        uint2 zeros = make_uint2(0u, 0u);
        if (g < kValueGroups) {
          zeros = *(reinterpret_cast<const uint2*>(params + Layout::kValueZero + rows * 32 * kValueGroups) + lane);
        }
#pragma unroll
        for (int n = 0; n < NTiles; ++n) {
          const float(&p)[4] = score[n][2 * i + r];
          const uint32_t b0 = transpose_8x8(pack_half2(p[0], p[1]));
          const uint32_t b1 = transpose_8x8(pack_half2(p[2], p[3]));
          mma_f16(acc[n].extra, zeros.x, 0x3c003c00u, zeros.y, 0x3c003c00u, b0, b1);
#pragma unroll
          for (int v = 0; v < kValueGroups; ++v) {
            const uint2 scale = scales[t * kValueGroups + v];
            weight[n][r][v][0] = mul_half2(b0, scale.x);
            weight[n][r][v][1] = mul_half2(b1, mul_half2(scale.y, kHalf2Sixteenth));
          }
        }
      }
      if (i == 0 && one_group && base == 0) add_first_value<Layout>(params, weight, acc, lane);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        constexpr int kBits = Layout::kValueBits;
        const uint4 low4 = load_words(codes + Layout::kValueCodes, base + i, chunk, kChunks, lane);
        const uint4 high4 = load_high_words<kBits>(codes + Layout::kValueHigh, base + i, chunk, kChunks, lane);
        const CodeWord<kBits> words[4] = {{low4.x, align_high<kBits>(high4.x, base + i)},
                                          {low4.y, align_high<kBits>(high4.y, base + i)},
                                          {low4.z, align_high<kBits>(high4.z, base + i)},
                                          {low4.w, align_high<kBits>(high4.w, base + i)}};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int tile = 4 * chunk + j, v = 16 * tile / Layout::kValueGroup;
            const Fragment f = words[j].fragment(r);
#pragma unroll
            for (int n = 0; n < NTiles; ++n) {
              mma_f16(acc[n].out[tile], f.a[0], f.a[1], f.a[2], f.a[3], weight[n][r][v][0], weight[n][r][v][1]);
            }
          }
        }
      }
    }
  }
}

// Bytes of tokens that were never stored may be NaN, and 0 * NaN is NaN: clear the value parameters
// of the tokens before `begin` and from `end` on. Scores need no care, they are masked.
template <class Layout>
OSCAR_DEVICE void clear_value_params(uint8_t* params, int begin, int end, int lane) {
  constexpr int kGroups = Layout::kValueGroups;
  __half* scale = reinterpret_cast<__half*>(params + Layout::kValueScale);
  __half* zero = reinterpret_cast<__half*>(params + Layout::kValueZero);
  for (int i = lane; i < kPageTokens * kGroups; i += 32) {
    const int token = i / kGroups, group = i % kGroups;
    if (token >= begin && token < end) continue;
    const int tile = token / 16, b = (token / 8) & 1, t = (token / 2) & 3, half = token & 1;
    scale[((tile * 4 + t) * kGroups + group) * 4 + 2 * b + half] = __half(0.f);
    zero[((tile * kGroups + group) * 4 + t) * 4 + 2 * b + half] = __half(0.f);
  }
  __syncwarp();
}

// Rows of the accumulator, rotated back, to `target` [row][channel], for rows 8 * n + 0..7.
template <class Layout>
OSCAR_DEVICE void write_page_result(const Accumulator<Layout::kTiles>& acc, float* target, int rows, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float x[2][2 * Layout::kTiles];  // of row 2 * t and the next: channels 8 * j + g
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float zero[Layout::kValueGroups];
#pragma unroll
    for (int v = 0; v < Layout::kValueGroups; ++v) zero[v] = __shfl_sync(kFullWarp, acc.extra[c], 4 * v + t);
#pragma unroll
    for (int i = 0; i < Layout::kTiles; ++i) {
      x[c][2 * i] = fmaf(acc.out[i][c], kCodeUnit, zero[16 * i / Layout::kValueGroup]);
      x[c][2 * i + 1] = fmaf(acc.out[i][2 + c], kCodeUnitUpper, zero[16 * i / Layout::kValueGroup]);
    }
  }
  const auto write = [&](float(&y)[2 * Layout::kTiles], int row) {
    hadamard_registers(y);
    hadamard_lanes(y, lane, 4, 32);
    if (row >= rows) return;
    const float unit = rsqrtf(static_cast<float>(Layout::kHeadDim));
#pragma unroll
    for (int j = 0; j < 2 * Layout::kTiles; ++j) target[row * Layout::kHeadDim + 8 * j + g] = y[j] * unit;
  };
  if (rows <= 4) {  // half of the lanes have no row: they take one from the others, and one rotation does
#pragma unroll
    for (int j = 0; j < 2 * Layout::kTiles; ++j) {
      const float other = __shfl_xor_sync(kFullWarp, x[1][j], 2);
      if (t >= 2) x[0][j] = other;
    }
    write(x[0], 2 * (t & 1) + (t >> 1));
  } else {
    write(x[0], 2 * t);
    write(x[1], 2 * t + 1);
  }
}

}  // namespace oscar
