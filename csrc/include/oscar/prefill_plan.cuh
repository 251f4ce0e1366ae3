// SPDX-License-Identifier: Apache-2.0
// Which pages each wave of a pass holds, and where: see ops/dense_prefill.py. One block takes the requests one after
// the other. A page that the wave holds already, because requests share a prefix, is not given a second slot.
#pragma once

#include "oscar/prefill.h"
#include "oscar/ptx.cuh"
#include "oscar/step.h"

namespace oscar {

constexpr int kPlanThreads = 256;

// Pages begin .. end - 1 of a request in a pass; only those before `shared` are quantized as a whole.
struct PageSpan {
  int begin, end, shared;

  OSCAR_DEVICE PageSpan(const OscarPassParams& p, int request) : begin(0), end(0), shared(0) {
    const StepTokens tokens(p.step, request);
    if (tokens.query_len <= 0 || tokens.context == 0) return;  // no history
    const int total = pages_before(tokens.context + tokens.query_len);
    const int first = first_page(p.softmax, tokens.context);
    const int full = (tokens.context / kPageTokens - first) / p.capacity * p.capacity;
    const int last = first + max(full, total - first - p.capacity);  // first page of the last pass
    begin = p.index < 0 ? last : min(first + p.index * p.capacity, last);
    end = p.index < 0 ? total : min(begin + p.capacity, last);
    shared = ring_start(p.step, p.softmax, request, tokens.context) / kPageTokens;
  }
};

// The slots of the wave's shareable pages by block: open addressing in shared memory, at most half full.
struct SlotTable {
  static constexpr int kEmpty = -1;
  int* blocks;
  int* slots;
  int size;  // a power of two

  static int size_for(int capacity) {
    int size = 64;
    while (size < 2 * capacity) size *= 2;
    return size;
  }

  OSCAR_DEVICE int start(int block) const { return static_cast<int>(block * 2654435761u >> 7) & (size - 1); }

  OSCAR_DEVICE int find(int block) const {
    int i = start(block);
    while (blocks[i] != kEmpty && blocks[i] != block) i = (i + 1) & (size - 1);
    return blocks[i] == block ? slots[i] : -1;
  }

  OSCAR_DEVICE void insert(int block, int slot) {
    int i = start(block);
    while (atomicCAS(&blocks[i], kEmpty, block) != kEmpty) i = (i + 1) & (size - 1);
    slots[i] = slot;
  }

  OSCAR_DEVICE void clear() {
    for (int i = threadIdx.x; i < size; i += kPlanThreads) blocks[i] = kEmpty;
  }
};

// How many threads of lower index have `flag`, and how many in all. By the whole block; a barrier.
OSCAR_DEVICE int rank_of(bool flag, int* warp_counts, int& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const unsigned votes = __ballot_sync(kFullWarp, flag);
  __syncthreads();  // the counts of the call before have been read
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = 0;
  total = 0;
  for (int i = 0; i < kPlanThreads / 32; ++i) {
    before += i < warp ? warp_counts[i] : 0;
    total += warp_counts[i];
  }
  return before + __popc(votes & ((1u << lane) - 1));
}

inline int plan_shared_bytes(const OscarPassParams& p) {
  return (2 * SlotTable::size_for(p.slots) + kPlanThreads / 32 + p.waves + 1) * static_cast<int>(sizeof(int));
}

static __global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const __grid_constant__ OscarPassParams p, int table_size) {
  extern __shared__ __align__(128) uint8_t raw[];
  int* memory = reinterpret_cast<int*>(raw);
  SlotTable held{memory, memory + table_size, table_size};
  int* warp_counts = memory + 2 * table_size;
  int* first_of_wave = warp_counts + kPlanThreads / 32;  // [waves + 1] requests
  const int thread = threadIdx.x;

  for (int i = thread; i < 2 * p.waves * p.slots; i += kPlanThreads) p.sources[i] = -1;
  if (thread == 0) first_of_wave[0] = 0;
  held.clear();
  __syncthreads();

  int wave = 0, used = 0, total;
  for (int r = 0; r < p.requests; ++r) {
    const int request = p.first_request + r;
    const PageSpan span(p, request);
    const int32_t* row = page_row(p.step, request);
    const auto slot_of = [&](int i) { return i < min(span.end, span.shared) ? held.find(row[i]) : -1; };
    const int count = span.end - span.begin;
    if (count > min(p.slots, p.columns)) __trap();  // the host counted other lengths: nothing would be right

    int missing = 0;
    for (int base = span.begin; base < span.end; base += kPlanThreads) {
      rank_of(base + thread < span.end && slot_of(base + thread) < 0, warp_counts, total);
      missing += total;
    }
    if (used + missing > p.slots) {
      if (++wave >= p.waves) __trap();
      used = 0;
      if (thread == 0) first_of_wave[wave] = r;
      __syncthreads();  // all have searched
      held.clear();
      __syncthreads();
    }

    int32_t* sources = p.sources + static_cast<int64_t>(wave) * p.slots * 2;
    int32_t* table = p.table + static_cast<int64_t>(r) * p.columns;
    for (int base = span.begin; base < span.end; base += kPlanThreads) {
      const int i = base + thread;
      int slot = slot_of(i);
      const bool added = i < span.end && slot < 0;
      const int rank = rank_of(added, warp_counts, total);
      if (added) {
        slot = used + rank;
        sources[2 * slot] = request;
        sources[2 * slot + 1] = i;
        if (i < span.shared) held.insert(row[i], slot);
      }
      if (i < span.end) table[i - span.begin] = slot;
      used += total;
      __syncthreads();  // what was added is found from here on
    }
    for (int i = count + thread; i < p.columns; i += kPlanThreads) table[i] = 0;
    if (thread == 0) {
      const int length = p.step.seq_lens[request];
      p.keys[r] = min(length, span.end * kPageTokens) - min(length, span.begin * kPageTokens);
    }
  }
  for (int w = wave + 1 + thread; w <= p.waves; w += kPlanThreads) first_of_wave[w] = p.requests;
  __syncthreads();

  const int32_t* starts = p.step.query_start_loc + p.first_request;
  for (int i = thread; i < p.waves * (p.requests + 1); i += kPlanThreads) {
    const int w = i / (p.requests + 1), r = i % (p.requests + 1);
    p.query_starts[i] = starts[min(max(r, first_of_wave[w]), first_of_wave[w + 1])] - starts[0];
  }
}

}  // namespace oscar
