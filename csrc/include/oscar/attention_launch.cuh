// SPDX-License-Identifier: Apache-2.0
// Host side of attention: launch shape, workspace, dispatch. One .cu file per head size
// includes this, so that they compile in parallel.
#pragma once

#include <algorithm>
#include <type_traits>

#include "oscar/combine.cuh"
#include "oscar/decode.cuh"
#include "oscar/device.cuh"
#include "oscar/presets.cuh"

namespace oscar {

// Everything about a launch that does not depend on lengths.
struct LaunchShape {
  int blocks, warps, few_time, n_tiles, row_blocks, slot_rows;
  int64_t segments, slots, ranges_bytes, max_sum_bytes, partial_bytes;

  int64_t workspace() const { return ranges_bytes + max_sum_bytes + partial_bytes; }
};

constexpr int kFewWarps = 8;  // of a block

inline int64_t align256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// With more than eight query rows, sixteen share a reading of the pages; larger heads
// leave no registers for that.
template <class Layout>
int choose_n_tiles(int rows) {
  return rows > 8 && Layout::kHeadDim <= 128 ? 2 : 1;
}

template <class Layout>
int launch_shape(const OscarAttentionParams& params, const OscarLaunch& launch, const Device& device,
                 LaunchShape& shape) {
  const int rows = launch.query_tokens * params.group;
  shape.n_tiles = choose_n_tiles<Layout>(rows);
  const int most = std::min(decode_warps(Layout::kHeadDim, shape.n_tiles, device.major),
                            device.shared_bytes / static_cast<int>(sizeof(WarpShared<Layout>)));
  if (most < 1) return OSCAR_DEVICE_TOO_SMALL;
  shape.blocks = device.multiprocessors;
  // Eight warps of a multiprocessor instead of twelve: measured on an H100 (39 bits of memory bus for each), and
  // on the same without its copies, which stands for a faster memory (an H200 has 47; not measured there).
  shape.few_time = device.bus_bits < 42 * device.multiprocessors ? 7 : 8;
  // Where warps keep their shares, whole sets of four: the schedulers of a multiprocessor must have equal work.
  const bool take = shape.n_tiles == 1 ? kTakesPages<Layout, 1> : kTakesPages<Layout, 2>;
  shape.warps = launch.warps ? launch.warps : take || most < 4 ? most : most / 4 * 4;
  if (shape.warps < 1 || shape.warps > most) return OSCAR_BAD_ARGUMENT;
  if (shape.blocks * most * sizeof(uint32_t) > OSCAR_COUNTER_BYTES) return OSCAR_BAD_ARGUMENT;
  const int block_rows = 8 * shape.n_tiles;
  shape.row_blocks = (rows + block_rows - 1) / block_rows;
  shape.slot_rows = std::min(rows, block_rows);
  shape.segments = static_cast<int64_t>(params.step.requests) * params.cache.kv_heads * shape.row_blocks;
  shape.slots = 2 * shape.segments + shape.blocks * most;
  shape.ranges_bytes = align256(2 * shape.segments * sizeof(int2));
  shape.max_sum_bytes = align256(shape.slots * shape.slot_rows * sizeof(float2));
  shape.partial_bytes = align256(shape.slots * shape.slot_rows * Layout::kHeadDim * sizeof(float));
  return OSCAR_OK;
}

template <class Layout, int NTiles, bool Plain>
int launch_attention(const DecodeParams& params, const LaunchShape& shape, const Device& device, cudaStream_t stream) {
  static thread_local AllowedShared allowed;
  const bool overlapping = true;
  const int shared = shape.warps * static_cast<int>(sizeof(WarpShared<Layout>));
  const auto decode = decode_kernel<Layout, NTiles, Plain>;
  OSCAR_TRY(allowed.raise(decode, shared, device));
  OSCAR_TRY(oscar::launch(decode, {shape.blocks, 32 * shape.warps, shared}, overlapping, device, stream, params));

  // As many blocks as there are multiprocessors, if they have channels enough to share.
  int lanes = std::min(Layout::kHeadDim / kCombineChannels, 32);
  const auto split = [&] { return Layout::kHeadDim / kCombineChannels / lanes; };
  while (lanes > kLeastCombineLanes && 2 * split() * shape.segments * shape.slot_rows <= shape.blocks) lanes /= 2;
  // A group of lanes for every two partial results of an average row; a power of two of warps, and not more
  // than the multiprocessors have room for. Rows of one warp each share a block: starting a block takes longer.
  const int64_t results = 2 + static_cast<int64_t>(shape.blocks) * shape.warps / shape.segments;
  int warps = 1;
  while (warps < kCombineWarps && 4 * warps * (32 / lanes) <= results &&
         warps * shape.segments * shape.slot_rows <= 8 * shape.blocks) {
    warps *= 2;
  }
  const int rows = warps == 1 ? shape.slot_rows : 1;
  const dim3 blocks(static_cast<unsigned>(shape.segments), shape.slot_rows / rows, split()), threads(32 * warps, rows);
  return oscar::launch(combine_kernel<Layout::kHeadDim>,
                       {blocks, threads, warps * static_cast<int>(sizeof(CombineShared))}, overlapping, device, stream,
                       params, Tiling{8 * NTiles, Layout::kRingTokens, false, Plain});
}

template <int HeadDim>
int attention_workspace(const OscarAttentionParams& params, const OscarLaunch& launch, int64_t& bytes) {
  return visit_layout<HeadDim>(params.cache.format, [&](auto layout) -> int {
    Device device;
    LaunchShape shape;
    OSCAR_TRY(current_device(device));
    OSCAR_TRY(launch_shape<decltype(layout)>(params, launch, device, shape));
    bytes = shape.workspace();
    return OSCAR_OK;
  });
}

template <int HeadDim>
int attention(const OscarAttentionParams& params, const OscarLaunch& launch, cudaStream_t stream) {
  return visit_layout<HeadDim>(params.cache.format, [&](auto layout) -> int {
    using Layout = decltype(layout);
    Device device;
    LaunchShape shape;
    OSCAR_TRY(current_device(device));
    OSCAR_TRY(launch_shape<Layout>(params, launch, device, shape));
    if (shape.workspace() > launch.workspace_bytes) return OSCAR_WORKSPACE_TOO_SMALL;
    uint8_t* workspace = static_cast<uint8_t*>(launch.workspace);
    DecodeParams p{params};
    p.launch = launch;
    const OscarSoftmax& softmax = params.cache.softmax;
    p.soft_cap = softmax.soft_cap > 0.f ? SoftCap{softmax.soft_cap * kLog2E, 2.f / softmax.soft_cap} : SoftCap{};
    p.reach = softmax.sliding_window > 0 ? softmax.sliding_window : INT32_MAX;
    p.row_blocks = shape.row_blocks;
    p.slot_rows = shape.slot_rows;
    p.warps = shape.blocks * shape.warps;
    p.few_warps = launch.warps ? p.warps : shape.blocks * std::min(shape.warps, kFewWarps);
    p.few_time = shape.few_time;
    p.claims = launch.counters;
    p.ranges = reinterpret_cast<int2*>(workspace);
    p.max_sum = reinterpret_cast<float2*>(workspace + shape.ranges_bytes);
    p.partial = reinterpret_cast<float*>(workspace + shape.ranges_bytes + shape.max_sum_bytes);
    const auto launch_tiles = [&](auto plain) {
      constexpr bool kPlain = decltype(plain)::value;
      if constexpr (Layout::kHeadDim <= 128) {
        if (shape.n_tiles == 2) return launch_attention<Layout, 2, kPlain>(p, shape, device, stream);
      }
      return launch_attention<Layout, 1, kPlain>(p, shape, device, stream);
    };
    const bool plain = softmax.sliding_window <= 0 && softmax.soft_cap <= 0.f;
    return plain ? launch_tiles(std::true_type()) : launch_tiles(std::false_type());
  });
}

}  // namespace oscar
