/* SPDX-License-Identifier: Apache-2.0
 * Prefill of requests with history by a dense attention kernel over 16-bit keys and values: the C ABI.
 * ops/dense_prefill.py says how passes, waves and slots belong together, and calls these. */
#pragma once

#include "oscar/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One pass of the attention over requests first_request .. first_request + requests - 1. Int32 tensors. */
typedef struct {
  OscarStep step;
  OscarSoftmax softmax;            /* of which the sliding window is read */
  int32_t* query_starts;           /* out [waves, requests + 1]: rows from that of first_request on; none unless served */
  int32_t* keys;                   /* out [requests]: tokens that the pass attends to */
  int32_t* table;                  /* out [requests, columns]: the slots of the request's pages */
  int32_t* sources;                /* out [waves, slots, 2]: request and page index of what a slot holds, or -1 */
  int32_t first_request, requests;
  int32_t index;                   /* of the pass: `capacity` pages from the index * capacity-th visible one on; -1:
                                      the last, causal one */
  int32_t capacity;                /* pages of the workspace */
  int32_t slots;                   /* of these, what a wave may use */
  int32_t columns, waves;          /* bounds that the host has found */
} OscarPassParams;

/* Fill the tensors of a pass. */
int oscar_plan_pass(const OscarPassParams* params, void* stream);

/* 16-bit keys and values of a wave: `slots` pages named by sources [slots, 2], into key and value
 * [slots, 128, kv_heads, head_dim]. Positions before ring_start are dequantized and rotated back, those before the
 * context come from the ring, the rest are the step's own tokens; rows behind the sequence's end become zeros, and so
 * do those before the sliding window if no page has to be read for others. */
int oscar_gather(const OscarStoreParams* params, const int32_t* sources, int32_t slots, void* key, void* value,
                 void* stream);

#ifdef __cplusplus
}
#endif
