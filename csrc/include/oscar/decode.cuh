// SPDX-License-Identifier: Apache-2.0
// The persistent decode kernel: every warp works through its share of the batch.
#pragma once

#include "oscar/exact_attention.cuh"
#include "oscar/page_attention.cuh"
#include "oscar/pipeline.cuh"
#include "oscar/schedule.cuh"

namespace oscar {

#ifndef OSCAR_DECODE_WARPS
#define OSCAR_DECODE_WARPS 8
#endif
constexpr int kDecodeWarps = OSCAR_DECODE_WARPS;  // most warps of a block; fixes the registers of each

template <class Layout, int NTiles>
__global__ void __launch_bounds__(32 * kDecodeWarps, 1)
    decode_kernel(const __grid_constant__ AttentionParams p, int stages) {
  constexpr int kRows = 8 * NTiles, kTiles = Layout::kTiles;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  launch_dependents();  // the combine kernel waits for this grid's end itself

  const int global_warp = warp * gridDim.x + blockIdx.x;  // little work spreads over all multiprocessors
  Share share = find_share(p, kRows, global_warp, gridDim.x * warps, lane);
  if (share.count == 0) return;

  // Shared memory: per warp its page buffers, then barriers, then producer cursors.
  uint8_t* buffers = shared + warp * stages * Layout::kPageBytes;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + warps * stages * Layout::kPageBytes);
  Cursor& next = reinterpret_cast<Cursor*>(barriers + warps * stages)[warp];  // first unit not in the pipeline
  PagePipeline<Layout::kPageBytes> pipeline(buffers, barriers + warp * stages, stages, lane);
  if (lane == 0) next = share.cursor;
  int unfilled = share.count;
  int entry = share.cursor.load_entry(p);
  const auto fill = [&] {
    __syncwarp();
    Cursor c = next;
    __syncwarp();
    const bool page = c.unit < c.request.pages, copied = c.unit < c.request.copied;
    constexpr int kRingBytes = Layout::kRingTokens * Layout::kRingTokenBytes;
    pipeline.fill(c.source(p, entry), page ? Layout::kPageBytes : copied ? kRingBytes : 0);
    if (--unfilled) {
      c.advance(p, kRows);
      entry = c.load_entry(p);
      if (lane == 0) next = c;
    }
  };
  for (int i = 0; i < stages && unfilled; ++i) fill();

  const float scale_log2 = p.args.scale * 1.4426950408889634f;
  Cursor& at = share.cursor;
  QueryRows<kTiles> query[NTiles];
  Accumulator<kTiles> acc[NTiles];
  bool opened_part = false;  // whether this warp holds the part's first unit

  for (int i = 0; i < share.count; ++i) {
    const Request& request = at.request;
    const bool is_page = at.unit < request.pages;
    const bool first_of_part = at.unit == (is_page ? 0 : request.pages);
    const bool last_of_part = at.unit + 1 == (is_page ? request.pages : request.units);
    const int first_row = at.row_block * kRows;
    const int rows = min(request.rows - first_row, kRows);

    if (i == 0 || first_of_part) {
      opened_part = first_of_part;
#pragma unroll
      for (int n = 0; n < NTiles; ++n) {
        acc[n].reset();
        const int row = first_row + 8 * n + g;
        const uint8_t* source = nullptr;
        if (8 * n + g < rows) {
          const int64_t token = request.begin + p.args.first_token + row / p.args.group;
          source = static_cast<const uint8_t*>(p.args.query) + token * p.args.query_token +
                   (at.head * p.args.group + row % p.args.group) * p.args.query_head;
        }
        if (is_page) query[n].load_rotated(source, p.args.is_bf16, scale_log2, lane);
        else query[n].load_exact(source, lane);
      }
    }

    uint8_t* page = pipeline.wait();
    if (is_page) {
      const int valid = request.ring_start - at.unit * kPageTokens;
      if (valid < kPageTokens) clear_value_params<Layout>(page, valid, lane);
      attend_page<Layout, NTiles>(page, at.unit == 0, valid, query, acc, lane);
      if (valid < kPageTokens) fence_before_async_copy();
    } else {
      ExactTokens tokens;
      bool readable;
      if (at.unit < request.copied) {
        constexpr int kTokens = Layout::kRingTokens;
        const int capacity = kTokens * p.args.ring_pages;
        const int slot = (at.unit - request.pages) * kTokens + lane;
        const int age = slot - request.ring_start % capacity;  // from the oldest token on, cyclic
        readable = lane < kTokens && (age < 0 ? age + capacity : age) < request.context - request.ring_start;
        tokens.key = page;
        tokens.value = page + Layout::kRingTokenBytes / 2;
        tokens.key_stride = tokens.value_stride = Layout::kRingTokenBytes;
        tokens.position = -kInFlightTokens;  // visible to every row
      } else {
        tokens.position = (at.unit - request.copied) * kInFlightTokens;
        readable = tokens.position + lane < request.query_len;
        const int64_t token = request.begin + tokens.position;
        tokens.key = static_cast<const uint8_t*>(p.args.key) + token * p.args.key_token + at.head * p.args.key_head;
        tokens.value =
            static_cast<const uint8_t*>(p.args.value) + token * p.args.value_token + at.head * p.args.value_head;
        tokens.key_stride = p.args.key_token;
        tokens.value_stride = p.args.value_token;
      }
      tokens.valid = __ballot_sync(kFullWarp, readable);
      const int row_of_step = first_row + p.args.first_token * p.args.group;
      if (p.args.is_bf16) attend_tokens<true>(tokens, query, row_of_step, p.args.group, scale_log2, acc, lane);
      else attend_tokens<false>(tokens, query, row_of_step, p.args.group, scale_log2, acc, lane);
    }
    pipeline.release();
    if (unfilled) fill();

    if (last_of_part || i + 1 == share.count) {
      const int part = 2 * segment_index(p, at.index, at.head, at.row_block) + (is_page ? 0 : 1);
      const int slot = global_warp + part;
#pragma unroll
      for (int n = 0; n < NTiles; ++n) {
        float* target = p.partial + (static_cast<int64_t>(slot) * p.slot_rows + 8 * n) * Layout::kHeadDim;
        if (is_page) write_page_result<Layout>(acc[n], target, rows - 8 * n, lane);
        else write_exact_result(acc[n], target, rows - 8 * n, lane);
        if (g == 0) {
          float2* max_sum = p.max_sum + static_cast<int64_t>(slot) * p.slot_rows + 8 * n;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (8 * n + 2 * t + c < rows) max_sum[2 * t + c] = make_float2(acc[n].maximum[c], acc[n].extra[2 + c]);
          }
        }
      }
      if (lane == 0) {
        if (opened_part) p.ranges[part].x = slot;
        if (last_of_part) p.ranges[part].y = slot;
      }
    }
    if (i + 1 < share.count) at.advance(p, kRows);
  }
}

}  // namespace oscar
