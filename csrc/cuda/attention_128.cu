// SPDX-License-Identifier: Apache-2.0
#include "oscar/attention_launch.cuh"

namespace oscar {
template int attention<128>(const OscarAttentionParams&, const OscarLaunch&, cudaStream_t);
template int attention_workspace<128>(const OscarAttentionParams&, const OscarLaunch&, int64_t&);
}  // namespace oscar
