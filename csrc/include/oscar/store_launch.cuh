// SPDX-License-Identifier: Apache-2.0
// Host side of the encoder and of the ring writer: launch shapes.
#pragma once

#include <algorithm>

#include "oscar/device.cuh"
#include "oscar/presets.cuh"
#include "oscar/store.cuh"

namespace oscar {

template <class Layout>
int launch_store(const OscarStoreParams& params, cudaStream_t stream) {
  constexpr int kShared = sizeof(StoreShared<Layout>);
  static thread_local AllowedShared allowed;
  Device device;
  OSCAR_TRY(current_device(device));
  if (kShared > device.shared_bytes) return OSCAR_DEVICE_TOO_SMALL;
  OSCAR_TRY(allowed.raise(store_kernel<Layout>, kShared, device));
  const unsigned heads = params.cache.kv_heads, requests = params.step.requests;
  // A request that starts inside a page completes at most this many.
  const unsigned pages = pages_before(params.step.max_query_len + kPageTokens - 1);
  // Not overlapping: attention relies on everything before this kernel having ended when this one starts.
  const bool overlapping = false;
  return launch(store_kernel<Layout>, {{heads, pages, requests}, kStoreThreads, kShared}, overlapping, device, stream,
                params);
}

inline int launch_write_ring(const OscarStoreParams& params, cudaStream_t stream) {
  Device device;
  OSCAR_TRY(current_device(device));
  const int capacity = params.cache.format.ring_tokens * params.cache.ring_pages;
  const int rows = std::min(params.step.max_query_len, capacity) * params.cache.kv_heads;
  const unsigned blocks = (rows + kStoreWarps - 1) / kStoreWarps, requests = params.step.requests;
  return launch(write_ring_kernel, {{blocks, requests}, kStoreThreads}, /*overlapping=*/true, device, stream, params);
}

}  // namespace oscar
