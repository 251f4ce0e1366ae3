// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/include/oscar/launch.h, with the CUDA kernels and their launchers run on the CPU.
#include "runtime.h"

#include "oscar/attention_launch.cuh"
#include "oscar/store_launch.cuh"

namespace {

int taken = 0;  // pages that warps took from others in the last call

// Of two head sizes only: each takes seconds to compile.
template <class Visitor>
int visit(const OscarFormat& format, Visitor&& visitor) {
  switch (format.head_dim) {
    case 64: return oscar::visit_layout<64>(format, visitor);
    case 128: return oscar::visit_layout<128>(format, visitor);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}

}  // namespace

extern "C" int oscar_attention_workspace(const OscarAttentionParams* params, const OscarLaunch* launch,
                                         int64_t* bytes) {
  return params->cache.format.head_dim == 64 ? oscar::attention_workspace<64>(*params, *launch, *bytes)
                                             : oscar::attention_workspace<128>(*params, *launch, *bytes);
}

extern "C" int oscar_attention(const OscarAttentionParams* params, const OscarLaunch* launch, void*) {
  taken = 0;
  emulator::before_launch = [launch] {
    for (size_t i = 0; i < OSCAR_COUNTER_BYTES / sizeof(uint32_t); ++i) taken += launch->counters[i] / oscar::kStolen;
  };
  const int result = params->cache.format.head_dim == 64 ? oscar::attention<64>(*params, *launch, nullptr)
                                                         : oscar::attention<128>(*params, *launch, nullptr);
  emulator::before_launch = [] {};
  return result;
}

extern "C" int oscar_store_pages(const OscarStoreParams* params, void*) {
  return visit(params->cache.format, [&](auto layout) { return oscar::launch_store<decltype(layout)>(*params, nullptr); });
}

extern "C" int oscar_write_ring(const OscarStoreParams* params, void*) {
  return oscar::launch_write_ring(*params, nullptr);
}

extern "C" const char* oscar_error_string(int) { return "see csrc/include/oscar/launch.h"; }

extern "C" void oscar_sizes(int32_t sizes[3]) {
  sizes[0] = sizeof(OscarStoreParams);
  sizes[1] = sizeof(OscarAttentionParams);
  sizes[2] = sizeof(OscarLaunch);
}

extern "C" int emulated_thefts() { return taken; }
