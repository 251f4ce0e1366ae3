/* SPDX-License-Identifier: Apache-2.0
 * The C ABI of the CUDA library: ops/cuda.py calls it. The arguments are those of oscar/abi.h;
 * here is how to launch. */
#pragma once

#include "oscar/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  OSCAR_OK = 0,
  /* positive codes are cudaError_t */
  OSCAR_UNSUPPORTED_FORMAT = -1, /* no kernel was compiled for this page layout */
  OSCAR_WORKSPACE_TOO_SMALL = -2,
  OSCAR_DEVICE_TOO_SMALL = -3,   /* a page does not fit the device's shared memory */
  OSCAR_BAD_ARGUMENT = -4
};

enum { OSCAR_COUNTER_BYTES = 65536 };

/* One launch of attention: all of a step's queries, or a part of each request's. */
typedef struct {
  void* workspace;
  uint32_t* counters;       /* OSCAR_COUNTER_BYTES of zeros before the first launch; every launch leaves zeros */
  int64_t workspace_bytes;
  int32_t first_token;      /* the queries are tokens first_token .. first_token + query_tokens - 1 of each request */
  int32_t query_tokens;
  int32_t warps;            /* per block; 0 chooses */
  int32_t tables_settled;   /* the kernel before writes neither tables nor lengths: they are read while it runs */
  int32_t deterministic;    /* no warp takes work from another: sums in the same order every time */
} OscarLaunch;

/* All return OSCAR_OK or an error code, and work on the current device. */
int oscar_store_pages(const OscarStoreParams* params, void* stream);
int oscar_attention(const OscarAttentionParams* params, const OscarLaunch* launch, void* stream);
int oscar_write_ring(const OscarStoreParams* params, void* stream);
/* Bytes of workspace that oscar_attention needs for these arguments. Read are the format, requests, kv_heads and group
 * of `params`, and query_tokens and warps of `launch`. */
int oscar_attention_workspace(const OscarAttentionParams* params, const OscarLaunch* launch, int64_t* bytes);
/* OSCAR_OK if the library holds machine code for the device. */
int oscar_probe(void);
const char* oscar_error_string(int code);
/* sizeof of OscarStoreParams, OscarAttentionParams and OscarLaunch, so that a library of another version can be refused. */
void oscar_sizes(int32_t sizes[3]);

#ifdef __cplusplus
}
#endif
