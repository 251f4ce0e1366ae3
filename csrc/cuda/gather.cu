// SPDX-License-Identifier: Apache-2.0
// The C functions of oscar/prefill.h.
#include <cuda_runtime.h>

#include "oscar/prefill_launch.cuh"

extern "C" int oscar_plan_pass(const OscarPassParams* params, void* stream) {
  return oscar::launch_plan(*params, static_cast<cudaStream_t>(stream));
}

extern "C" int oscar_gather(const OscarStoreParams* params, const int32_t* sources, int32_t slots, void* key,
                            void* value, void* stream) {
  return oscar::visit_layout(params->cache.format, [&](auto layout) {
    return oscar::launch_gather<decltype(layout)>(*params, sources, slots, key, value,
                                                  static_cast<cudaStream_t>(stream));
  });
}
