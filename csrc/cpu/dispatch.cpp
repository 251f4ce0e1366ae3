// SPDX-License-Identifier: Apache-2.0
// The C ABI: picks the instruction set, and the operation that is only copies.
#include <cstring>

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

extern "C" int32_t oscar_cpu_args_size() { return sizeof(OscarArgs); }

static const OscarKernels& kernels(int32_t isa) {
#if defined(__x86_64__)
  if (isa >= OSCAR_AVX512) return oscar_kernels_avx512;
  if (isa == OSCAR_AVX2) return oscar_kernels_avx2;
#endif
  return oscar_kernels_portable;
}

extern "C" int32_t oscar_cpu_attention(const OscarArgs* args) { return kernels(args->isa).attention(*args); }
extern "C" int32_t oscar_cpu_store_pages(const OscarArgs* args) { return kernels(args->isa).store_pages(*args); }

extern "C" int32_t oscar_cpu_write_ring(const OscarArgs* args) {
  const OscarArgs& a = *args;
  const int item = a.dtype == OSCAR_FP32 ? 4 : 2;
  const int capacity = a.ring_tokens * a.ring_pages;
  const size_t bytes = static_cast<size_t>(a.head_dim) * item;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && a.requests > 8)
  for (int r = 0; r < a.requests; r++) {
    const int begin = a.query_start_loc[r], end = a.query_start_loc[r + 1];
    const int context = a.seq_lens[r] - (end - begin);
    for (int64_t row = end - begin > capacity ? end - capacity : begin; row < end; row++) {
      const int slot = static_cast<int>((row - begin + context) % capacity);
      const int64_t page = a.ring_table[r * a.ring_table_row + slot / a.ring_tokens];
      uint8_t* to = a.ring + page * a.ring_stride + slot % a.ring_tokens * 2 * bytes;
      for (int head = 0; head < a.heads; head++, to += a.ring_head) {
        memcpy(to, static_cast<const char*>(a.key) + (row * a.key_token + head * a.key_head) * item, bytes);
        memcpy(to + bytes, static_cast<const char*>(a.value) + (row * a.value_token + head * a.value_head) * item,
               bytes);
      }
    }
  }
  return 0;
}
