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
OSCAR_DEVICE float round_half(float x) {
  return __half2float(__float2half_rn(x == x ? fminf(fmaxf(x, -65504.f), 65504.f) : x));
}

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
  if (integer_zero) zero = scale > 0.f ? __fmul_rn(-rintf(__fdiv_rn(-low, scale)), scale) : low;
  return {scale, round_param<Fp8>(zero)};
}

OSCAR_DEVICE uint32_t quantize(float x, Affine params, float levels) {
  if (!(params.scale > 0.f)) return 0u;
  const float code = rintf(__fdiv_rn(__fsub_rn(x, params.zero), params.scale));
  return code == code ? static_cast<uint32_t>(fminf(fmaxf(code, 0.f), levels)) : 0u;  // NaN: 0
}

OSCAR_DEVICE float dequantize(uint32_t code, Affine params) {
  return __fadd_rn(__fmul_rn(params.scale, static_cast<float>(code)), params.zero);
}

// Nearest signed byte of a number in units of bytes; NaN: 0.
OSCAR_DEVICE int8_t to_int8(float x) { return x == x ? static_cast<int8_t>(fminf(fmaxf(rintf(x), -127.f), 127.f)) : 0; }

// What the coded vector y is to be multiplied by, from sum(x * x) and sum(x * y).
OSCAR_DEVICE float gain(float square, float product) {
  const float ratio = product > 0.f ? __fdiv_rn(square, product) : 1.f;
  return ratio == ratio ? fminf(fmaxf(ratio, 0.5f), 2.f) : 1.f;
}

// ---- sums over the lanes of a group of `Lanes` ------------------------------------
template <int Lanes>
OSCAR_DEVICE float sum_lanes(float x) {
#pragma unroll
  for (int d = 1; d < Lanes; d <<= 1) x += __shfl_xor_sync(kFullWarp, x, d);
  return x;
}

template <int Lanes>
OSCAR_DEVICE float max_lanes(float x) {
#pragma unroll
  for (int d = 1; d < Lanes; d <<= 1) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, d));
  return x;
}

// ---- shared memory -----------------------------------------------------------------
template <class Layout>
struct StoreShared {
  // Eight more floats a row spread the rows that a code word gathers over the banks.
  static constexpr int kRow = Layout::kHeadDim + 8;
  union Element {
    float x;
    uint32_t code;
  };
  Element token[kPageTokens][kRow];  // rotated unit keys, their codes, codes of values
  Affine key[Layout::kKeyGroups][Layout::kHeadDim];
  Affine value[kPageTokens][Layout::kValueGroups];
  float norm[kPageTokens];
};

// A token's key or value: in the model's dtype, or, where there is a scale, in int8.
struct Row {
  const uint8_t* data;
  const __half* scale;
};

// Rotate a row of consecutive channels, kChannels per lane, as `x @ H` does.
template <int HeadDim>
OSCAR_DEVICE void load_rotated_row(const Row& row, bool is_bf16, int lane, float (&x)[HeadDim / 32]) {
  constexpr int kChannels = HeadDim / 32;
  if (row.scale) {
    const float scale = __half2float(*row.scale);
    const int8_t* bytes = reinterpret_cast<const int8_t*>(row.data) + lane * kChannels;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = bytes[i] * scale;
  } else {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(row.data) + lane * kChannels / 2;
#pragma unroll
    for (int i = 0; i < kChannels; i += 2) {
      const float2 pair = is_bf16 ? unpack_bfloat162(words[i / 2]) : unpack_half2(words[i / 2]);
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
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
  return sum_lanes<32>(sum);
}

// Sixteen codes, one per slot, to the word of a plane: bits `Shift` and up of each, as `mask` says.
template <int Shift>
OSCAR_DEVICE uint32_t plane_word(uint64_t codes, uint32_t mask) {
  uint32_t word = 0;
#pragma unroll
  for (int slot = 0; slot < 16; ++slot) {
    word |= (static_cast<uint32_t>(codes >> (4 * slot + Shift)) & mask) << (2 * slot);
  }
  return word;
}

// Words of the two planes, [block][chunk][lane][tile % 4]. codes(block32, lane, tile): those of a word.
template <int Tiles, int Bits, class Codes>
OSCAR_DEVICE void store_planes(uint8_t* low_plane, uint8_t* high_plane, const Codes& codes) {
  constexpr int kBlockWords = 32 * Tiles;
  uint32_t* low_words = reinterpret_cast<uint32_t*>(low_plane);
  uint32_t* high_words = reinterpret_cast<uint32_t*>(high_plane);
  for (int i = threadIdx.x; i < 2 * kBlockWords; i += kStoreThreads) {
    const int pair = i / kBlockWords, word = i % kBlockWords;  // a pair of 32-token blocks
    uint32_t high[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint64_t both = codes(2 * pair + b, word / 4 % 32, word / 128 * 4 + word % 4);
      low_words[(2 * pair + b) * kBlockWords + word] = plane_word<0>(both, 3u);
      high[b] = plane_word<2>(both, 3u);
      if constexpr (Bits == 4) high_words[(2 * pair + b) * kBlockWords + word] = __funnelshift_l(high[b], high[b], 2);
    }
    if constexpr (Bits == 3) {
      const uint32_t both = high[0] | high[1] << 1;
      high_words[pair * kBlockWords + word] = __funnelshift_l(both, both, 2);
    }
  }
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

  const bool first = Layout::kFirstToken && index == 0;
  const OscarFormat& format = p.cache.format;
  const bool integer_zero = format.integer_zero, is_bf16 = p.dtype == OSCAR_BF16;
  uint8_t* page = page_address(p.cache, page_row(p.step, request)[index], head);
  const auto row_of = [&](int token, int of_head, bool value) -> Row {
    const int position = start + token;
    if (position >= step.context) {
      return {token_address(value ? p.value : p.key, step.begin + position - step.context, of_head), nullptr};
    }
    const int32_t* table = ring_row(p.step, request);
    const uint8_t* data = ring_token(p.cache, table, of_head, position, Layout::kRingTokens, 2 * Layout::kRingRowBytes);
    const __half* scales = nullptr;
    if constexpr (Layout::kInt8Ring) {
      scales = reinterpret_cast<const __half*>(
                   ring_scales(p.cache, table, of_head, position, Layout::kRingTokens, kDim)) + value;
    }
    return {data + (value ? Layout::kRingRowBytes : 0), scales};
  };

  // ---- keys: rotate, norm ----
  for (int token = warp; token < kPageTokens; token += kStoreWarps) {
    float x[kChannels];
    float square = 0.f;
    if (Layout::kHasNorm && format.norm == OSCAR_NORM_JOINT) {  // over all heads of this rank
      for (int h = 0; h < p.cache.kv_heads; ++h) {
        load_rotated_row<kDim>(row_of(token, h, false), is_bf16, lane, x);
        square += sum_of_squares(x);
      }
      square /= p.cache.kv_heads;
    }
    load_rotated_row<kDim>(row_of(token, head, false), is_bf16, lane, x);
    if constexpr (Layout::kHasNorm) {
      if (format.norm == OSCAR_NORM_HEAD) square = sum_of_squares(x);
      float norm = sqrtf(square / kDim);
      if (first && token == 0) {
        float top = fabsf(x[0]);
#pragma unroll
        for (int i = 1; i < kChannels; ++i) top = fmaxf(top, fabsf(x[i]));
        norm = __fdiv_rn(max_lanes<32>(top), 127.f);
      }
      norm = round_half(norm);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) x[i] = norm > 0.f ? __fdiv_rn(x[i], norm) : 0.f;
      if (lane == 0) shared.norm[token] = norm;
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) shared.token[token][lane * kChannels + i].x = x[i];
  }
  __syncthreads();

  // ---- key parameters: per channel, over the tokens of a group (first page: all but token 0) ----
  constexpr float kKeyLevels = (1 << Layout::kKeyBits) - 1;
  for (int i = threadIdx.x; i < Layout::kKeyGroups * kDim; i += kStoreThreads) {
    const int group = i / kDim, channel = i % kDim;
    const int begin = first ? 1 : group * Layout::kKeyGroup;
    const int end = first ? kPageTokens : begin + Layout::kKeyGroup;
    float low = shared.token[begin][channel].x, high = low;
    for (int token = begin + 1; token < end; ++token) {
      low = fminf(low, shared.token[token][channel].x);
      high = fmaxf(high, shared.token[token][channel].x);
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
      if (first && offset >= Layout::kFirstKey && offset < Layout::kFirstKey + 2 * kDim) return;  // the first token
      if constexpr (Layout::kFp8Params) page[offset] = to_e4m3(x);
      else *reinterpret_cast<__half*>(page + offset) = __float2half_rn(x);
    };
    put(at, a.scale);
    put(kDim + at, a.zero);
    if (first && group == 0) page[Layout::kFirstKey + at] = static_cast<uint8_t>(to_int8(shared.token[0][channel].x));
  }
  __syncthreads();

  // ---- key codes in place of the keys, and gains ----
  for (int token = warp; token < kPageTokens; token += kStoreWarps) {
    const bool sink = first && token == 0;
    float square = 0.f, product = 0.f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int channel = 32 * i + lane;
      auto& element = shared.token[token][channel];
      const Affine a = shared.key[token / Layout::kKeyGroup][channel];
      const float x = element.x;
      const uint32_t code = quantize(x, a, kKeyLevels);
      square = fmaf(x, x, square);
      product = fmaf(x, dequantize(code, a), product);
      element.code = sink ? 0u : code;
    }
    if (Layout::kHasNorm && format.key_gain && !sink) {
      square = sum_lanes<32>(square);
      product = sum_lanes<32>(product);
      if (lane == 0) shared.norm[token] = round_half(__fmul_rn(shared.norm[token], gain(square, product)));
    }
  }
  __syncthreads();
  store_planes<kTiles, Layout::kKeyBits>(
      page + Layout::kKeyCodes, page + Layout::kKeyHigh, [&](int block32, int lane_of, int tile) {
        const int g = lane_of >> 2, t = lane_of & 3;
        uint64_t codes = 0;
#pragma unroll
        for (int slot = 0; slot < 16; ++slot) {
          const int half = slot >> 3, r = slot >> 2 & 1, j1 = slot >> 1 & 1, j0 = slot & 1;
          const int token = 32 * block32 + 16 * r + 8 * j0 + g, channel = 16 * tile + 8 * j1 + 2 * t + half;
          codes |= static_cast<uint64_t>(shared.token[token][channel].code) << (4 * slot);
        }
        return codes;
      });
  if constexpr (Layout::kHasNorm) {
    for (int i = threadIdx.x; i < kPageTokens; i += kStoreThreads) {  // position [tile][g][j0]
      const int token = 16 * (i / 16) + 8 * (i & 1) + (i / 2 & 7);
      reinterpret_cast<__half*>(page + Layout::kNorms)[i] = __float2half_rn(shared.norm[token]);
    }
  }
  for (int i = Layout::kEnd + threadIdx.x; i < Layout::kPageBytes; i += kStoreThreads) page[i] = 0;
  __syncthreads();

  // ---- values: rotate; parameters, codes and gain per token and value group ----
  for (int token = warp; token < kPageTokens; token += kStoreWarps) {
    constexpr int kGroupLanes = Layout::kValueGroup / kChannels;
    const bool sink = first && token == 0;
    const float levels = sink ? 255.f : (1 << Layout::kValueBits) - 1;
    float x[kChannels];
    load_rotated_row<kDim>(row_of(token, head, true), is_bf16, lane, x);
    float low = x[0], high = x[0];
#pragma unroll
    for (int i = 1; i < kChannels; ++i) {
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
    }
    low = -max_lanes<kGroupLanes>(-low);
    high = max_lanes<kGroupLanes>(high);
    Affine a = affine_params<false>(low, high, levels, sink ? 1.f : format.value_clip, integer_zero);
    float square = 0.f, product = 0.f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int channel = lane * kChannels + i;
      const uint32_t code = quantize(x[i], a, levels);
      square = fmaf(x[i], x[i], square);
      product = fmaf(x[i], dequantize(code, a), product);
      shared.token[token][channel].code = sink ? 0u : code;
      if (sink) {  // position [g][tile][j0]
        page[Layout::kFirstValue + (channel % 8 * kTiles + channel / 16) * 2 + channel / 8 % 2] =
            static_cast<uint8_t>(code);
      }
    }
    if (format.value_gain && !sink) {
      const float by = gain(sum_lanes<kGroupLanes>(square), sum_lanes<kGroupLanes>(product));
      a = {round_half(__fmul_rn(a.scale, by)), round_half(__fmul_rn(a.zero, by))};
    }
    if (lane % kGroupLanes == 0) shared.value[token][lane / kGroupLanes] = a;
  }
  __syncthreads();
  store_planes<kTiles, Layout::kValueBits>(
      page + Layout::kValueCodes, page + Layout::kValueHigh, [&](int block32, int lane_of, int tile) {
        const int g = lane_of >> 2, t = lane_of & 3;
        uint64_t codes = 0;
#pragma unroll
        for (int slot = 0; slot < 16; ++slot) {
          const int half = slot >> 3, r = slot >> 2 & 1, j1 = slot >> 1 & 1, j0 = slot & 1;
          const int token = 32 * block32 + 16 * r + 8 * j1 + 2 * t + half, channel = 16 * tile + 8 * j0 + g;
          codes |= static_cast<uint64_t>(shared.token[token][channel].code) << (4 * slot);
        }
        return codes;
      });
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

// ---- the ring: one warp per token and head ------------------------------------------
OSCAR_DEVICE void copy_row(uint8_t* target, const uint8_t* source, int bytes, int lane) {
  for (int i = lane * 4; i < bytes; i += 128) {
    *reinterpret_cast<uint32_t*>(target + i) = *reinterpret_cast<const uint32_t*>(source + i);
  }
}

// A row of `channels` in int8; its scale to `scale_target` (core/ring.py).
OSCAR_DEVICE void write_int8_row(uint8_t* target, uint8_t* scale_target, const uint8_t* source, int channels,
                                 bool is_bf16, int lane) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(source);
  const auto load = [&](int i) { return is_bf16 ? unpack_bfloat162(words[i]) : unpack_half2(words[i]); };
  int top = 0;  // as bits: NaN is larger than infinity
  for (int i = lane; i < channels / 2; i += 32) {
    const float2 pair = load(i);
    top = max(top, static_cast<int>(__float_as_uint(fabsf(pair.x))));
    top = max(top, static_cast<int>(__float_as_uint(fabsf(pair.y))));
  }
  top = __reduce_max_sync(kFullWarp, top);
  const float scale = round_half(__fdiv_rn(__uint_as_float(static_cast<uint32_t>(top)), 127.f));
  const auto byte = [&](float x) {
    return static_cast<uint32_t>(static_cast<uint8_t>(scale > 0.f ? to_int8(__fdiv_rn(x, scale)) : 0));
  };
  for (int i = lane; i < channels / 2; i += 32) {
    const float2 pair = load(i);
    reinterpret_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(byte(pair.x) | byte(pair.y) << 8);
  }
  if (lane == 0) *reinterpret_cast<__half*>(scale_target) = __float2half_rn(scale);
}

// Keep the newest tokens of each request.
static __global__ void __launch_bounds__(kStoreThreads)
    write_ring_kernel(const __grid_constant__ OscarStoreParams p) {
  wait_for_previous_grid();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, request = blockIdx.y;
  const bool int8 = p.cache.format.int8_ring;
  const int tokens_per_page = p.cache.format.ring_tokens, dim = p.cache.format.head_dim, row_bytes = int8 ? dim : 2 * dim;
  const StepTokens step(p.step, request);
  const int kept = min(step.query_len, tokens_per_page * p.cache.ring_pages);
  const int32_t* table = ring_row(p.step, request);
  for (int i = blockIdx.x * kStoreWarps + warp; i < kept * p.cache.kv_heads; i += gridDim.x * kStoreWarps) {
    const int head = i % p.cache.kv_heads, token = step.query_len - kept + i / p.cache.kv_heads;
    const int position = step.context + token;
    uint8_t* target = ring_token(p.cache, table, head, position, tokens_per_page, 2 * row_bytes);
    const uint8_t* key = token_address(p.key, step.begin + token, head);
    const uint8_t* value = token_address(p.value, step.begin + token, head);
    if (int8) {
      uint8_t* scales = ring_scales(p.cache, table, head, position, tokens_per_page, dim);
      write_int8_row(target, scales, key, dim, p.dtype == OSCAR_BF16, lane);
      write_int8_row(target + row_bytes, scales + 2, value, dim, p.dtype == OSCAR_BF16, lane);
    } else {
      copy_row(target, key, row_bytes, lane);
      copy_row(target + row_bytes, value, row_bytes, lane);
    }
  }
}

}  // namespace oscar
