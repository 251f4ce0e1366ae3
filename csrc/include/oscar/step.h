// SPDX-License-Identifier: Apache-2.0
// Where a request's tokens are: request arithmetic, page and ring addresses, on host and device.
#pragma once

#include "oscar/abi.h"

#ifdef __CUDACC__
#define OSCAR_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a copy compiled for AVX-512 must not be the one that other objects of the library are linked to.
#define OSCAR_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace oscar {

constexpr int kPageTokens = 128;

// The step's tokens of one request: rows begin .. begin + query_len - 1 are positions context, context + 1, ...
struct StepTokens {
  int begin, query_len, context;

  StepTokens() = default;
  OSCAR_HOST_DEVICE StepTokens(const OscarStep& step, int request) {
    begin = step.query_start_loc[request];
    query_len = step.query_start_loc[request + 1] - begin;
    context = step.seq_lens[request] - query_len;
    if (context < 0) context = 0;  // a padded request
  }
};

// First position that the token at `position` sees.
OSCAR_HOST_DEVICE int first_visible(const OscarSoftmax& softmax, int position) {
  const int first = softmax.sliding_window > 0 ? position + 1 - softmax.sliding_window : 0;
  return first > 0 ? first : 0;
}

// First position that attention reads from the ring, which may hold tokens that no token of the step sees; visible
// ones before it come from pages.
OSCAR_HOST_DEVICE int ring_start(const OscarStep& step, const OscarSoftmax& softmax, int request, int context) {
  const int held = step.ring_start[request] < context ? step.ring_start[request] : context;
  const int first = first_visible(softmax, context);
  return held > first ? held : first;
}

OSCAR_HOST_DEVICE int pages_before(int position) { return (position + kPageTokens - 1) / kPageTokens; }

// The first page that attention reads: blocks of those before it may be free, and their table entries stale.
// Its tokens before first_visible(softmax, context) are not read. It reads pages up to pages_before(ring_start),
// and none if ring_start is the first visible position.
OSCAR_HOST_DEVICE int first_page(const OscarSoftmax& softmax, int context) {
  return first_visible(softmax, context) / kPageTokens;
}

OSCAR_HOST_DEVICE const int32_t* table_row(const int32_t* table, int64_t row_bytes, int request) {
  return reinterpret_cast<const int32_t*>(reinterpret_cast<const uint8_t*>(table) + request * row_bytes);
}

OSCAR_HOST_DEVICE const int32_t* page_row(const OscarStep& step, int request) {
  return table_row(step.page_table, step.page_table_row, request);
}

OSCAR_HOST_DEVICE const int32_t* ring_row(const OscarStep& step, int request) {
  return table_row(step.ring_table, step.ring_table_row, request);
}

OSCAR_HOST_DEVICE uint8_t* page_address(const OscarCache& cache, int block, int head) {
  return cache.pages + block * cache.page_block + head * cache.page_head;
}

OSCAR_HOST_DEVICE uint8_t* ring_page_address(const OscarCache& cache, int block, int head) {
  return cache.ring + block * cache.ring_block + head * cache.ring_head;
}

// A position's key in the ring whose table row is `row`; its value follows it. token_bytes: of both, without scales.
// The ring's geometry comes as arguments where it is a constant of the kernel.
OSCAR_HOST_DEVICE uint8_t* ring_token(const OscarCache& cache, const int32_t* row, int head, int position,
                                      int tokens_per_page, int token_bytes) {
  const int slot = position % (tokens_per_page * cache.ring_pages);
  return ring_page_address(cache, row[slot / tokens_per_page], head) +
         static_cast<int64_t>(slot % tokens_per_page) * token_bytes;
}

// The fp16 scale of a position's key in an int8 ring; its value's follows it. Scales stand behind the page's tokens.
OSCAR_HOST_DEVICE uint8_t* ring_scales(const OscarCache& cache, const int32_t* row, int head, int position,
                                       int tokens_per_page, int head_dim) {
  const int slot = position % (tokens_per_page * cache.ring_pages);
  return ring_page_address(cache, row[slot / tokens_per_page], head) +
         static_cast<int64_t>(tokens_per_page) * 2 * head_dim + slot % tokens_per_page * 4;
}

// A head of a row of the step's tokens.
OSCAR_HOST_DEVICE uint8_t* token_address(const OscarTokens& tokens, int64_t row, int head) {
  return static_cast<uint8_t*>(tokens.data) + row * tokens.token + head * tokens.head;
}

}  // namespace oscar
