// SPDX-License-Identifier: Apache-2.0
// C ABI: dispatch by head size, errors.
#include <cuda_runtime.h>

#include "oscar/abi.h"

namespace oscar {
template <int HeadDim>
int attention(const OscarAttentionArgs& args, cudaStream_t stream);
template <int HeadDim>
int attention_workspace(const OscarAttentionArgs& args, int64_t& bytes);
}  // namespace oscar

extern "C" int oscar_attention_workspace(const OscarAttentionArgs* args, int64_t* bytes) {
  switch (args->format.head_dim) {
    case 64: return oscar::attention_workspace<64>(*args, *bytes);
    case 128: return oscar::attention_workspace<128>(*args, *bytes);
    case 256: return oscar::attention_workspace<256>(*args, *bytes);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}

extern "C" int oscar_attention(const OscarAttentionArgs* args, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->format.head_dim) {
    case 64: return oscar::attention<64>(*args, on);
    case 128: return oscar::attention<128>(*args, on);
    case 256: return oscar::attention<256>(*args, on);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}

extern "C" void oscar_abi_sizes(int32_t* attention_args, int32_t* store_args) {
  *attention_args = sizeof(OscarAttentionArgs);
  *store_args = sizeof(OscarStoreArgs);
}

extern "C" const char* oscar_error_string(int code) {
  switch (code) {
    case OSCAR_UNSUPPORTED_FORMAT: return "no kernel was compiled for this page format";
    case OSCAR_WORKSPACE_TOO_SMALL: return "the workspace is too small";
    case OSCAR_DEVICE_TOO_SMALL: return "the device has too little shared memory for this page format";
    case OSCAR_BAD_ARGUMENT: return "bad launch argument";
    default: return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
