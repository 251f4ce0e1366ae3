// SPDX-License-Identifier: Apache-2.0
// Division of a decode batch among a fixed grid of warps, computed on the device.
//
// A segment is (request, KV head, row block), a row block being up to kRows query
// rows. Its units of work are, in order,
//   pages     128 quantized tokens each
//   ring      one ring page of 16-bit tokens each
//   in-flight 32 of the step's own tokens each
// and all cost about the same. The units of all segments form one line, of which
// every warp takes an equal, contiguous share; so a segment is shared by neighbouring
// warps, and a warp touches few segments. The result of a warp for one part (pages, or
// ring and in-flight tokens) of a segment goes to slot `warp + 2 * segment + part`:
// unique, since along the line each new result has a larger warp or a larger part.
#pragma once

#include "oscar/abi.h"
#include "oscar/layout.cuh"
#include "oscar/ptx.cuh"

namespace oscar {

constexpr int kInFlightTokens = 32;

struct AttentionParams {
  OscarAttentionArgs args;
  int row_blocks;   // upper bound, from max_query_len
  int slot_rows;    // rows that a slot holds
  int2* ranges;     // per part of a segment: first and last slot
  float2* max_sum;  // [slot][row]: maximum in log2 units, sum of weights
  float* partial;   // [slot][row][channel]
};

// The per-request numbers that everything else derives from.
struct Request {
  int begin, query_len, context, ring_start;  // query_len: all of the step's tokens
  int rows;                                   // query rows of this call
  int row_blocks, pages, copied, units;  // copied: pages and ring pages

  Request() = default;
  OSCAR_DEVICE Request(const AttentionParams& p, int request, int block_rows) {
    begin = p.args.query_start_loc[request];
    query_len = p.args.query_start_loc[request + 1] - begin;
    context = max(p.args.seq_lens[request] - query_len, 0);
    ring_start = min(max(p.args.ring_start[request], 0), context);
    const int tokens = max(min(query_len - p.args.first_token, p.args.max_query_len), 0);
    rows = tokens * p.args.group;
    row_blocks = (rows + block_rows - 1) / block_rows;
    pages = (ring_start + kPageTokens - 1) / kPageTokens;
    copied = pages + (context > ring_start ? p.args.ring_pages : 0);
    units = copied + (p.args.first_token + tokens + kInFlightTokens - 1) / kInFlightTokens;
  }
};

OSCAR_DEVICE int segment_index(const AttentionParams& p, int request, int head, int row_block) {
  return (request * p.args.kv_heads + head) * p.row_blocks + row_block;
}

// A position on the line of units.
struct Cursor {
  Request request;
  int index, head, row_block, unit;

  OSCAR_DEVICE bool in_pages() const { return unit < request.pages; }
  OSCAR_DEVICE bool in_ring() const { return unit >= request.pages && unit < request.copied; }

  // One past the units of the same kind that begin here.
  OSCAR_DEVICE int run_end() const {
    return in_pages() ? request.pages : in_ring() ? request.copied : request.units;
  }

  // To `next`, a unit of this segment or its end, and then to the next segment; the caller
  // knows that there is one.
  OSCAR_DEVICE void move_to(int next, const AttentionParams& p, int block_rows) {
    unit = next;
    if (unit < request.units) return;
    unit = 0;
    if (++row_block < request.row_blocks) return;
    row_block = 0;
    if (++head < p.args.kv_heads) return;
    head = 0;
    do {
      request = Request(p, ++index, block_rows);
    } while (request.row_blocks == 0);
  }
};

// Walks the line one unit ahead of the computation, and the tables two units ahead.
class Producer {
 public:
  enum Kind { kPage, kRing, kInFlight, kEnd };

  // `cursor`: this warp's own, in shared memory: registers are scarce and it is rarely needed.
  OSCAR_DEVICE Producer(const AttentionParams& p, Cursor* cursor, int units, int block_rows, int lane)
      : p_(p), cursor_(cursor), units_(units), block_rows_(block_rows), lane_(lane) {
    start_run(*cursor);
  }

  OSCAR_DEVICE Kind kind() const { return kind_; }

  // The page or ring page of the current unit.
  OSCAR_DEVICE const uint8_t* source() const {
    return base_ + static_cast<int64_t>(entry_) * (kind_ == kPage ? p_.args.page_block : p_.args.ring_block);
  }

  OSCAR_DEVICE void advance() {
    if (--units_ == 0) {
      kind_ = kEnd;
    } else if (--left_) {
      if (kind_ == kInFlight) return;
      entry_ = ahead_;
      ++table_;
      if (left_ > 1) ahead_ = table_[1];
    } else {
      __syncwarp();
      Cursor c = *cursor_;
      __syncwarp();
      c.move_to(c.run_end(), p_, block_rows_);
      if (lane_ == 0) *cursor_ = c;
      start_run(c);
    }
  }

 private:
  OSCAR_DEVICE void start_run(const Cursor& c) {
    const OscarAttentionArgs& args = p_.args;
    left_ = c.run_end() - c.unit;
    kind_ = c.in_pages() ? kPage : c.in_ring() ? kRing : kInFlight;
    if (kind_ == kInFlight) return;
    const bool page = kind_ == kPage;
    base_ = page ? static_cast<const uint8_t*>(args.pages) + c.head * args.page_head
                 : static_cast<const uint8_t*>(args.ring) + c.head * args.ring_head;
    const int64_t row = c.index * (page ? args.block_table_row : args.ring_table_row);
    table_ = reinterpret_cast<const int*>(reinterpret_cast<const uint8_t*>(page ? args.block_table : args.ring_table) +
                                          row) +
             (page ? c.unit : c.unit - c.request.pages);
    entry_ = *table_;
    if (left_ > 1) ahead_ = table_[1];
  }

  const AttentionParams& p_;
  Cursor* cursor_;
  int units_, left_, block_rows_, lane_;
  Kind kind_;
  int entry_ = 0, ahead_ = 0;  // of the table: this unit's and the next one's
  const int* table_ = nullptr;
  const uint8_t* base_ = nullptr;
};

// One warp's share of the line: `count` units from `cursor` on.
struct Share {
  Cursor cursor;
  int count;
};

// With less work than warps, the first ones take one unit each, so that slots have no gaps.
OSCAR_DEVICE Share find_share(const AttentionParams& p, int block_rows, int warp, int warps, int lane) {
  const auto cost = [&](int request) {
    if (request >= p.args.requests) return 0;
    const Request r(p, request, block_rows);
    return p.args.kv_heads * r.row_blocks * r.units;
  };
  int total = 0;
  for (int base = 0; base < p.args.requests; base += 32) total += cost(base + lane);
  total = __reduce_add_sync(kFullWarp, total);

  Share share;
  share.count = 0;
  const int active = min(total, warps);
  if (warp >= active) return share;
  // total * warp / active without a 64-bit division, which takes 0.3 us.
  const unsigned each = static_cast<unsigned>(total) / active, rest = total - each * active;
  const int begin = each * warp + rest * warp / active;
  share.count = each * (warp + 1) + rest * (warp + 1) / active - begin;

  int before = 0;  // units of the requests before `base`
  for (int base = 0;; base += 32) {
    const int own = cost(base + lane);
    int upto = own;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const int other = __shfl_up_sync(kFullWarp, upto, d);
      if (lane >= d) upto += other;
    }
    const unsigned beyond = __ballot_sync(kFullWarp, before + upto > begin);
    if (beyond) {
      const int found = __ffs(beyond) - 1;
      Cursor& c = share.cursor;
      c.index = base + found;
      c.request = Request(p, c.index, block_rows);
      int inside = begin - before - __shfl_sync(kFullWarp, upto - own, found);
      c.unit = inside % c.request.units;
      inside /= c.request.units;
      c.row_block = inside % c.request.row_blocks;
      c.head = inside / c.request.row_blocks;
      return share;
    }
    before += __shfl_sync(kFullWarp, upto, 31);
  }
}

}  // namespace oscar
