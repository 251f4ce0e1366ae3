// SPDX-License-Identifier: Apache-2.0
// The C ABI of the CPU library. ops/cpu.py fills OscarArgs; it alone checks arguments.
#pragma once

#include <cstdint>

#define OSCAR_EXPORT __attribute__((visibility("default")))

extern "C" {

enum OscarDtype : int32_t { OSCAR_FP32 = 0, OSCAR_BF16 = 1, OSCAR_FP16 = 2 };
enum OscarNorm : int32_t { OSCAR_NORM_NONE = 0, OSCAR_NORM_HEAD = 1, OSCAR_NORM_JOINT = 2 };
enum OscarIsa : int32_t { OSCAR_PORTABLE = 0, OSCAR_AVX2 = 1, OSCAR_AVX512 = 2, OSCAR_AVX512_BF16 = 3, OSCAR_AMX = 4 };

// One description of a step serves the three operations; each reads what it needs.
// Tensor strides count elements, strides of pages and ring count bytes.
struct OscarArgs {
  // The page layout: format.py.
  int32_t head_dim, key_bits, key_group, value_group;
  int32_t key_param_bytes;  // 1: e4m3, 2: fp16
  int32_t norm, integer_zero, exact_first_key;
  int64_t k_codes, k_high, v_codes, k_params, v_scale, v_zero, norms, page_bytes;
  float key_clip, value_clip;

  // The step.
  float scale;
  int32_t dtype, requests, heads, query_heads, ring_pages, ring_tokens;  // ring_tokens: per page
  int32_t threads, isa;
  const void *query, *key, *value;
  void* out;
  uint8_t *pages, *ring;
  const int32_t *block_table, *ring_table, *query_start_loc, *seq_lens, *ring_start;
  const float *hadamard, *hadamard_t;  // [head_dim, head_dim], H and its transpose
  int64_t query_token, query_head, key_token, key_head, value_token, value_head, out_token, out_head;
  int64_t page_stride, page_head, ring_stride, ring_head, block_table_row, ring_table_row;
};

// Instruction sets that both this build and this machine have, as bits 1 << OscarIsa.
OSCAR_EXPORT int32_t oscar_cpu_isas();
// sizeof(OscarArgs), so that the binding can refuse a library of another version.
OSCAR_EXPORT int32_t oscar_cpu_args_size();

// 0, or 1 when memory for scratch is missing.
OSCAR_EXPORT int32_t oscar_cpu_attention(const OscarArgs* args);
OSCAR_EXPORT int32_t oscar_cpu_store_pages(const OscarArgs* args);
OSCAR_EXPORT int32_t oscar_cpu_write_ring(const OscarArgs* args);
}

// The entry points of one instruction set.
struct OscarKernels {
  int32_t (*attention)(const OscarArgs&);
  int32_t (*store_pages)(const OscarArgs&);
};
extern const OscarKernels oscar_kernels_portable, oscar_kernels_avx2, oscar_kernels_avx512;
