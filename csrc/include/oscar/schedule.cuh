// SPDX-License-Identifier: Apache-2.0
// Division of a decode batch among a fixed grid of warps, computed on the device.
//
// A segment is (request, KV head, row block), a row block being up to kRows query
// rows. Its units of work are, in order,
//   ring      one ring page each, as far as it holds any tokens that are needed
//   in-flight 32 of the step's own tokens each
//   pages     128 quantized tokens each, from the first one on of which a token is visible
// and all cost about the same. The units of all segments form one line, of which
// every warp takes an equal, contiguous share, by its rank; so a segment is shared by
// warps of neighbouring ranks, and a warp touches few segments. The result of a warp for one
// part (ring and in-flight tokens, or pages) of a segment goes to slot `rank + 2 * segment +
// part`: unique, since along the line each new result has a larger rank or a larger part.
//
// Multiprocessors do not get the same share of the memory's bandwidth. So a warp that has
// done its share takes pages from the ends of other shares, as long as they are of the
// segment whose result it already holds: that costs no further result. Those pages are
// claimed one by one, in a counter per share, by their owner too.
#pragma once

#include "oscar/launch.h"
#include "oscar/ptx.cuh"
#include "oscar/softmax.cuh"
#include "oscar/step.h"

namespace oscar {

constexpr int kInFlightTokens = 32;

// What both kernels of attention are launched with.
struct DecodeParams : OscarAttentionParams {
  OscarLaunch launch;
  SoftCap soft_cap;
  int reach;         // how many tokens each one sees, itself included: the sliding window, or more than there are
  int row_blocks;    // upper bound, from launch.query_tokens
  int slot_rows;     // rows that a slot holds
  int warps;         // of the grid
  int few_warps;     // of these, with little work in long segments
  int few_time;      // for a unit when few warps take part, in tenths of the time when all do
  uint32_t* claims;  // per rank: pages claimed by its warp and, times kStolen, by others; zero between launches
  int2* ranges;      // per part of a segment: first and last slot
  float2* max_sum;   // [slot][row]: maximum in log2 units, sum of weights
  float* partial;    // [slot][row][channel]
};

// What is constant in a decode kernel.
struct Tiling {
  int rows;         // of a row block
  int ring_tokens;  // of a ring page
  bool take;        // whether warps take pages from each other
  bool plain;       // neither sliding window nor soft-cap: asking in every unit took up to 6 % of the time
};

// The per-request numbers that everything else derives from.
struct Request : StepTokens {
  int first;                           // position that the first token of the step sees
  int seen_by_all;                     // positions from here on are visible to all tokens of the step
  int ring_start;
  int rows;                            // query rows of this launch
  int ring_first;                      // index of the ring page that holds the oldest token
  int row_blocks, ring, recent, units;  // units: of the ring, with those in flight, all

  Request() = default;
  OSCAR_DEVICE Request(const DecodeParams& p, int request, const Tiling& tiling) : StepTokens(p.step, request) {
    const OscarSoftmax softmax = tiling.plain ? OscarSoftmax{} : p.cache.softmax;
    first = first_visible(softmax, context);
    seen_by_all = first_visible(softmax, context + query_len - 1);
    ring_start = oscar::ring_start(p.step, softmax, request, context);
    const int tokens = max(min(query_len - p.launch.first_token, p.launch.query_tokens), 0);
    rows = tokens * p.group;
    row_blocks = (rows + tiling.rows - 1) / tiling.rows;
    const int capacity = tiling.ring_tokens * p.cache.ring_pages, held = context - ring_start;
    ring_first = 0;
    ring = held > 0 ? p.cache.ring_pages : 0;
    if (held > 0 && held <= capacity - tiling.ring_tokens) {  // not every page; a full ring is spared the divisions
      const int oldest = ring_start % capacity;
      ring_first = oldest / tiling.ring_tokens;
      ring = (oldest % tiling.ring_tokens + held + tiling.ring_tokens - 1) / tiling.ring_tokens;
    }
    recent = ring + (p.launch.first_token + tokens + kInFlightTokens - 1) / kInFlightTokens;
    units = recent + (ring_start > first ? pages_before(ring_start) - first / kPageTokens : 0);
  }
};

OSCAR_DEVICE int segment_index(const DecodeParams& p, int request, int head, int row_block) {
  return (request * p.cache.kv_heads + head) * p.row_blocks + row_block;
}

// A position on the line of units.
struct Cursor {
  Request request;
  int index, head, row_block, unit;

  OSCAR_DEVICE bool in_pages() const { return unit >= request.recent; }
  OSCAR_DEVICE bool in_ring() const { return unit < request.ring; }

  // One past the units of the same kind that begin here.
  OSCAR_DEVICE int run_end() const {
    return in_pages() ? request.units : in_ring() ? request.ring : request.recent;
  }

  // To `next`, a unit of this segment or its end, and then to the next segment; the caller
  // knows that there is one.
  OSCAR_DEVICE void move_to(int next, const DecodeParams& p, const Tiling& tiling) {
    unit = next;
    if (unit < request.units) return;
    unit = 0;
    if (++row_block < request.row_blocks) return;
    row_block = 0;
    if (++head < p.cache.kv_heads) return;
    head = 0;
    do {
      request = Request(p, ++index, tiling);
    } while (request.row_blocks == 0);
  }
};

// Equal, contiguous shares of the line.
struct Shares {
  unsigned each, rest;  // units of a share, and what is left over
  int active;           // shares
  OSCAR_DEVICE int begin(int warp) const {  // without a 64-bit division, which takes 0.3 us
    return each * warp + rest * warp / active;
  }
};

constexpr unsigned kStolen = 1u << 16;
constexpr int kMostOpen = 1 << 14;  // so that neither half of a counter overflows
constexpr int kTogether = 4;  // warps that do not slow each other down on one multiprocessor: one for each scheduler
constexpr unsigned kLeastShare = 5;  // to look for more work after smaller shares took 2 to 5 % of the time

// What a producer keeps in shared memory: registers are scarce, and this is rarely needed.
struct Walk {
  Cursor cursor;        // start of the run
  const uint8_t* base;  // of the pages or ring pages of the head
  const int* table;     // row of the request, from the first page or ring page on that is read
  Shares shares;
  int rank;        // of this warp
  int first, end;  // on the line: the pages of the segment in which its share ends
  int wrap;        // the first index in the table that means an entry ring_pages before it

  // Pages at the end of a warp's share that have to be claimed. Not the first one, so that
  // every owner has a result.
  OSCAR_DEVICE int open(int warp) const {
    const int stop = shares.begin(warp + 1);
    return stop <= first || stop > end ? 0 : min(stop - max(shares.begin(warp), first) - 1, kMostOpen);
  }
};

OSCAR_DEVICE int claimed(unsigned claims) { return static_cast<int>(claims % kStolen + claims / kStolen); }

// Walks the line one unit ahead of the computation, and the tables two units ahead.
class Producer {
 public:
  enum Kind { kPage, kRing, kInFlight, kWanted, kEnd };  // kWanted: none yet, for take() to find

  // `walk`: this warp's own, with cursor, shares and rank.
  OSCAR_DEVICE Producer(const DecodeParams& p, Walk* walk, int units, const Tiling& tiling, int lane)
      : p_(p), walk_(walk), units_(units), tiling_(tiling), lane_(lane) {
    start_run(walk->cursor);
  }

  OSCAR_DEVICE Kind kind() const { return kind_; }

  // Whether the current unit belongs to the same run as the one before.
  OSCAR_DEVICE bool continues() const { return continues_; }

  // The page that the current unit is, counted from the first one that is read.
  OSCAR_DEVICE int page() const { return page_; }

  // The page or ring page of the current unit.
  OSCAR_DEVICE const uint8_t* source() const {
    return walk_->base + static_cast<int64_t>(entry_) * (kind_ == kPage ? p_.cache.page_block : p_.cache.ring_block);
  }

  // To the next unit. One that has to be claimed is not certain before confirm(): a claim takes a while.
  OSCAR_DEVICE void advance() {
    --units_;
    if (units_ <= open_) {
      if (units_ > 0) {
        if (lane_ == 0) claims_ = atomicAdd(p_.claims + walk_->rank, 1u);
        next_in_run();
      } else {
        claims_ = neighbours_claims();
        kind_ = kWanted;
      }
    } else if (units_ == 0) {
      kind_ = kEnd;
      continues_ = false;
    } else if (left_ > 1) {
      next_in_run();
    } else {
      __syncwarp();
      Cursor c = walk_->cursor;
      __syncwarp();
      c.move_to(c.run_end(), p_, tiling_);
      if (lane_ == 0) walk_->cursor = c;
      start_run(c);
    }
  }

  // Give up a claimed unit that others took before.
  OSCAR_DEVICE void confirm() {
    if (units_ <= open_ && units_ > 0 && claimed(__shfl_sync(kFullWarp, claims_, 0)) >= open_) kind_ = kWanted;
  }

  // Where kWanted: take a page from the neighbour that has the most left to claim.
  OSCAR_DEVICE void take() {
    if (units_ > 0) claims_ = neighbours_claims();  // others have taken the rest of this share
    units_ = 0;
    while (true) {  // every lane has read the claims of one neighbour
      const int other = neighbour();
      const bool exists = other >= 0 && other < walk_->shares.active;
      const int remaining = exists ? max(walk_->open(other) - claimed(claims_), 0) : 0;
      const int best = __reduce_max_sync(kFullWarp, 32 * remaining + lane_);
      if (best < 32) {
        kind_ = kEnd;
        continues_ = false;
        return;
      }
      const int from = neighbour() - lane_ + best % 32;
      if (lane_ == 0) claims_ = atomicAdd(p_.claims + from, kStolen);
      const unsigned claims = __shfl_sync(kFullWarp, claims_, 0);
      if (claimed(claims) < walk_->open(from)) {
        page_ = walk_->shares.begin(from + 1) - 1 - static_cast<int>(claims / kStolen) - walk_->first;
        entry_ = entry(page_);
        kind_ = kPage;
        continues_ = true;
        return;
      }
      claims_ = neighbours_claims();
    }
  }

 private:
  OSCAR_DEVICE void start_run(const Cursor& c) {
    continues_ = false;
    left_ = c.run_end() - c.unit;
    kind_ = c.in_pages() ? kPage : c.in_ring() ? kRing : kInFlight;
    if (kind_ == kInFlight) return;
    const bool page = kind_ == kPage;
    page_ = page ? c.unit - c.request.recent : c.unit;
    const int32_t* row = page ? page_row(p_.step, c.index) : ring_row(p_.step, c.index);
    const uint8_t* base = page ? page_address(p_.cache, 0, c.head) : ring_page_address(p_.cache, 0, c.head);
    if (lane_ == 0) {
      walk_->table = row + (page ? c.request.first / kPageTokens : c.request.ring_first);
      walk_->wrap = page ? INT32_MAX : p_.cache.ring_pages - c.request.ring_first;
      walk_->base = base;
    }
    const bool last = page && units_ <= left_;  // the share ends in these pages
    if (tiling_.take && last && walk_->shares.each >= kLeastShare && !p_.launch.deterministic) {
      open_ = min(units_ - 1, kMostOpen);
      if (lane_ == 0) {
        const int here = walk_->shares.begin(walk_->rank + 1) - units_;
        walk_->first = here - page_;
        walk_->end = here + left_;
      }
    }
    __syncwarp();
    entry_ = entry(page_);
    if (left_ > 1) ahead_ = entry(page_ + 1);
  }

  OSCAR_DEVICE int entry(int i) const { return walk_->table[i < walk_->wrap ? i : i - p_.cache.ring_pages]; }

  OSCAR_DEVICE void next_in_run() {
    continues_ = true;
    --left_;
    if (kind_ == kInFlight) return;
    ++page_;
    entry_ = ahead_;
    if (left_ > 1) ahead_ = entry(page_ + 1);
  }

  // The neighbour that this lane looks after.
  OSCAR_DEVICE int neighbour() const { return walk_->rank - 16 + lane_; }  // as many before as after this warp

  OSCAR_DEVICE unsigned neighbours_claims() const {
    const int other = neighbour();
    return other >= 0 && other < walk_->shares.active ? __ldcg(p_.claims + other) : 0;
  }

  const DecodeParams& p_;
  Walk* walk_;
  Tiling tiling_;
  int units_, left_, lane_;  // units_: of the share, from the current one on
  Kind kind_;
  bool continues_;
  int open_ = -1;  // the last units of the share that have to be claimed; negative: and nothing to steal
  unsigned claims_ = 0;
  int page_ = 0, entry_ = 0, ahead_ = 0;  // entries of the table: this unit's and the next one's
};

// One warp's share of the line: `count` units from `cursor` on.
struct Share {
  Shares shares;
  Cursor cursor;
  int rank, count;
};

// Of warp `warp` of the block. With less work than warps, the first ranks take one unit each: no gaps in the slots.
OSCAR_DEVICE Share find_share(const DecodeParams& p, const Tiling& tiling, int warp, int lane) {
  const int blocks = gridDim.x;
  const auto cost = [&](int request) {
    if (request >= p.step.requests) return 0;
    const Request r(p, request, tiling);
    return p.cache.kv_heads * r.row_blocks * r.units;
  };
  int own = cost(lane), total = own;
  for (int base = 32; base < p.step.requests; base += 32) total += cost(base + lane);
  total = __reduce_add_sync(kFullWarp, total);

  // Few warps get through a unit sooner, but wait longer between segments.
  const int segments = p.step.requests * p.cache.kv_heads * p.row_blocks;
  const auto longest = [&](int warps) { return static_cast<int>((total + warps - 1u) / warps); };
  const bool few = segments <= blocks && p.few_time * longest(p.few_warps) < 10 * longest(p.warps);
  Share share;
  share.count = 0;
  Shares& shares = share.shares;
  shares.active = min(total, few ? p.few_warps : p.warps);

  // Ranks run along the blocks, so that neighbours draw on different multiprocessors. Work for half of them keeps to
  // these: on the others, the blocks of the combine kernel start meanwhile, which saves 1.5 us.
  const int together = min(kTogether, p.warps / blocks);
  const int least = (shares.active + together - 1) / together;
  const int used = 2 * least <= blocks ? least : blocks;
  share.rank = warp * used + blockIdx.x;
  if (blockIdx.x >= used || share.rank >= shares.active) return share;
  shares.each = static_cast<unsigned>(total) / shares.active;
  shares.rest = total - shares.each * shares.active;
  const int begin = shares.begin(share.rank);
  share.count = shares.begin(share.rank + 1) - begin;

  int before = 0;  // units of the requests before `base`
  for (int base = 0;; base += 32, own = cost(base + lane)) {
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
      c.request = Request(p, c.index, tiling);
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
