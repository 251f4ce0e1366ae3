// SPDX-License-Identifier: Apache-2.0
// Combine the partial results of a query row: one block per (segment, row).
#pragma once

#include "oscar/hadamard.cuh"
#include "oscar/schedule.cuh"

namespace oscar {

// Slots of one query row: the page part, then the exact part.
struct RowSlots {
  int page_first, page_count, exact_first, count;
  OSCAR_DEVICE int operator[](int i) const { return i < page_count ? page_first + i : exact_first + i - page_count; }
};

constexpr int kCombineWarps = 16;

// The result of `op` over all threads of the block, in every thread.
template <class Op>
OSCAR_DEVICE float block_reduce(float x, float* scratch, const Op& op) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) x = op(x, __shfl_xor_sync(kFullWarp, x, d));
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = scratch[min(lane, warps - 1)];
#pragma unroll
  for (int d = 1; d < kCombineWarps; d <<= 1) {
    const float other = __shfl_xor_sync(kFullWarp, x, d);
    if ((lane ^ d) < warps) x = op(x, other);
  }
  return __shfl_sync(kFullWarp, x, 0);
}

// Dynamic shared memory: two rows of scratch, [warp][rotated, exact][HeadDim] sums, a weight per slot.
template <int HeadDim>
constexpr int combine_shared_floats(int warps, int most_slots) {
  return 2 * kCombineWarps + warps * 2 * HeadDim + most_slots;
}

template <int HeadDim>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_kernel(const __grid_constant__ AttentionParams p, int block_rows) {
  constexpr int kChannels = HeadDim / 32;  // consecutive channels of a lane
  extern __shared__ __align__(128) uint8_t raw[];
  float* scratch = reinterpret_cast<float*>(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  float* sums = scratch + 2 * kCombineWarps;
  float* weights = sums + warps * 2 * HeadDim;
  const int segment = blockIdx.x, row = blockIdx.y;
  const int row_block = segment % p.row_blocks, head = segment / p.row_blocks % p.args.kv_heads;
  const Request request(p, segment / p.row_blocks / p.args.kv_heads, block_rows);
  const int query_row = row_block * block_rows + row;
  if (query_row >= request.rows) return;
  wait_for_previous_grid();

  RowSlots slots{0, 0, 0, 0};
  if (request.pages) {
    const int2 range = p.ranges[2 * segment];
    slots.page_first = range.x;
    slots.page_count = range.y - range.x + 1;
  }
  const int2 range = p.ranges[2 * segment + 1];
  slots.exact_first = range.x;
  slots.count = slots.page_count + range.y - range.x + 1;
  const auto max_sum = [&](int i) { return p.max_sum[static_cast<int64_t>(slots[i]) * p.slot_rows + row]; };

  float top = -INFINITY, sum = 0.f;
  for (int i = threadIdx.x; i < slots.count; i += blockDim.x) top = fmaxf(top, max_sum(i).x);
  top = block_reduce(top, scratch, [](float a, float b) { return fmaxf(a, b); });
  for (int i = threadIdx.x; i < slots.count; i += blockDim.x) {
    const float2 ms = max_sum(i);
    weights[i] = exp2_approx(ms.x - top);
    sum = fmaf(ms.y, weights[i], sum);
  }
  sum = block_reduce(sum, scratch + kCombineWarps, [](float a, float b) { return a + b; });

  float rotated[kChannels] = {}, exact[kChannels] = {};
#pragma unroll 8
  for (int i = warp; i < slots.count; i += warps) {
    const float* source =
        p.partial + (static_cast<int64_t>(slots[i]) * p.slot_rows + row) * HeadDim + lane * kChannels;
    float x[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; j += 2) {
      const float2 v = *reinterpret_cast<const float2*>(source + j);
      x[j] = v.x, x[j + 1] = v.y;
    }
    const float page_weight = i < slots.page_count ? weights[i] : 0.f, exact_weight = weights[i] - page_weight;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      rotated[j] = fmaf(page_weight, x[j], rotated[j]);
      exact[j] = fmaf(exact_weight, x[j], exact[j]);
    }
  }
  float* own = sums + warp * 2 * HeadDim + lane * kChannels;
#pragma unroll
  for (int j = 0; j < kChannels; ++j) own[j] = rotated[j], own[HeadDim + j] = exact[j];
  __syncthreads();
  if (warp) return;
  for (int w = 1; w < warps; ++w) {
    const float* other = sums + w * 2 * HeadDim + lane * kChannels;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) rotated[j] += other[j], exact[j] += other[HeadDim + j];
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
