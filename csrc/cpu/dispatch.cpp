// SPDX-License-Identifier: Apache-2.0
// The C ABI: picks the instruction set.
#include "multiply.h"
#include "oscar_cpu.h"

extern "C" int32_t oscar_cpu_isas() {
  int32_t isas = 1 << OSCAR_PORTABLE;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    isas |= 1 << OSCAR_AVX2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    isas |= 1 << OSCAR_AVX512;
    if (oscar_has_avx512_bf16()) isas |= 1 << OSCAR_AVX512_BF16;
    if (oscar_has_amx()) isas |= 1 << OSCAR_AMX;
  }
#endif
  return isas;
}

extern "C" int32_t oscar_cpu_format_version() { return OSCAR_FORMAT_VERSION; }

extern "C" void oscar_cpu_sizes(int32_t sizes[3]) {
  sizes[0] = sizeof(OscarStoreParams);
  sizes[1] = sizeof(OscarAttentionParams);
  sizes[2] = sizeof(OscarCpuRun);
}
extern "C" OSCAR_EXPORT const char* oscar_source_hash() { return OSCAR_SOURCE_HASH; }

static const OscarKernels& kernels(const OscarCpuRun& run) {
#if defined(__x86_64__)
  if (run.isa >= OSCAR_AVX512) return oscar_kernels_avx512;
  if (run.isa == OSCAR_AVX2) return oscar_kernels_avx2;
#endif
  return oscar_kernels_portable;
}

extern "C" int32_t oscar_cpu_store_pages(const OscarStoreParams* params, const OscarCpuRun* run) {
  return kernels(*run).store_pages(*params, *run);
}

extern "C" int32_t oscar_cpu_attention(const OscarAttentionParams* params, const OscarCpuRun* run) {
  return kernels(*run).attention(*params, *run);
}

extern "C" int32_t oscar_cpu_write_ring(const OscarStoreParams* params, const OscarCpuRun* run) {
  return kernels(*run).write_ring(*params, *run);
}
