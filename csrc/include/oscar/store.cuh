// SPDX-License-Identifier: Apache-2.0
// Encoder: one block quantizes 128 tokens of one KV head of one request.
// The arithmetic follows vllm_oscar/core/reference.py operation by operation (no contraction
// to fused multiply-adds), so that only rounding ties may differ.
#pragma once

#include <cuda_fp8.h>

#include "oscar/hadamard.cuh"
#include "oscar/layout.cuh"

namespace oscar {

constexpr int kStoreWarps = 8;
constexpr int kStoreThreads = 32 * kStoreWarps;

// ---- rounding, as in reference.py ------------------------------------------------
OSCAR_DEVICE float round_half(float x) { return __half2float(__float2half_rn(fminf(fmaxf(x, -65504.f), 65504.f))); }

OSCAR_DEVICE uint8_t to_e4m3(float x) {
  return static_cast<uint8_t>(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3));
}

template <bool Fp8>
OSCAR_DEVICE float round_param(float x) {
  if constexpr (Fp8) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(to_e4m3(x), __NV_E4M3)));
  } else {
    return round_half(x);
  }
}

struct Affine {
  float scale, zero;
};

template <bool Fp8>
OSCAR_DEVICE Affine affine_params(float low, float high, float levels, float clip, bool integer_zero) {
  const float middle = __fadd_rn(low, high) / 2.f;
  const float half = __fmul_rn(__fsub_rn(high, low) / 2.f, clip);
  const float scale = round_param<Fp8>(__fdiv_rn(2.f * half, levels));
  float zero = __fsub_rn(middle, half);
  if (integer_zero) {
    const float code = scale > 0.f ? fminf(fmaxf(rintf(__fdiv_rn(-low, scale)), 0.f), levels) : 0.f;
    zero = __fmul_rn(-code, scale);
  }
  return {scale, round_param<Fp8>(zero)};
}

OSCAR_DEVICE uint32_t quantize(float x, Affine params, float levels) {
  if (!(params.scale > 0.f)) return 0u;
  const float code = rintf(__fdiv_rn(__fsub_rn(x, params.zero), params.scale));
  return code == code ? static_cast<uint32_t>(fminf(fmaxf(code, 0.f), levels)) : 0u;  // NaN: 0
}

// ---- shared memory -----------------------------------------------------------------
template <class Layout>
struct StoreShared {
  // Eight more floats a row spread the rows that a code word gathers over the banks.
  static constexpr int kRow = Layout::kHeadDim + 8;
  float token[kPageTokens][kRow];  // rotated keys, then rotated values
  float first_key[Layout::kHeadDim];
  Affine key[Layout::kKeyGroups][Layout::kHeadDim];
  Affine value[kPageTokens][Layout::kValueGroups];
  float norm[kPageTokens];
};

// Rotate a row of consecutive channels, kChannels per lane, as `x @ H` does.
template <int HeadDim>
OSCAR_DEVICE void load_rotated_row(const uint8_t* row, bool is_bf16, int lane, float (&x)[HeadDim / 32]) {
  constexpr int kChannels = HeadDim / 32;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(row) + lane * kChannels / 2;
#pragma unroll
  for (int i = 0; i < kChannels; i += 2) {
    const float2 pair = is_bf16 ? unpack_bfloat162(words[i / 2]) : unpack_half2(words[i / 2]);
    x[i] = pair.x;
    x[i + 1] = pair.y;
  }
  hadamard_registers(x);
  hadamard_lanes(x, lane, 1, 32);
  const float unit = rsqrtf(static_cast<float>(HeadDim));
#pragma unroll
  for (int i = 0; i < kChannels; ++i) x[i] *= unit;
}

template <int N>
OSCAR_DEVICE float sum_of_squares(const float (&x)[N]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fmaf(x[i], x[i], sum);
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) sum += __shfl_xor_sync(kFullWarp, sum, d);
  return sum;
}

// ---- the kernel ----------------------------------------------------------------------
template <class Layout>
__global__ void __launch_bounds__(kStoreThreads, 1) store_kernel(const __grid_constant__ OscarStoreParams p) {
  constexpr int kDim = Layout::kHeadDim, kChannels = kDim / 32, kTiles = Layout::kTiles;
  extern __shared__ __align__(128) uint8_t raw[];
  launch_dependents();  // attention may start; it waits before it reads pages
  StoreShared<Layout>& shared = *reinterpret_cast<StoreShared<Layout>*>(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int head = blockIdx.x, request = blockIdx.z;
  const StepTokens step(p.step, request);
  const int index = step.context / kPageTokens + blockIdx.y;
  const int start = index * kPageTokens;  // position of the page's first token
  if (step.query_len <= 0 || start + kPageTokens > step.context + step.query_len) return;

  const bool first = Layout::kExactFirstKey && index == 0;
  const OscarFormat& format = p.cache.format;
  const bool integer_zero = format.integer_zero, is_bf16 = p.dtype == OSCAR_BF16;
  uint8_t* page = page_address(p.cache, page_row(p.step, request)[index], head);
  const auto key_row = [&](int token, int of_head) -> const uint8_t* {
    const int position = start + token;
    if (position < step.context) {
      return ring_token(p.cache, ring_row(p.step, request), of_head, position, Layout::kRingTokens,
                        Layout::kRingTokenBytes);
    }
    return token_address(p.key, step.begin + position - step.context, of_head);
  };
  const auto value_row = [&](int token) -> const uint8_t* {
    const int position = start + token;
    if (position < step.context) return key_row(token, head) + Layout::kRingTokenBytes / 2;
    return token_address(p.value, step.begin + position - step.context, head);
  };

  // ---- keys: rotate, norm ----
  for (int token = warp; token < kPageTokens; token += kStoreWarps) {
    float x[kChannels];
    float square = 0.f;
    if (Layout::kHasNorm && format.norm == OSCAR_NORM_JOINT) {  // over all heads of this rank
      for (int h = 0; h < p.cache.kv_heads; ++h) {
        load_rotated_row<kDim>(key_row(token, h), is_bf16, lane, x);
        square += sum_of_squares(x);
      }
      square /= p.cache.kv_heads;
    }
    load_rotated_row<kDim>(key_row(token, head), is_bf16, lane, x);
    if constexpr (Layout::kHasNorm) {
      if (format.norm == OSCAR_NORM_HEAD) square = sum_of_squares(x);
      const float norm = round_half(sqrtf(square / kDim));
#pragma unroll
      for (int i = 0; i < kChannels; ++i) x[i] = norm > 0.f ? __fdiv_rn(x[i], norm) : 0.f;
      if (lane == 0) shared.norm[token] = norm;
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) shared.token[token][lane * kChannels + i] = x[i];
  }
  __syncthreads();

  // ---- key parameters: per channel, over the tokens of a group (first page: all but token 0) ----
  constexpr float kKeyLevels = (1 << Layout::kKeyBits) - 1;
  for (int i = threadIdx.x; i < Layout::kKeyGroups * kDim; i += kStoreThreads) {
    const int group = i / kDim, channel = i % kDim;
    const int begin = first ? 1 : group * Layout::kKeyGroup;
    const int end = first ? kPageTokens : begin + Layout::kKeyGroup;
    float low = shared.token[begin][channel], high = low;
    for (int token = begin + 1; token < end; ++token) {
      low = fminf(low, shared.token[token][channel]);
      high = fmaxf(high, shared.token[token][channel]);
    }
    shared.key[group][channel] =
        affine_params<Layout::kFp8Params>(low, high, kKeyLevels, format.key_clip, integer_zero);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Layout::kKeyGroups * kDim; i += kStoreThreads) {
    const int group = i / kDim, at = i % kDim;  // position [t][tile][b][half]
    const int t = at / (4 * kTiles), tile = at / 4 % kTiles, b = at / 2 & 1, half = at & 1;
    const int channel = 16 * tile + 8 * b + 2 * t + half;
    const Affine a = shared.key[group][channel];
    const auto put = [&](int index, float x) {
      const int offset = Layout::kKeyParams + group * Layout::kKeyGroupBytes + index * Layout::kParamBytes;
      if (first && offset >= Layout::kFirstKey && offset < Layout::kFirstKey + 2 * kDim) return;  // the exact first key
      if constexpr (Layout::kFp8Params) page[offset] = to_e4m3(x);
      else *reinterpret_cast<__half*>(page + offset) = __float2half_rn(x);
    };
    put(at, a.scale);
    put(kDim + at, a.zero);
    if (first && group == 0) {
      reinterpret_cast<__half*>(page + Layout::kFirstKey)[at] =
          __float2half_rn(round_half(shared.token[0][channel]));
    }
  }

  // ---- key codes: word `w` of [block][chunk][lane][tile % 4] ----
  constexpr int kBlockWords = 32 * kTiles;
  const auto key_codes = [&](int block32, int word) {  // sixteen codes, one per slot
    const int lane_of = word / 4 % 32, tile = word / 128 * 4 + word % 4, g = lane_of >> 2, t = lane_of & 3;
    const int group = block32 * 32 / Layout::kKeyGroup;
    uint64_t codes = 0;
#pragma unroll
    for (int slot = 0; slot < 16; ++slot) {
      const int half = slot >> 3, r = slot >> 2 & 1, j1 = slot >> 1 & 1, j0 = slot & 1;
      const int token = 32 * block32 + 16 * r + 8 * j0 + g, channel = 16 * tile + 8 * j1 + 2 * t + half;
      codes |= static_cast<uint64_t>(quantize(shared.token[token][channel], shared.key[group][channel], kKeyLevels))
               << (4 * slot);
    }
    return codes;
  };
  // Bits `shift` and up of each code, `width` of them, to the word's 2-bit slots.
  const auto plane = [](uint64_t codes, int shift, uint32_t mask) {
    uint32_t word = 0;
#pragma unroll
    for (int slot = 0; slot < 16; ++slot) {
      word |= (static_cast<uint32_t>(codes >> (4 * slot + shift)) & mask) << (2 * slot);
    }
    return word;
  };
  uint32_t* low_words = reinterpret_cast<uint32_t*>(page + Layout::kKeyCodes);
  uint32_t* high_words = reinterpret_cast<uint32_t*>(page + Layout::kKeyHigh);
  for (int i = threadIdx.x; i < 2 * kBlockWords; i += kStoreThreads) {
    const int pair = i / kBlockWords, word = i % kBlockWords;  // a pair of 32-token blocks
    uint32_t high[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint64_t codes = key_codes(2 * pair + b, word);
      low_words[(2 * pair + b) * kBlockWords + word] = plane(codes, 0, 3u);
      high[b] = plane(codes, 2, 3u);
      if constexpr (Layout::kKeyBits == 4) {
        high_words[(2 * pair + b) * kBlockWords + word] = __funnelshift_l(high[b], high[b], 2);
      }
    }
    if constexpr (Layout::kKeyBits == 3) {
      const uint32_t both = high[0] | high[1] << 1;
      high_words[pair * kBlockWords + word] = __funnelshift_l(both, both, 2);
    }
  }
  if constexpr (Layout::kHasNorm) {
    for (int i = threadIdx.x; i < kPageTokens; i += kStoreThreads) {  // position [tile][g][j0]
      const int token = 16 * (i / 16) + 8 * (i & 1) + (i / 2 & 7);
      reinterpret_cast<__half*>(page + Layout::kNorms)[i] = __float2half_rn(shared.norm[token]);
    }
  }
  for (int i = Layout::kEnd + threadIdx.x; i < Layout::kPageBytes; i += kStoreThreads) page[i] = 0;
  __syncthreads();

  // ---- values: rotate, parameters per token and value group ----
  for (int token = warp; token < kPageTokens; token += kStoreWarps) {
    float x[kChannels];
    load_rotated_row<kDim>(value_row(token), is_bf16, lane, x);
    float low = x[0], high = x[0];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      shared.token[token][lane * kChannels + i] = x[i];
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
    }
    constexpr int kGroupLanes = Layout::kValueGroup / kChannels;
#pragma unroll
    for (int d = 1; d < kGroupLanes; d <<= 1) {
      low = fminf(low, __shfl_xor_sync(kFullWarp, low, d));
      high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, d));
    }
    if (lane % kGroupLanes == 0) {
      shared.value[token][lane / kGroupLanes] = affine_params<false>(low, high, 3.f, format.value_clip, integer_zero);
    }
  }
  __syncthreads();
  uint32_t* value_words = reinterpret_cast<uint32_t*>(page + Layout::kValueCodes);
  for (int i = threadIdx.x; i < 4 * kBlockWords; i += kStoreThreads) {
    const int block32 = i / kBlockWords, word = i % kBlockWords;
    const int lane_of = word / 4 % 32, tile = word / 128 * 4 + word % 4, g = lane_of >> 2, t = lane_of & 3;
    uint32_t packed = 0;
#pragma unroll
    for (int slot = 0; slot < 16; ++slot) {
      const int half = slot >> 3, r = slot >> 2 & 1, j1 = slot >> 1 & 1, j0 = slot & 1;
      const int token = 32 * block32 + 16 * r + 8 * j1 + 2 * t + half, channel = 16 * tile + 8 * j0 + g;
      packed |= quantize(shared.token[token][channel], shared.value[token][channel / Layout::kValueGroup], 3.f)
                << (2 * slot);
    }
    value_words[i] = packed;
  }
  constexpr int kGroups = Layout::kValueGroups;
  __half* scales = reinterpret_cast<__half*>(page + Layout::kValueScale);
  __half* zeros = reinterpret_cast<__half*>(page + Layout::kValueZero);
  for (int i = threadIdx.x; i < kPageTokens * kGroups; i += kStoreThreads) {
    const int token = i / kGroups, group = i % kGroups;
    const int tile = token / 16, b = token / 8 & 1, t = token / 2 & 3, half = token & 1;
    const Affine a = shared.value[token][group];
    scales[((tile * 4 + t) * kGroups + group) * 4 + 2 * b + half] = __float2half_rn(a.scale);
    zeros[((tile * kGroups + group) * 4 + t) * 4 + 2 * b + half] = __float2half_rn(a.zero);
  }
}

// Keep the newest tokens of each request in 16 bit: one warp per (token, head).
OSCAR_DEVICE void copy_row(uint8_t* target, const uint8_t* source, int bytes, int lane) {
  for (int i = lane * 4; i < bytes; i += 128) {
    *reinterpret_cast<uint32_t*>(target + i) = *reinterpret_cast<const uint32_t*>(source + i);
  }
}

static __global__ void __launch_bounds__(kStoreThreads)
    write_ring_kernel(const __grid_constant__ OscarStoreParams p) {
  wait_for_previous_grid();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, request = blockIdx.y;
  const int tokens_per_page = p.cache.format.ring_tokens, row_bytes = p.cache.format.head_dim * 2;
  const StepTokens step(p.step, request);
  const int kept = min(step.query_len, tokens_per_page * p.cache.ring_pages);
  for (int i = blockIdx.x * kStoreWarps + warp; i < kept * p.cache.kv_heads; i += gridDim.x * kStoreWarps) {
    const int head = i % p.cache.kv_heads, token = step.query_len - kept + i / p.cache.kv_heads;
    uint8_t* target = ring_token(p.cache, ring_row(p.step, request), head, step.context + token, tokens_per_page,
                                 2 * row_bytes);
    copy_row(target, token_address(p.key, step.begin + token, head), row_bytes, lane);
    copy_row(target + row_bytes, token_address(p.value, step.begin + token, head), row_bytes, lane);
  }
}

}  // namespace oscar
