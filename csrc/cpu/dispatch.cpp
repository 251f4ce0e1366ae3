// SPDX-License-Identifier: Apache-2.0
// The C ABI: picks the instruction set, and the operation that is only copies.
#include <cstring>

#include "multiply.h"
#include "oscar/step.h"
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
  const OscarStep& step = params->step;
  const OscarCache& cache = params->cache;
  const int bytes = cache.format.head_dim * (params->dtype == OSCAR_FP32 ? 4 : 2);
  const int per_page = cache.format.ring_tokens, capacity = per_page * cache.ring_pages;
#pragma omp parallel for schedule(static) num_threads(run->threads) if (run->threads > 1 && step.requests > 8)
  for (int r = 0; r < step.requests; r++) {
    const oscar::StepTokens q(step, r);
    for (int i = q.query_len > capacity ? q.query_len - capacity : 0; i < q.query_len; i++) {
      uint8_t* to = oscar::ring_token(cache, oscar::ring_row(step, r), 0, q.context + i, per_page, 2 * bytes);
      for (int head = 0; head < cache.kv_heads; head++, to += cache.ring_head) {
        memcpy(to, oscar::token_address(params->key, q.begin + i, head), bytes);
        memcpy(to + bytes, oscar::token_address(params->value, q.begin + i, head), bytes);
      }
    }
  }
  return 0;
}
