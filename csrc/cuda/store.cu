// SPDX-License-Identifier: Apache-2.0
#include "oscar/store_launch.cuh"

namespace oscar {

int store_pages(const OscarStoreParams& params, cudaStream_t stream) {
  return visit_layout(params.cache.format,
                      [&](auto layout) { return launch_store<decltype(layout)>(params, stream); });
}

int write_ring(const OscarStoreParams& params, cudaStream_t stream) { return launch_write_ring(params, stream); }

int probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, write_ring_kernel);
  cudaGetLastError();  // a failed probe is no error of a later launch
  return error;
}

}  // namespace oscar
