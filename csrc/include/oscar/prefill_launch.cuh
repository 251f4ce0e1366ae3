// SPDX-License-Identifier: Apache-2.0
// Host side of dense prefill: launch shapes.
#pragma once

#include "oscar/device.cuh"
#include "oscar/gather.cuh"
#include "oscar/prefill_plan.cuh"
#include "oscar/presets.cuh"

namespace oscar {

inline int launch_plan(const OscarPassParams& params, cudaStream_t stream) {
  static thread_local AllowedShared allowed;
  Device device;
  OSCAR_TRY(current_device(device));
  const int shared = plan_shared_bytes(params);
  if (shared > device.shared_bytes) return OSCAR_DEVICE_TOO_SMALL;
  OSCAR_TRY(allowed.raise(plan_kernel, shared, device));
  return launch(plan_kernel, {1, kPlanThreads, shared}, /*overlapping=*/false, device, stream, params,
                SlotTable::size_for(params.slots));
}

template <class Layout>
int launch_gather(const OscarStoreParams& params, const int32_t* sources, int slots, void* key, void* value,
                  cudaStream_t stream) {
  Device device;
  OSCAR_TRY(current_device(device));
  const auto kernel = params.dtype == OSCAR_BF16 ? gather_kernel<Layout, true> : gather_kernel<Layout, false>;
  const unsigned blocks = slots, heads = params.cache.kv_heads;
  return launch(kernel, {{blocks, heads, 2}, kGatherThreads}, /*overlapping=*/false, device, stream, params,
                reinterpret_cast<const int2*>(sources), static_cast<uint8_t*>(key), static_cast<uint8_t*>(value));
}

}  // namespace oscar
