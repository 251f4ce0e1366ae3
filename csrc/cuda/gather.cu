// SPDX-License-Identifier: Apache-2.0
// Launcher of the gather kernel.
#include <cuda_runtime.h>

#include "oscar/gather.cuh"
#include "oscar/presets.cuh"

namespace oscar {
namespace {

struct Gather {
  const OscarAttentionArgs& args;
  int request, first, count;
  uint8_t *key, *value;
  cudaStream_t stream;

  template <class Layout>
  int operator()(Layout) const {
    const dim3 grid((count + kPageTokens - 1) / kPageTokens, args.kv_heads);
    if (args.is_bf16) {
      gather_kernel<Layout, true><<<grid, kGatherThreads, 0, stream>>>(args, request, first, count, key, value);
    } else {
      gather_kernel<Layout, false><<<grid, kGatherThreads, 0, stream>>>(args, request, first, count, key, value);
    }
    return cudaGetLastError();
  }
};

}  // namespace
}  // namespace oscar

extern "C" int oscar_gather(const OscarAttentionArgs* args, int32_t request, int32_t first, int32_t count, void* key,
                            void* value, void* stream) {
  if (count <= 0 || first % oscar::kPageTokens != 0 || request < 0 || request >= args->requests)
    return OSCAR_BAD_ARGUMENT;
  const oscar::Gather gather{*args,
                             request,
                             first,
                             count,
                             static_cast<uint8_t*>(key),
                             static_cast<uint8_t*>(value),
                             static_cast<cudaStream_t>(stream)};
  switch (args->format.head_dim) {
    case 64: return oscar::visit_layout<64>(args->format, gather);
    case 128: return oscar::visit_layout<128>(args->format, gather);
    case 256: return oscar::visit_layout<256>(args->format, gather);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}
