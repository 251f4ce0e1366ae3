// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/include/oscar/prefill.h, with the CUDA kernels and their launchers run on the CPU.
#include "runtime.h"

#include "oscar/prefill_launch.cuh"

extern "C" int oscar_plan_pass(const OscarPassParams* params, void*) { return oscar::launch_plan(*params, nullptr); }

extern "C" int oscar_gather(const OscarStoreParams* params, const int32_t* sources, int32_t slots, void* key,
                            void* value, void*) {
  return oscar::visit_layout(params->cache.format, [&](auto layout) {
    return oscar::launch_gather<decltype(layout)>(*params, sources, slots, key, value, nullptr);
  });
}
