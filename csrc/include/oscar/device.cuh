// SPDX-License-Identifier: Apache-2.0
// Host side of every kernel: what the current device is, and the launch itself. What CUDA is asked
// or told once per device is remembered, per thread: every layer of every step launches four kernels.
#pragma once

#include "oscar/launch.h"

namespace oscar {

#define OSCAR_TRY(call)                              \
  do {                                               \
    const int oscar_error = static_cast<int>(call);  \
    if (oscar_error) return oscar_error;             \
  } while (0)

constexpr int kMostDevices = 64;

struct Device {
  int index, multiprocessors, bus_bits, shared_bytes, major;  // major: of the compute capability
};

inline int current_device(Device& device) {
  static thread_local Device known[kMostDevices];
  int index;
  OSCAR_TRY(cudaGetDevice(&index));
  if (index >= kMostDevices) return OSCAR_BAD_ARGUMENT;
  if (!known[index].multiprocessors) {
    Device found;
    found.index = index;
    OSCAR_TRY(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    OSCAR_TRY(cudaDeviceGetAttribute(&found.bus_bits, cudaDevAttrGlobalMemoryBusWidth, index));
    OSCAR_TRY(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    OSCAR_TRY(cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, index));
    known[index] = found;
  }
  device = known[index];
  return OSCAR_OK;
}

// The shared memory that one kernel has been allowed, by device; static thread_local in its launcher.
struct AllowedShared {
  int bytes[kMostDevices] = {};

  template <class Kernel>
  int raise(Kernel kernel, int needed, const Device& device) {
    if (needed <= bytes[device.index]) return OSCAR_OK;
    OSCAR_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, needed));
    bytes[device.index] = needed;
    return OSCAR_OK;
  }
};

struct Grid {
  dim3 blocks, threads;
  int shared = 0;  // bytes of dynamic shared memory
};

// `overlapping`: the start overlaps the end of the kernel before, for which the kernel waits itself.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, bool overlapping, const Device& device, cudaStream_t stream,
           const Arguments&... arguments) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlapping && device.major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace oscar
