// SPDX-License-Identifier: Apache-2.0
// Writing the newest tokens to the ring, as vllm_oscar/core/ring.py says.
#pragma once

#include "oscar_cpu.h"
#include "tokens.h"

namespace {

constexpr int kMaxTokenDim = 256;

inline void write_int8(const void* token, int dtype, int dim, uint8_t* bytes, uint8_t* scale) {
  alignas(64) float x[kMaxTokenDim];
  load_token(token, dtype, dim, x);
  const uint16_t half = to_fp16_saturating(largest_magnitude(x, dim) / 127);
  const float step = from_fp16(half);
  memcpy(scale, &half, 2);
  for (int i = 0; i < dim; i += 16)
    narrow_8(bytes + i, step > 0 ? to_signed_byte(load_f(x + i) / set_f(step)) : zero_i());
}

inline int32_t write_ring(const OscarStoreParams& a, const OscarCpuRun& run) {
  const OscarStep& step = a.step;
  const OscarCache& cache = a.cache;
  const OscarFormat& format = cache.format;
  const int dim = format.head_dim, bytes = dim * item_bytes(format.int8_ring ? kInt8 : a.dtype);
  const int per_page = format.ring_tokens, capacity = per_page * cache.ring_pages;
#pragma omp parallel for schedule(static) num_threads(run.threads) if (run.threads > 1 && step.requests > 8)
  for (int r = 0; r < step.requests; r++) {
    const oscar::StepTokens q(step, r);
    const int32_t* row = oscar::ring_row(step, r);
    for (int i = q.query_len > capacity ? q.query_len - capacity : 0; i < q.query_len; i++) {
      const int position = q.context + i;
      uint8_t* to = oscar::ring_token(cache, row, 0, position, per_page, 2 * bytes);
      const int64_t scales = format.int8_ring ? oscar::ring_scales(cache, row, 0, position, per_page, dim) - to : 0;
      for (int head = 0; head < cache.kv_heads; head++, to += cache.ring_head) {
        const void* key = oscar::token_address(a.key, q.begin + i, head);
        const void* value = oscar::token_address(a.value, q.begin + i, head);
        if (format.int8_ring) {
          write_int8(key, a.dtype, dim, to, to + scales);
          write_int8(value, a.dtype, dim, to + bytes, to + scales + 2);
        } else {
          memcpy(to, key, bytes);
          memcpy(to + bytes, value, bytes);
        }
      }
    }
  }
  return 0;
}

}  // namespace
