// SPDX-License-Identifier: Apache-2.0
// Gather part of one request's keys and values into dense 16-bit tensors, for prefill with a
// dense attention kernel: positions before ring_start are dequantized from pages and rotated
// back, those before the context come from the ring, the rest are the step's own tokens.
// One block per page and KV head, one warp per 32 tokens of the page.
#pragma once

#include "oscar/abi.h"
#include "oscar/layout.cuh"
#include "oscar/ptx.cuh"

namespace oscar {

constexpr int kGatherThreads = 128;

template <bool Bf16>
OSCAR_DEVICE uint32_t pack_pair(float low, float high) {
  return Bf16 ? pack_bfloat162(low, high) : pack_half2(low, high);
}

template <bool Bf16>
OSCAR_DEVICE uint16_t pack_one(float x) {
  return static_cast<uint16_t>(pack_pair<Bf16>(x, 0.f) & 0xffff);
}

// One stage of the Walsh-Hadamard transform over a channel bit held in the lane's own array.
template <int Count, int Stride>
OSCAR_DEVICE void butterfly(float (&x)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if ((i & Stride) == 0) {
      const float a = x[i], b = x[i + Stride];
      x[i] = a + b;
      x[i + Stride] = a - b;
    }
  }
}

template <int Count, int Stride = 1>
OSCAR_DEVICE void butterflies(float (&x)[Count]) {
  if constexpr (Stride < Count) {
    butterfly<Count, Stride>(x);
    butterflies<Count, Stride * 2>(x);
  }
}

// The same over a channel bit that selects the lane.
template <int Count>
OSCAR_DEVICE void lane_butterfly(float (&x)[Count], int lane_bit, int lane) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const float other = __shfl_xor_sync(kFullWarp, x[i], lane_bit);
    x[i] = lane & lane_bit ? other - x[i] : x[i] + other;
  }
}

OSCAR_DEVICE float load_half(const uint8_t* base, int index) {
  return __half2float(reinterpret_cast<const __half*>(base)[index]);
}

template <class Layout>
OSCAR_DEVICE float load_key_param(const uint8_t* base, int index) {
  if constexpr (Layout::kFp8Params) return unpack_half2(e4m3x2_to_half2(base[index])).x;
  return load_half(base, index);
}

// Word of `tile` in a 32-token block of a 2-bit plane: chunks of four tiles, [chunk][lane][tile % 4].
template <class Layout>
OSCAR_DEVICE uint32_t load_word(const uint8_t* plane, int block, int tile, int lane) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(plane + block * Layout::kBlockCodeBytes);
  return words[((tile >> 2) * 32 + lane) * 4 + (tile & 3)];
}

// Key rows of the warp's 32 tokens. A lane holds channels 16*tile + 8*j1 + 2*t + half of four tokens.
template <class Layout, bool Bf16>
OSCAR_DEVICE void gather_keys(const uint8_t* page, bool first_page, int warp, int lane, int rows, uint8_t* out,
                              int64_t out_row) {
  constexpr int kTiles = Layout::kTiles;
  const int g = lane >> 2, t = lane & 3;
  const bool shared_group = Layout::kExactFirstKey && first_page;
  const uint8_t* scales =
      page + Layout::kKeyParams + (shared_group ? 0 : 32 * warp / Layout::kKeyGroup) * Layout::kKeyGroupBytes;
  const uint8_t* zeros = scales + Layout::kKeyGroupBytes / 2;
#pragma unroll 1
  for (int token_of_lane = 0; token_of_lane < 4; ++token_of_lane) {
    const int r = token_of_lane >> 1, j0 = token_of_lane & 1;
    const int token = 32 * warp + 16 * r + 8 * j0 + g;
    const bool exact = shared_group && token == 0;
    float x[4 * kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t low = load_word<Layout>(page + Layout::kKeyCodes, warp, tile, lane) >> (8 * r + 2 * j0);
      uint32_t high = 0;
      if constexpr (Layout::kKeyBits == 4) {
        const uint32_t word = load_word<Layout>(page + Layout::kKeyHigh, warp, tile, lane);
        high = __funnelshift_r(word, word, 2) >> (8 * r + 2 * j0) & 0x33333333u;
      } else if constexpr (Layout::kKeyBits == 3) {
        const uint32_t word = load_word<Layout>(page + Layout::kKeyHigh, warp >> 1, tile, lane);
        high = __funnelshift_r(word, word, 2) >> (8 * r + 2 * j0 + (warp & 1)) & 0x11111111u;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // i = 2 * j1 + half
        const int bit = 4 * (i >> 1) + 16 * (i & 1);
        const int code = (low >> bit & 3) + 4 * (high >> bit & 3);
        const int at = t * (Layout::kHeadDim / 4) + tile * 4 + i;
        x[4 * tile + i] = exact ? load_half(page + Layout::kFirstKey, at)
                                : fmaf(load_key_param<Layout>(scales, at), code, load_key_param<Layout>(zeros, at));
      }
    }
    butterflies(x);
    lane_butterfly(x, 1, lane);
    lane_butterfly(x, 2, lane);
    float factor = rsqrtf(Layout::kHeadDim);
    if constexpr (Layout::kHasNorm) factor *= load_half(page + Layout::kNorms, (2 * warp + r) * 16 + 2 * g + j0);
    if (token >= rows) continue;
    uint32_t* row = reinterpret_cast<uint32_t*>(out + token * out_row);
#pragma unroll
    for (int i = 0; i < 4 * kTiles; i += 2)  // channels 16*tile + 8*j1 + 2*t, +1
      row[8 * (i >> 2) + 4 * (i >> 1 & 1) + t] = pack_pair<Bf16>(x[i] * factor, x[i + 1] * factor);
  }
}

// Value rows of the warp's 32 tokens. A lane holds channels 16*tile + 8*j0 + g of eight tokens.
template <class Layout, bool Bf16>
OSCAR_DEVICE void gather_values(const uint8_t* page, int warp, int lane, int rows, uint8_t* out, int64_t out_row) {
  constexpr int kTiles = Layout::kTiles;
  const int g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int token_of_lane = 0; token_of_lane < 8; ++token_of_lane) {
    const int r = token_of_lane >> 2, j1 = token_of_lane >> 1 & 1, half = token_of_lane & 1;
    const int token = 32 * warp + 16 * r + 8 * j1 + 2 * t + half;
    float x[2 * kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t word = load_word<Layout>(page + Layout::kValueCodes, warp, tile, lane) >>
                            (16 * half + 8 * r + 4 * j1);
      const int group = 16 * tile / Layout::kValueGroup;
      const int scale_at = (((2 * warp + r) * 4 + t) * Layout::kValueGroups + group) * 4 + 2 * j1 + half;
      const int zero_at = (((2 * warp + r) * Layout::kValueGroups + group) * 4 + t) * 4 + 2 * j1 + half;
      const float scale = load_half(page + Layout::kValueScale, scale_at);
      const float zero = load_half(page + Layout::kValueZero, zero_at);
      x[2 * tile] = fmaf(scale, word & 3, zero);
      x[2 * tile + 1] = fmaf(scale, word >> 2 & 3, zero);
    }
    butterflies(x);
    lane_butterfly(x, 4, lane);
    lane_butterfly(x, 8, lane);
    lane_butterfly(x, 16, lane);
    const float factor = rsqrtf(Layout::kHeadDim);
    if (token >= rows) continue;
    uint16_t* row = reinterpret_cast<uint16_t*>(out + token * out_row);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) row[16 * (i >> 1) + 8 * (i & 1) + g] = pack_one<Bf16>(x[i] * factor);
  }
}

// Exact rows [begin, end) of the page: from the ring before the context, else the step's own.
template <class Layout>
OSCAR_DEVICE void gather_exact(const OscarAttentionArgs& args, int request, int head, int page_start, int begin,
                               int end, int context, uint8_t* out_key, uint8_t* out_value, int64_t out_row) {
  constexpr int kVectors = Layout::kHeadDim * 2 / 16;
  const uint8_t* ring = static_cast<const uint8_t*>(args.ring) + head * args.ring_head;
  const int32_t* ring_table = args.ring_table + request * (args.ring_table_row / 4);
  const int capacity = args.ring_pages * Layout::kRingTokens;
  for (int i = threadIdx.x; i < (end - begin) * kVectors; i += kGatherThreads) {
    const int row = begin + i / kVectors, vector = i % kVectors, position = page_start + row;
    const uint8_t *key, *value;
    if (position < context) {
      const int slot = position % capacity;
      key = ring + ring_table[slot / Layout::kRingTokens] * args.ring_block +
            slot % Layout::kRingTokens * Layout::kRingTokenBytes;
      value = key + Layout::kHeadDim * 2;
    } else {
      const int64_t token = args.query_start_loc[request] + (position - context);
      key = static_cast<const uint8_t*>(args.key) + token * args.key_token + head * args.key_head;
      value = static_cast<const uint8_t*>(args.value) + token * args.value_token + head * args.value_head;
    }
    reinterpret_cast<uint4*>(out_key + row * out_row)[vector] = reinterpret_cast<const uint4*>(key)[vector];
    reinterpret_cast<uint4*>(out_value + row * out_row)[vector] = reinterpret_cast<const uint4*>(value)[vector];
  }
}

// Positions [first, first + count) of `request`; first is a multiple of 128. Grid: pages, KV heads.
// Outputs are [count, kv_heads, head_dim], contiguous.
template <class Layout, bool Bf16>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(OscarAttentionArgs args, int request, int first, int count, uint8_t* out_key, uint8_t* out_value) {
  const int head = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int page_start = first + blockIdx.x * kPageTokens;
  const int rows = min(kPageTokens, first + count - page_start);
  const int context =
      args.seq_lens[request] - (args.query_start_loc[request + 1] - args.query_start_loc[request]);
  const int paged = min(max(args.ring_start[request] - page_start, 0), rows);

  const int64_t out_row = static_cast<int64_t>(args.kv_heads) * Layout::kHeadDim * 2;
  const int64_t offset = (static_cast<int64_t>(page_start - first) * args.kv_heads + head) * Layout::kHeadDim * 2;
  out_key += offset;
  out_value += offset;
  if (paged > 0) {
    const int32_t* table = args.block_table + request * (args.block_table_row / 4);
    const uint8_t* page = static_cast<const uint8_t*>(args.pages) +
                          table[page_start / kPageTokens] * args.page_block + head * args.page_head;
    gather_keys<Layout, Bf16>(page, page_start == 0, warp, lane, paged, out_key, out_row);
    gather_values<Layout, Bf16>(page, warp, lane, paged, out_value, out_row);
  }
  gather_exact<Layout>(args, request, head, page_start, paged, rows, context, out_key, out_value, out_row);
}

}  // namespace oscar
