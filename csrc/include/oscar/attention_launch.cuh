// SPDX-License-Identifier: Apache-2.0
// Host side of attention: launch shape, workspace, dispatch. One .cu file per head size
// includes this, so that they compile in parallel.
#pragma once

#include <algorithm>

#include "oscar/combine.cuh"
#include "oscar/decode.cuh"
#include "oscar/presets.cuh"

namespace oscar {

#define OSCAR_TRY(call)                              \
  do {                                               \
    const int oscar_error = static_cast<int>(call);  \
    if (oscar_error) return oscar_error;             \
  } while (0)

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
int launch_shape(const OscarAttentionArgs& args, LaunchShape& shape) {
  int device, sms, bus, shared, capability;
  OSCAR_TRY(cudaGetDevice(&device));
  OSCAR_TRY(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  OSCAR_TRY(cudaDeviceGetAttribute(&bus, cudaDevAttrGlobalMemoryBusWidth, device));
  OSCAR_TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  OSCAR_TRY(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device));
  const int rows = args.max_query_len * args.group;
  shape.n_tiles = choose_n_tiles<Layout>(rows);
  const int most = std::min(decode_warps(Layout::kHeadDim, shape.n_tiles, capability),
                            shared / static_cast<int>(sizeof(WarpShared<Layout>)));
  if (most < 1) return OSCAR_DEVICE_TOO_SMALL;
  shape.blocks = sms;
  // Eight warps of a multiprocessor instead of twelve: measured on an H100 (39 bits of memory bus for each), and
  // on the same without its copies, which stands for a faster memory (an H200 has 47; not measured there).
  shape.few_time = bus < 42 * sms ? 7 : 8;
  shape.warps = args.warps ? args.warps : most;
  if (shape.warps < 1 || shape.warps > most) return OSCAR_BAD_ARGUMENT;
  if (shape.blocks * most * sizeof(uint32_t) > OSCAR_COUNTER_BYTES) return OSCAR_BAD_ARGUMENT;
  const int block_rows = 8 * shape.n_tiles;
  shape.row_blocks = (rows + block_rows - 1) / block_rows;
  shape.slot_rows = std::min(rows, block_rows);
  shape.segments = static_cast<int64_t>(args.requests) * args.kv_heads * shape.row_blocks;
  shape.slots = 2 * shape.segments + shape.blocks * most;
  shape.ranges_bytes = align256(2 * shape.segments * sizeof(int2));
  shape.max_sum_bytes = align256(shape.slots * shape.slot_rows * sizeof(float2));
  shape.partial_bytes = align256(shape.slots * shape.slot_rows * Layout::kHeadDim * sizeof(float));
  return OSCAR_OK;
}

template <class Kernel>
int allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Launch so that the start overlaps the end of the kernel before, for which the kernel waits itself.
template <class... Args>
int launch_overlapping(void (*kernel)(Args...), dim3 grid, dim3 threads, int shared, cudaStream_t stream,
                       Args... args) {
  int device, major;
  OSCAR_TRY(cudaGetDevice(&device));
  OSCAR_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class Layout, int NTiles>
int launch_attention(const AttentionParams& params, const LaunchShape& shape, cudaStream_t stream) {
  const int shared = shape.warps * static_cast<int>(sizeof(WarpShared<Layout>));
  OSCAR_TRY(allow_shared_memory(decode_kernel<Layout, NTiles>, shared));
  OSCAR_TRY(launch_overlapping(decode_kernel<Layout, NTiles>, dim3(shape.blocks), 32 * shape.warps, shared, stream,
                               params));

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
  return launch_overlapping(combine_kernel<Layout::kHeadDim>,
                            dim3(static_cast<unsigned>(shape.segments), shape.slot_rows / rows, split()),
                            dim3(32 * warps, rows), warps * static_cast<int>(sizeof(CombineShared)), stream, params,
                            Tiling{8 * NTiles, Layout::kRingTokens, false});
}

template <int HeadDim>
int attention_workspace(const OscarAttentionArgs& args, int64_t& bytes) {
  return visit_layout<HeadDim>(args.format, [&](auto layout) -> int {
    LaunchShape shape;
    OSCAR_TRY(launch_shape<decltype(layout)>(args, shape));
    bytes = shape.workspace();
    return OSCAR_OK;
  });
}

template <int HeadDim>
int attention(const OscarAttentionArgs& args, cudaStream_t stream) {
  return visit_layout<HeadDim>(args.format, [&](auto layout) -> int {
    using Layout = decltype(layout);
    LaunchShape shape;
    OSCAR_TRY(launch_shape<Layout>(args, shape));
    if (shape.workspace() > args.workspace_bytes) return OSCAR_WORKSPACE_TOO_SMALL;
    AttentionParams params;
    params.args = args;
    params.row_blocks = shape.row_blocks;
    params.slot_rows = shape.slot_rows;
    params.warps = shape.blocks * shape.warps;
    params.few_warps = args.warps ? params.warps : shape.blocks * std::min(shape.warps, kFewWarps);
    params.few_time = shape.few_time;
    uint8_t* workspace = static_cast<uint8_t*>(args.workspace);
    params.claims = args.counters;
    params.ranges = reinterpret_cast<int2*>(workspace);
    params.max_sum = reinterpret_cast<float2*>(workspace + shape.ranges_bytes);
    params.partial = reinterpret_cast<float*>(workspace + shape.ranges_bytes + shape.max_sum_bytes);
    if constexpr (Layout::kHeadDim <= 128) {
      if (shape.n_tiles == 2) return launch_attention<Layout, 2>(params, shape, stream);
    }
    return launch_attention<Layout, 1>(params, shape, stream);
  });
}

}  // namespace oscar
