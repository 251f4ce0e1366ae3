// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as CPU functions with the arguments of csrc/include/oscar/abi.h.
#include "runtime.h"

#include "oscar/attention_launch.cuh"
#include "oscar/store.cuh"

namespace {

int taken = 0;  // pages that warps took from others in the last call

template <class Visitor>
int visit(const OscarFormat& format, Visitor&& visitor) {
  return format.head_dim == 64 ? oscar::visit_layout<64>(format, visitor)
                               : format.head_dim == 128 ? oscar::visit_layout<128>(format, visitor)
                                                        : OSCAR_UNSUPPORTED_FORMAT;
}

}  // namespace

extern "C" int emulate_attention_workspace(const OscarAttentionArgs* args, int64_t* bytes) {
  return args->format.head_dim == 64 ? oscar::attention_workspace<64>(*args, *bytes)
                                     : oscar::attention_workspace<128>(*args, *bytes);
}

extern "C" int emulate_attention(const OscarAttentionArgs* args, void*) {
  taken = 0;
  emulator::before_launch = [args] {
    for (size_t i = 0; i < OSCAR_COUNTER_BYTES / sizeof(uint32_t); ++i) taken += args->counters[i] / oscar::kStolen;
  };
  return args->format.head_dim == 64 ? oscar::attention<64>(*args, nullptr) : oscar::attention<128>(*args, nullptr);
}

extern "C" int emulate_store_pages(const OscarStoreArgs* args) {
  return visit(args->format, [&](auto layout) {
    static_assert(sizeof(oscar::StoreShared<decltype(layout)>) <= sizeof(oscar::raw));
    const unsigned blocks = (args->max_query_len + 254) / 128;
    emulator::launch({static_cast<unsigned>(args->kv_heads), blocks, static_cast<unsigned>(args->requests)},
                     oscar::kStoreThreads, [&] { oscar::store_kernel<decltype(layout)>(*args); });
    return 0;
  });
}

extern "C" int emulate_write_ring(const OscarStoreArgs* args) {
  return visit(args->format, [&](auto layout) {
    emulator::launch({2, static_cast<unsigned>(args->requests)}, oscar::kStoreThreads,
                     [&] { oscar::write_ring_kernel(*args, decltype(layout)::kRingTokens); });
    return 0;
  });
}

extern "C" int emulated_thefts() { return taken; }
