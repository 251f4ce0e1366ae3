// SPDX-License-Identifier: Apache-2.0
// Combine the partial results of a query row: one block per (segment, row).
#pragma once

#include "oscar/hadamard.cuh"
#include "oscar/schedule.cuh"
#include "oscar/softmax.cuh"

namespace oscar {

// Slots of one query row: the page part, then the exact part.
struct RowSlots {
  int page_first, page_count, exact_first, count;
  OSCAR_DEVICE int operator[](int i) const { return i < page_count ? page_first + i : exact_first + i - page_count; }
};

// Most warps of a block: as many as have a place in 48 KB of shared memory.
constexpr int combine_warps(int head_dim) { return head_dim <= 128 ? 32 : 16; }

OSCAR_DEVICE float warp_max(float x) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, d));
  return x;
}
OSCAR_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) x += __shfl_xor_sync(kFullWarp, x, d);
  return x;
}

// What one warp leaves in shared memory for the first.
template <int HeadDim>
struct CombineShared {
  float rotated[HeadDim], exact[HeadDim], top, sum;
};

template <int HeadDim>
__global__ void __launch_bounds__(32 * combine_warps(HeadDim))
    combine_kernel(const __grid_constant__ AttentionParams p, int block_rows) {
  constexpr int kChannels = HeadDim / 32;  // consecutive channels of a lane
  extern __shared__ __align__(128) uint8_t raw[];
  CombineShared<HeadDim>* shared = reinterpret_cast<CombineShared<HeadDim>*>(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int segment = blockIdx.x, row = blockIdx.y;
  const int row_block = segment % p.row_blocks, head = segment / p.row_blocks % p.args.kv_heads;
  const Request request(p, segment / p.row_blocks / p.args.kv_heads, block_rows);
  const int query_row = row_block * block_rows + row;
  launch_dependents();
  wait_for_previous_grid();  // every block: who waits for this grid relies on the decode kernel's end, too
  if (query_row >= request.rows) return;

  RowSlots slots{0, 0, 0, 0};
  if (request.pages) {
    const int2 range = p.ranges[2 * segment];
    slots.page_first = range.x;
    slots.page_count = range.y - range.x + 1;
  }
  const int2 range = p.ranges[2 * segment + 1];
  slots.exact_first = range.x;
  slots.count = slots.page_count + range.y - range.x + 1;

  // Every warp adds up its slots, a few at a time so that their loads overlap.
  constexpr int kSlots = kChannels <= 4 ? 7 : 2;  // as registers allow
  float top = kNoMaximum, sum = 0.f, rotated[kChannels] = {}, exact[kChannels] = {};
  for (int base = warp; base < slots.count; base += kSlots * warps) {
    float x[kSlots][kChannels] = {};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int i = base + k * warps;
      if (i >= slots.count) break;
      const float* source =
          p.partial + (static_cast<int64_t>(slots[i]) * p.slot_rows + row) * HeadDim + lane * kChannels;
#pragma unroll
      for (int j = 0; j < kChannels; j += 2) {
        const float2 v = *reinterpret_cast<const float2*>(source + j);
        x[k][j] = v.x, x[k][j + 1] = v.y;
      }
    }
    const int own = base + lane * warps;  // lane k finds the weight of x[k]
    float2 max_sum = make_float2(kNoMaximum, 0.f);
    if (lane < kSlots && own < slots.count) {
      max_sum = p.max_sum[static_cast<int64_t>(slots[own]) * p.slot_rows + row];
    }
    const float higher = fmaxf(top, warp_max(max_sum.x)), shrink = exp2_approx(top - higher);
    const float weight = exp2_approx(max_sum.x - higher);
    top = higher;
    sum = fmaf(sum, shrink, warp_sum(max_sum.y * weight));
#pragma unroll
    for (int j = 0; j < kChannels; ++j) rotated[j] *= shrink, exact[j] *= shrink;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const float w = __shfl_sync(kFullWarp, weight, k);
      const float page_weight = base + k * warps < slots.page_count ? w : 0.f, exact_weight = w - page_weight;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        rotated[j] = fmaf(page_weight, x[k][j], rotated[j]);
        exact[j] = fmaf(exact_weight, x[k][j], exact[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    shared[warp].rotated[lane * kChannels + j] = rotated[j];
    shared[warp].exact[lane * kChannels + j] = exact[j];
  }
  if (lane == 0) shared[warp].top = top, shared[warp].sum = sum;
  __syncthreads();
  if (warp) return;

  // The first warp adds up the warps, with one lane for the weight of each.
  top = lane < warps ? shared[lane].top : kNoMaximum;
  const float weight = exp2_approx(top - warp_max(top));
  sum = warp_sum(lane < warps ? shared[lane].sum * weight : 0.f);
#pragma unroll
  for (int j = 0; j < kChannels; ++j) rotated[j] = exact[j] = 0.f;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    const float other = __shfl_sync(kFullWarp, weight, w);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      rotated[j] = fmaf(other, shared[w].rotated[lane * kChannels + j], rotated[j]);
      exact[j] = fmaf(other, shared[w].exact[lane * kChannels + j], exact[j]);
    }
  }
  hadamard_registers(rotated);
  hadamard_lanes(rotated, lane, 1, 32);

  const float unit = rsqrtf(static_cast<float>(HeadDim)), inverse = 1.f / sum;
  const int64_t token = request.begin + p.args.first_token + query_row / p.args.group;
  uint8_t* target = static_cast<uint8_t*>(p.args.out) + token * p.args.out_token +
                    (head * p.args.group + query_row % p.args.group) * p.args.out_head;
  uint32_t* words = reinterpret_cast<uint32_t*>(target) + lane * kChannels / 2;
#pragma unroll
  for (int j = 0; j < kChannels; j += 2) {
    const float a = fmaf(rotated[j], unit, exact[j]) * inverse, b = fmaf(rotated[j + 1], unit, exact[j + 1]) * inverse;
    words[j / 2] = p.args.is_bf16 ? pack_bfloat162(a, b) : pack_half2(a, b);
  }
}

}  // namespace oscar
