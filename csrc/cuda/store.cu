// SPDX-License-Identifier: Apache-2.0
// Launchers of the encoder and of the ring writer.
#include <algorithm>

#include "oscar/attention_launch.cuh"
#include "oscar/store.cuh"

namespace oscar {
namespace {

template <class Layout>
int store_pages(const OscarStoreArgs& args, cudaStream_t stream) {
  constexpr int kShared = sizeof(StoreShared<Layout>);
  int device, shared;
  OSCAR_TRY(cudaGetDevice(&device));
  OSCAR_TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (kShared > shared) return OSCAR_DEVICE_TOO_SMALL;
  OSCAR_TRY(allow_shared_memory(store_kernel<Layout>, kShared));
  // A request that starts inside a block completes at most this many.
  const int blocks = (args.max_query_len + kPageTokens - 1 + kPageTokens - 1) / kPageTokens;
  // Not overlapping: attention relies on everything before this kernel having ended when this one starts.
  store_kernel<Layout><<<dim3(args.kv_heads, blocks, args.requests), kStoreThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

template <class Layout>
int write_ring(const OscarStoreArgs& args, cudaStream_t stream) {
  const int tokens = std::min(args.max_query_len, Layout::kRingTokens * args.ring_pages);
  const int blocks = (tokens * args.kv_heads + kStoreWarps - 1) / kStoreWarps;
  return launch_overlapping(write_ring_kernel, dim3(blocks, args.requests), kStoreThreads, 0, stream, args,
                            int{Layout::kRingTokens});
}

template <class Visitor>
int visit_head_dim(const OscarFormat& format, Visitor&& visit) {
  switch (format.head_dim) {
    case 64: return visit_layout<64>(format, visit);
    case 128: return visit_layout<128>(format, visit);
    case 256: return visit_layout<256>(format, visit);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}

}  // namespace
}  // namespace oscar

extern "C" int oscar_store_pages(const OscarStoreArgs* args, void* stream) {
  return oscar::visit_head_dim(args->format, [&](auto layout) {
    return oscar::store_pages<decltype(layout)>(*args, static_cast<cudaStream_t>(stream));
  });
}

extern "C" int oscar_write_ring(const OscarStoreArgs* args, void* stream) {
  return oscar::visit_head_dim(args->format, [&](auto layout) {
    return oscar::write_ring<decltype(layout)>(*args, static_cast<cudaStream_t>(stream));
  });
}

extern "C" int oscar_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, oscar::write_ring_kernel);
  cudaGetLastError();  // a failed probe is no error of a later launch
  return error;
}
