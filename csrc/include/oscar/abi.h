/* SPDX-License-Identifier: Apache-2.0
 * What both native libraries are called with: a step, a layer's cache, the layer's tokens.
 * vllm_oscar/ops/native.py mirrors these structs with ctypes, fills them and checks every
 * argument; the libraries trust them. All strides are in bytes. */
#pragma once

#include <stdint.h>

enum OscarDtype { OSCAR_FP32 = 0, OSCAR_BF16 = 1, OSCAR_FP16 = 2 };
enum OscarNorm { OSCAR_NORM_NONE = 0, OSCAR_NORM_HEAD = 1, OSCAR_NORM_JOINT = 2 };

enum { OSCAR_FORMAT_VERSION = 2 }; /* of core/format.py */

/* A page layout and the numbers of its encoder: core/format.py and core/config.py. */
typedef struct {
  int32_t version;                                   /* OSCAR_FORMAT_VERSION */
  int32_t head_dim, key_bits, value_bits, key_group, value_group;
  int32_t key_param_bytes;                           /* 1: e4m3, 2: fp16 */
  int32_t norm;                                      /* OscarNorm */
  int32_t first_token;                               /* the first page holds token 0 in 8 bits */
  int32_t key_gain, value_gain, integer_zero;        /* encoder only, like the clips */
  float key_clip, value_clip;
  int32_t k_codes, k_high, v_codes, v_high, k_params, v_scale, v_zero, norms;  /* offsets of the sections */
  int32_t first_key, first_value;                    /* offsets, in a first page */
  int32_t page_bytes;
  int32_t int8_ring;                                 /* core/ring.py: INT8, otherwise MODEL */
  int32_t ring_tokens;                               /* of a ring page */
} OscarFormat;

/* One step: the same for all layers. Int32 tensors; ops/step.py says what they mean. */
typedef struct {
  const int32_t* query_start_loc;                    /* [requests + 1] */
  const int32_t* seq_lens;                           /* [requests] */
  const int32_t* page_table;                         /* [requests, pages of the longest request] */
  const int32_t* ring_table;                         /* [requests, >= ring_pages] */
  const int32_t* ring_start;                         /* [requests] */
  int64_t page_table_row, ring_table_row;
  int32_t requests;
  int32_t max_query_len;                             /* no request has more tokens in this step */
} OscarStep;

/* From logits to weights: core/softmax.py. */
typedef struct {
  const float* sinks;                                /* [query heads]; null: none */
  float scale;                                       /* of the logits */
  float soft_cap;                                    /* 0: none */
  int32_t sliding_window;                            /* 0: none */
} OscarSoftmax;

/* One layer's cache: the same in all steps. */
typedef struct {
  uint8_t* pages;                                    /* [blocks, kv_heads, page_bytes] */
  uint8_t* ring;                                     /* [blocks, kv_heads, page_bytes] */
  int64_t page_block, page_head, ring_block, ring_head;
  int32_t kv_heads;
  int32_t ring_pages;                                /* of a request */
  OscarSoftmax softmax;
  OscarFormat format;
} OscarCache;

/* One of the layer's tensors: [tokens, heads, head_dim] in the model's dtype, channels contiguous. */
typedef struct {
  void* data;
  int64_t token, head;
} OscarTokens;

/* store_pages and write_ring */
typedef struct {
  OscarStep step;
  OscarCache cache;
  OscarTokens key, value;                            /* [tokens, kv_heads, head_dim] */
  int32_t dtype;                                     /* OscarDtype */
} OscarStoreParams;

/* attention */
typedef struct {
  OscarStep step;
  OscarCache cache;
  OscarTokens query, out;                            /* [tokens, kv_heads * group, head_dim] */
  OscarTokens key, value;                            /* [tokens, kv_heads, head_dim] */
  int32_t dtype;                                     /* OscarDtype */
  int32_t group;                                     /* query heads of a KV head */
} OscarAttentionParams;
