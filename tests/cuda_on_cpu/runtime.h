// SPDX-License-Identifier: Apache-2.0
// Enough of the CUDA runtime for csrc/include/oscar/device.cuh: a small device whose
// kernels run when they are launched.
#pragma once

#include "oscar/copy.cuh"

using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrGlobalMemoryBusWidth,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 3; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 128; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(sizeof(oscar::raw)); break;
  }
  return 0;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) { return 0; }

namespace emulator {
inline std::function<void()> before_launch = [] {};
}

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  if (config->dynamicSmemBytes > sizeof(oscar::raw)) return 1;
  emulator::before_launch();
  std::memset(oscar::raw, 0xff, sizeof(oscar::raw));
  emulator::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return 0;
}
