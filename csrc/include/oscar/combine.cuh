// SPDX-License-Identifier: Apache-2.0
// Combine the partial results of a query row: blocks are (segment, rows, channels), of several warps for one
// row or of one warp for each of several rows. With few rows several blocks share the channels of each, since
// one multiprocessor reads them slowly.
#pragma once

#include "oscar/schedule.cuh"
#include "oscar/softmax.cuh"

namespace oscar {

// Slots of one query row: the recent part, then the pages.
struct RowSlots {
  int recent_first, recent_count, page_first, count;
  OSCAR_DEVICE int operator[](int i) const { return i < recent_count ? recent_first + i : page_first + i - recent_count; }
};

constexpr int kCombineWarps = 16;      // most of a block; two blocks fit a multiprocessor
constexpr int kCombineChannels = 4;    // of a lane
constexpr int kLeastCombineLanes = 8;  // for the channels of a block: 128 bytes

// Weighted sum of partial results: four channels of it.
struct Sum {
  float top = kNoMaximum, weight = 0.f, x[4] = {};

  // Add `N` partial results; what they have in common, weights first, so that the rest is independent.
  template <int N>
  OSCAR_DEVICE void add(const float2 (&max_sum)[N], const float4 (&part)[N]) {
    float higher = top;
#pragma unroll
    for (int k = 0; k < N; ++k) higher = fmaxf(higher, max_sum[k].x);
    const float shrink = exp2_approx(top - higher);
    top = higher;
    weight *= shrink;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] *= shrink;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float w = exp2_approx(max_sum[k].x - higher);
      weight = fmaf(max_sum[k].y, w, weight);
      x[0] = fmaf(part[k].x, w, x[0]);
      x[1] = fmaf(part[k].y, w, x[1]);
      x[2] = fmaf(part[k].z, w, x[2]);
      x[3] = fmaf(part[k].w, w, x[3]);
    }
  }
};

// Add up the groups of `lanes` lanes of a warp.
OSCAR_DEVICE void add_lane_groups(Sum& sum, int lanes) {
  for (int d = lanes; d < 32; d <<= 1) {
    const float2 max_sum[1] = {
        make_float2(__shfl_xor_sync(kFullWarp, sum.top, d), __shfl_xor_sync(kFullWarp, sum.weight, d))};
    const float4 part[1] = {
        make_float4(__shfl_xor_sync(kFullWarp, sum.x[0], d), __shfl_xor_sync(kFullWarp, sum.x[1], d),
                    __shfl_xor_sync(kFullWarp, sum.x[2], d), __shfl_xor_sync(kFullWarp, sum.x[3], d))};
    sum.add(max_sum, part);
  }
}

// What one warp leaves in shared memory for the first.
struct CombineShared {
  float4 x[32];
  float2 max_sum[32];
};

template <int HeadDim>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_kernel(const __grid_constant__ DecodeParams p, const Tiling tiling) {
  extern __shared__ __align__(128) uint8_t raw[];
  CombineShared* shared = reinterpret_cast<CombineShared*>(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int segment = blockIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
  const int lanes = HeadDim / kCombineChannels / gridDim.z;  // for a slot; a warp reads several at once
  const int channel = (blockIdx.z * lanes + lane % lanes) * kCombineChannels;
  const int row_block = segment % p.row_blocks, head = segment / p.row_blocks % p.cache.kv_heads;
  const Request request(p, segment / p.row_blocks / p.cache.kv_heads, tiling);
  const int query_row = row_block * tiling.rows + row;
  launch_dependents();
  wait_for_previous_grid();  // every block: who waits for this grid relies on the decode kernel's end, too
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int threads = blockDim.x * blockDim.y, all = threads * gridDim.x * gridDim.y * gridDim.z;
  const int thread = threads * block + blockDim.x * threadIdx.y + threadIdx.x;
  for (int i = thread; i < p.warps; i += all) p.claims[i] = 0;  // for the next launch
  if (query_row >= request.rows) return;

  const int2 recent = p.ranges[2 * segment];
  RowSlots slots{recent.x, recent.y - recent.x + 1, 0, recent.y - recent.x + 1};
  if (request.units > request.recent) {
    const int2 pages = p.ranges[2 * segment + 1];
    slots.page_first = pages.x;
    slots.count += pages.y - pages.x + 1;
  }

  // Every group of lanes adds up its slots, a few at a time so that their loads overlap.
  constexpr int kSlots = 4;  // as registers allow
  const int groups = static_cast<int>(blockDim.x) / lanes, group = threadIdx.x / lanes;
  Sum sum;
  for (int base = group; base < slots.count; base += kSlots * groups) {
    float2 max_sum[kSlots];
    float4 part[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      max_sum[k] = make_float2(kNoMaximum, 0.f);
      part[k] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int i = base + k * groups;
      if (i >= slots.count) break;
      const int64_t at = static_cast<int64_t>(slots[i]) * p.slot_rows + row;
      max_sum[k] = p.max_sum[at];
      part[k] = *reinterpret_cast<const float4*>(p.partial + at * HeadDim + channel);
    }
    sum.add(max_sum, part);
  }
  add_lane_groups(sum, lanes);
  if (warps > 1) {  // the first warp adds up the warps, in as many groups of lanes as it has
    if (lane < lanes) {
      shared[warp].x[lane] = make_float4(sum.x[0], sum.x[1], sum.x[2], sum.x[3]);
      shared[warp].max_sum[lane] = make_float2(sum.top, sum.weight);
    }
    __syncthreads();
    if (warp) return;
    const int step = 32 / lanes, own = lane % lanes;
    sum = Sum();
    for (int w = lane / lanes; w < warps; w += 2 * step) {
      const bool two = w + step < warps;
      const float2 none = make_float2(kNoMaximum, 0.f);
      const float2 max_sum[2] = {shared[w].max_sum[own], two ? shared[w + step].max_sum[own] : none};
      const float4 part[2] = {shared[w].x[own], two ? shared[w + step].x[own] : make_float4(0.f, 0.f, 0.f, 0.f)};
      sum.add(max_sum, part);
    }
    add_lane_groups(sum, lanes);
  }
  if (lane >= lanes) return;
  if (p.cache.softmax.sinks) {  // of the query head: a weight without a value
    const float sink = p.cache.softmax.sinks[head * p.group + query_row % p.group];
    const float2 max_sum[1] = {make_float2(sink * kLog2E, 1.f)};
    const float4 part[1] = {make_float4(0.f, 0.f, 0.f, 0.f)};
    sum.add(max_sum, part);
  }

  const float inverse = 1.f / sum.weight;
  const int64_t token = request.begin + p.launch.first_token + query_row / p.group;
  uint8_t* target = token_address(p.out, token, head * p.group + query_row % p.group);
  const auto pack = [&](float a, float b) {
    return p.dtype == OSCAR_BF16 ? pack_bfloat162(a * inverse, b * inverse) : pack_half2(a * inverse, b * inverse);
  };
  uint32_t* words = reinterpret_cast<uint32_t*>(target) + channel / 2;
  words[0] = pack(sum.x[0], sum.x[1]);
  words[1] = pack(sum.x[2], sum.x[3]);
}

}  // namespace oscar
