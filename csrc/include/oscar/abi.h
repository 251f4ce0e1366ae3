/* SPDX-License-Identifier: Apache-2.0
 * C ABI of the CUDA library. vllm_oscar/ops/cuda.py mirrors these structs with ctypes;
 * oscar_abi_sizes() lets it check that both sides agree. All strides are in bytes.
 * The tensor arguments mean what vllm_oscar/ops/reference.py says. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  OSCAR_OK = 0,
  /* positive codes are cudaError_t */
  OSCAR_UNSUPPORTED_FORMAT = -1, /* no kernel was compiled for this page layout */
  OSCAR_WORKSPACE_TOO_SMALL = -2,
  OSCAR_DEVICE_TOO_SMALL = -3, /* a page does not fit the device's shared memory */
  OSCAR_BAD_ARGUMENT = -4
};

enum { OSCAR_COUNTER_BYTES = 65536 };

typedef struct {
  int32_t head_dim, key_bits, key_group, value_group;
  int32_t fp8_params;      /* key scales and zeros are e4m3, otherwise fp16 */
  int32_t norm;            /* 0 none, 1 per head, 2 joint over the KV heads */
  int32_t exact_first_key;
  int32_t integer_zero;    /* store only, like the clips */
  float key_clip, value_clip;
} OscarFormat;

typedef struct {
  void* out;
  const void *query, *key, *value;
  const void *pages, *ring;
  const int32_t *block_table, *ring_table, *query_start_loc, *seq_lens, *ring_start;
  void* workspace;
  uint32_t* counters; /* OSCAR_COUNTER_BYTES of zeros before the first call; every call leaves zeros */
  int64_t workspace_bytes;
  int64_t out_token, out_head, query_token, query_head, key_token, key_head, value_token, value_head;
  int64_t page_block, page_head, ring_block, ring_head, block_table_row, ring_table_row;
  int32_t requests, kv_heads, group, ring_pages, is_bf16;
  /* Tokens first_token .. first_token + max_query_len - 1 of each request are queries of this call. */
  int32_t max_query_len, first_token;
  float scale;
  int32_t warps; /* per block; 0 chooses */
  /* The kernel launched before this one writes none of the tables and lengths: they are read while it runs. */
  int32_t tables_ready;
  int32_t deterministic; /* no warp takes work from another: sums in the same order every time */
  OscarFormat format;
} OscarAttentionArgs;

typedef struct {
  const void *key, *value;
  void *pages, *ring;
  const int32_t *block_table, *ring_table, *query_start_loc, *seq_lens;
  int64_t key_token, key_head, value_token, value_head;
  int64_t page_block, page_head, ring_block, ring_head, block_table_row, ring_table_row;
  int32_t requests, kv_heads, max_query_len, ring_pages, is_bf16;
  OscarFormat format;
} OscarStoreArgs;

/* Bytes of workspace that oscar_attention needs for these arguments (pointers and strides
 * are not read); the current device counts. Returns OSCAR_OK or an error code. */
int oscar_attention_workspace(const OscarAttentionArgs* args, int64_t* bytes);
int oscar_attention(const OscarAttentionArgs* args, void* stream);
int oscar_store_pages(const OscarStoreArgs* args, void* stream);
int oscar_write_ring(const OscarStoreArgs* args, void* stream);
/* OSCAR_OK if the library holds machine code for the current device. */
int oscar_probe(void);
void oscar_abi_sizes(int32_t* attention_args, int32_t* store_args);
const char* oscar_error_string(int code);

#ifdef __cplusplus
}
#endif
