// SPDX-License-Identifier: Apache-2.0
// The C functions of oscar/launch.h.
#include <cuda_runtime.h>

#include "oscar/launch.h"

namespace oscar {
template <int HeadDim>
int attention(const OscarAttentionParams& params, const OscarLaunch& launch, cudaStream_t stream);
template <int HeadDim>
int attention_workspace(const OscarAttentionParams& params, const OscarLaunch& launch, int64_t& bytes);
int store_pages(const OscarStoreParams& params, cudaStream_t stream);
int write_ring(const OscarStoreParams& params, cudaStream_t stream);
int probe();
}  // namespace oscar

extern "C" int oscar_store_pages(const OscarStoreParams* params, void* stream) {
  return oscar::store_pages(*params, static_cast<cudaStream_t>(stream));
}

extern "C" int oscar_attention(const OscarAttentionParams* params, const OscarLaunch* launch, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (params->cache.format.head_dim) {
    case 64: return oscar::attention<64>(*params, *launch, on);
    case 128: return oscar::attention<128>(*params, *launch, on);
    case 256: return oscar::attention<256>(*params, *launch, on);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}

extern "C" int oscar_write_ring(const OscarStoreParams* params, void* stream) {
  return oscar::write_ring(*params, static_cast<cudaStream_t>(stream));
}

extern "C" int oscar_attention_workspace(const OscarAttentionParams* params, const OscarLaunch* launch,
                                         int64_t* bytes) {
  switch (params->cache.format.head_dim) {
    case 64: return oscar::attention_workspace<64>(*params, *launch, *bytes);
    case 128: return oscar::attention_workspace<128>(*params, *launch, *bytes);
    case 256: return oscar::attention_workspace<256>(*params, *launch, *bytes);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}

extern "C" int oscar_probe() { return oscar::probe(); }
extern "C" const char* oscar_source_hash() { return OSCAR_SOURCE_HASH; }

extern "C" const char* oscar_error_string(int code) {
  switch (code) {
    case OSCAR_UNSUPPORTED_FORMAT: return "no kernel was compiled for this page format";
    case OSCAR_WORKSPACE_TOO_SMALL: return "the workspace is too small";
    case OSCAR_DEVICE_TOO_SMALL: return "the device has too little shared memory for this page format";
    case OSCAR_BAD_ARGUMENT: return "bad launch argument";
    default: return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}

extern "C" void oscar_sizes(int32_t sizes[3]) {
  sizes[0] = sizeof(OscarStoreParams);
  sizes[1] = sizeof(OscarAttentionParams);
  sizes[2] = sizeof(OscarLaunch);
}
