// SPDX-License-Identifier: Apache-2.0
// Keys and values of pages as dense 16-bit tensors, for prefill with a dense attention kernel.
// One block per slot of the workspace, KV head, and keys or values; one warp per 32 tokens.
//
// Codes are read as a warp feeds them to tensor cores (core/format.py), so a lane holds some channels of some tokens.
// The last stages of the rotation exchange channels between lanes in such a way that a lane ends with eight
// neighbouring ones: 16-byte stores, and whole sectors of memory.
#pragma once

#include "oscar/fragments.cuh"
#include "oscar/hadamard.cuh"
#include "oscar/layout.cuh"
#include "oscar/prefill.h"

namespace oscar {

constexpr int kGatherThreads = 128;
constexpr float kHalfUnit = 16777216.f;  // 2^24: a code in the lowest bits of a half is a subnormal, code / 2^24

OSCAR_DEVICE float load_half(const uint8_t* base, int index) {
  return __half2float(reinterpret_cast<const __half*>(base)[index]);
}

OSCAR_DEVICE float2 load_half2(const uint8_t* base, int index) {  // index: even
  return unpack_half2(reinterpret_cast<const uint32_t*>(base)[index / 2]);
}

// Eight neighbouring channels.
template <bool Bf16>
OSCAR_DEVICE void store_channels(uint8_t* target, const float* x, float factor) {
  const auto pack = [&](int i) {
    return Bf16 ? pack_bfloat162(x[i] * factor, x[i + 1] * factor) : pack_half2(x[i] * factor, x[i + 1] * factor);
  };
  *reinterpret_cast<uint4*>(target) = uint4{pack(0), pack(2), pack(4), pack(6)};
}

// The code words of a lane for one 32-token block, one per tile.
template <int Tiles, int Bits>
struct BlockCodes {
  uint32_t low[Tiles], high[Tiles];

  OSCAR_DEVICE BlockCodes(const uint8_t* low_plane, const uint8_t* high_plane, int block, int lane) {
#pragma unroll
    for (int chunk = 0; chunk < Tiles / 4; ++chunk) {
      set(low + 4 * chunk, load_words(low_plane, block, chunk, Tiles / 4, lane));
      set(high + 4 * chunk, load_high_words<Bits>(high_plane, block, chunk, Tiles / 4, lane));
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) high[tile] = align_high<Bits>(high[tile], block);
  }

  // The codes of slot `slot` of both halves of the word in bits 0 .. 3 of these, those of slot + 2 in bits 4 .. 7.
  OSCAR_DEVICE uint32_t at(int tile, int slot) const {
    const uint32_t codes = low[tile] >> 2 * slot;
    return Bits == 2 ? codes : select_bits<0x33333333>(codes, __funnelshift_r(high[tile], high[tile], 2 * slot));
  }

 private:
  OSCAR_DEVICE static void set(uint32_t* words, const uint4& four) {
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }
};

template <int Bits>
constexpr uint32_t kCodeMask = ((1u << Bits) - 1) * 0x10001u;

// Scales or zeros of a lane's key channels as pairs of halves, two per tile.
template <class Layout>
OSCAR_DEVICE void load_key_params(const uint8_t* base, int t, uint32_t (&pairs)[2 * Layout::kTiles]) {
  const uint8_t* own = base + t * (Layout::kHeadDim / 4) * Layout::kParamBytes;
  constexpr int kVectors = Layout::kHeadDim / 4 * Layout::kParamBytes / 16;
  uint32_t words[4 * kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(own)[i];
    words[4 * i] = four.x;
    words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z;
    words[4 * i + 3] = four.w;
  }
#pragma unroll
  for (int tile = 0; tile < Layout::kTiles; ++tile) {
    if constexpr (Layout::kFp8Params) {
      e4m3x4_to_half2(words[tile], pairs[2 * tile], pairs[2 * tile + 1]);
    } else {
      pairs[2 * tile] = words[2 * tile];
      pairs[2 * tile + 1] = words[2 * tile + 1];
    }
  }
}

// Key rows of the warp's 32 tokens, block `warp`. A lane reads channels 16 * tile + 8 * j1 + 2 * t + half of four tokens.
template <class Layout, bool Bf16>
OSCAR_DEVICE void gather_keys(const uint8_t* page, bool first_page, int warp, int lane, int rows, uint8_t* out,
                              int64_t out_row) {
  constexpr int kTiles = Layout::kTiles;
  const int g = lane >> 2, t = lane & 3;
  const bool shared_group = Layout::kFirstToken && first_page;
  const int group = shared_group ? 0 : 32 * warp / Layout::kKeyGroup;
  const uint8_t* params = page + Layout::kKeyParams + group * Layout::kKeyGroupBytes;
  uint32_t scales[2 * kTiles], zeros[2 * kTiles];
  const BlockCodes<kTiles, Layout::kKeyBits> words(page + Layout::kKeyCodes, page + Layout::kKeyHigh, warp, lane);
  load_key_params<Layout>(params, t, scales);
  load_key_params<Layout>(params + Layout::kKeyGroupBytes / 2, t, zeros);
#pragma unroll 1
  for (int token_of_lane = 0; token_of_lane < 4; ++token_of_lane) {
    const int r = token_of_lane >> 1, j0 = token_of_lane & 1;
    const int token = 32 * warp + 16 * r + 8 * j0 + g;
    float x[4 * kTiles];  // [channel bits 4 and up = tile][3 = j1][0 = half]
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t codes = words.at(tile, 4 * r + j0);
#pragma unroll
      for (int j1 = 0; j1 < 2; ++j1) {
        const float unit = j1 ? kHalfUnit / 16 : kHalfUnit;
        const float2 code = unpack_half2(codes & kCodeMask<Layout::kKeyBits> << 4 * j1);
        const float2 scale = unpack_half2(scales[2 * tile + j1]), zero = unpack_half2(zeros[2 * tile + j1]);
        x[4 * tile + 2 * j1] = fmaf(scale.x, code.x * unit, zero.x);
        x[4 * tile + 2 * j1 + 1] = fmaf(scale.y, code.y * unit, zero.y);
      }
    }
    if (shared_group && token == 0) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) x[i] = static_cast<int8_t>(page[Layout::kFirstKey + t * 4 * kTiles + i]);
    }
    __syncwarp();
    hadamard_registers(x);
    hadamard_exchange<2>(x, lane, 1);  // channel bit 1 for 3
    hadamard_exchange<4>(x, lane, 2);  // channel bit 2 for 4
    float factor = rsqrtf(Layout::kHeadDim);
    if constexpr (Layout::kHasNorm) factor *= load_half(page + Layout::kNorms, (2 * warp + r) * 16 + 2 * g + j0);
    if (token >= rows) continue;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; i += 8) store_channels<Bf16>(out + token * out_row + 8 * i + 16 * t, x + i, factor);
  }
}

// Value rows of the warp's 32 tokens. A lane reads channels 16 * tile + 8 * j0 + g of eight tokens, two at a time.
template <class Layout, bool Bf16>
OSCAR_DEVICE void gather_values(const uint8_t* page, bool first_page, int warp, int lane, int rows, uint8_t* out,
                                int64_t out_row) {
  constexpr int kTiles = Layout::kTiles, kGroups = Layout::kValueGroups;
  const int g = lane >> 2, t = lane & 3;
  const BlockCodes<kTiles, Layout::kValueBits> words(page + Layout::kValueCodes, page + Layout::kValueHigh, warp, lane);
#pragma unroll 1
  for (int pair = 0; pair < 4; ++pair) {
    const int r = pair >> 1, j1 = pair & 1, token = 32 * warp + 16 * r + 8 * j1 + 2 * t;
    float x[2][2 * kTiles];  // [token][channel bits 4 and up = tile][3 = j0]
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float2 scale = load_half2(page + Layout::kValueScale,
                                      (((2 * warp + r) * 4 + t) * kGroups + group) * 4 + 2 * j1);
      const float2 zero = load_half2(page + Layout::kValueZero,
                                     (((2 * warp + r) * kGroups + group) * 4 + t) * 4 + 2 * j1);
#pragma unroll
      for (int tile = group * kTiles / kGroups; tile < (group + 1) * kTiles / kGroups; ++tile) {
#pragma unroll
        for (int j0 = 0; j0 < 2; ++j0) {
          const float2 code = unpack_half2(words.at(tile, 4 * r + 2 * j1 + j0) & kCodeMask<Layout::kValueBits>);
          x[0][2 * tile + j0] = fmaf(scale.x, code.x * kHalfUnit, zero.x);
          x[1][2 * tile + j0] = fmaf(scale.y, code.y * kHalfUnit, zero.y);
        }
      }
      if (Layout::kFirstToken && first_page && token == 0) {
        const uint8_t* bytes = page + Layout::kFirstValue + g * 2 * kTiles;
#pragma unroll
        for (int i = 2 * group * kTiles / kGroups; i < 2 * (group + 1) * kTiles / kGroups; ++i) {
          x[0][i] = fmaf(scale.x, bytes[i], zero.x);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      hadamard_registers(x[half]);
      hadamard_exchange<1>(x[half], lane, 4);   // channel bit 0 for 3
      hadamard_exchange<2>(x[half], lane, 8);   // channel bit 1 for 4
      hadamard_exchange<4>(x[half], lane, 16);  // channel bit 2 for 5
      if (token + half >= rows) continue;
      uint8_t* row = out + (token + half) * out_row;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; i += 8) {
        store_channels<Bf16>(row + 16 * i + 16 * g, x[half] + i, rsqrtf(Layout::kHeadDim));
      }
    }
  }
}

// Rows [begin, 128) of the page at position `start`: zeros before position `first`, then from the ring up to the
// context, then the step's own, then zeros.
template <class Layout, bool Bf16>
OSCAR_DEVICE void gather_recent(const OscarStoreParams& p, const StepTokens& tokens, int request, int head, bool values,
                               int first, int start, int begin, uint8_t* out, int64_t out_row) {
  constexpr int kVectors = Layout::kHeadDim * 2 / 16;
  for (int i = begin * kVectors + threadIdx.x; i < kPageTokens * kVectors; i += kGatherThreads) {
    const int row = i / kVectors, position = start + row, token = position - tokens.context;
    uint4 vector = {};
    if (token >= 0 && token < tokens.query_len) {
      const uint8_t* source = token_address(values ? p.value : p.key, tokens.begin + token, head);
      vector = reinterpret_cast<const uint4*>(source)[i % kVectors];
    } else if (token < 0 && position >= first) {
      const int32_t* table = ring_row(p.step, request);
      const uint8_t* source = ring_token(p.cache, table, head, position, Layout::kRingTokens, 2 * Layout::kRingRowBytes) +
                              (values ? Layout::kRingRowBytes : 0);
      if constexpr (Layout::kInt8Ring) {
        const uint8_t* scales = ring_scales(p.cache, table, head, position, Layout::kRingTokens, Layout::kHeadDim);
        const uint2 bytes = reinterpret_cast<const uint2*>(source)[i % kVectors];
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = static_cast<int8_t>((j < 4 ? bytes.x : bytes.y) >> 8 * (j & 3));
        store_channels<Bf16>(reinterpret_cast<uint8_t*>(&vector), x, load_half(scales, values));
      } else {
        vector = reinterpret_cast<const uint4*>(source)[i % kVectors];
      }
    }
    reinterpret_cast<uint4*>(out + row * out_row)[i % kVectors] = vector;
  }
}

// Grid: slots, KV heads, keys or values.
template <class Layout, bool Bf16>
__global__ void __launch_bounds__(kGatherThreads, Layout::kHeadDim <= 128 ? 4 : 2)
    gather_kernel(const __grid_constant__ OscarStoreParams p, const int2* sources, uint8_t* key, uint8_t* value) {
  const int2 source = sources[blockIdx.x];
  const int request = source.x, head = blockIdx.y, start = source.y * kPageTokens;
  if (request < 0) return;
  const bool values = blockIdx.z;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const StepTokens tokens(p.step, request);
  const int first = first_visible(p.cache.softmax, tokens.context);
  const int from_ring = ring_start(p.step, p.cache.softmax, request, tokens.context);
  const int paged = from_ring > first ? min(max(from_ring - start, 0), kPageTokens) : 0;
  const int64_t out_row = static_cast<int64_t>(p.cache.kv_heads) * Layout::kHeadDim * 2;
  uint8_t* out = (values ? value : key) + blockIdx.x * kPageTokens * out_row + head * Layout::kHeadDim * 2;
  if (paged > 0) {
    const uint8_t* page = page_address(p.cache, page_row(p.step, request)[source.y], head);
    if (values) gather_values<Layout, Bf16>(page, source.y == 0, warp, lane, paged, out, out_row);
    else gather_keys<Layout, Bf16>(page, source.y == 0, warp, lane, paged, out, out_row);
  }
  if (paged < kPageTokens) {
    gather_recent<Layout, Bf16>(p, tokens, request, head, values, first, start, paged, out, out_row);
  }
}

}  // namespace oscar
