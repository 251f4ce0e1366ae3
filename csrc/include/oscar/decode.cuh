// SPDX-License-Identifier: Apache-2.0
// The persistent decode kernel: every warp works through its share of the batch.
#pragma once

#include <type_traits>

#include "oscar/page_attention.cuh"
#include "oscar/pipeline.cuh"
#include "oscar/ring_attention.cuh"
#include "oscar/schedule.cuh"
#include "oscar/token_attention.cuh"

namespace oscar {

// Most warps of a block, which fixes the registers of each: more warps hide latency, but a
// second tile of query rows or a larger head needs the registers. Twelve warps leave enough
// without spills where this was compiled and, on capability 9, measured.
constexpr int decode_warps(int head_dim, int n_tiles, int capability) {
  const bool enough = capability == 9 || (capability == 8 && n_tiles == 1);
  return enough && head_dim * n_tiles <= 128 ? 12 : 8;
}

// Whether warps take pages from each other: where that leaves registers enough.
template <class Layout, int NTiles>
constexpr bool kTakesPages = Layout::kHeadDim * NTiles <= 128;

#ifdef __CUDA_ARCH__
constexpr int kCapability = __CUDA_ARCH__ / 100;
#else
constexpr int kCapability = 0;
#endif

// Shared memory of one warp: page buffer, barriers, and where producer and consumer are.
template <class Layout>
struct WarpShared {
  alignas(128) uint8_t page[PageBuffer<Layout>::kBytes];
  uint64_t barriers[PageBuffer<Layout>::kBarriers];
  Cursor now;
  int left;   // units of the share, from `now` on
  Walk walk;  // of the producer

  // One past the units of the share that are of the part of the segment at `now`: pages, or ring and in-flight tokens.
  OSCAR_DEVICE int end() const {
    return min(now.in_pages() ? now.request.units : now.request.recent, now.unit + left);
  }
};

// Start fetching the producer's unit, as far as it has bytes to fetch.
template <class Layout>
OSCAR_DEVICE void fill_all(PageBuffer<Layout>& buffer, const Producer& next) {
  if (next.kind() == Producer::kPage) {
    buffer.fill_keys(next.source());
    buffer.fill_values(next.source());
  } else if (next.kind() == Producer::kRing) {
    buffer.fill_ring(next.source());
  }
}

// The step's token whose query row the lane has in column `c` of tile `n`.
template <int NTiles>
OSCAR_DEVICE int token_of_row(const Cursor& now, const DecodeParams& p, int n, int c, int lane) {
  return p.launch.first_token + (now.row_block * 8 * NTiles + 8 * n + 2 * (lane & 3) + c) / p.group;
}

// The pages of the segment at hand that this warp gets. The producer is at the first and its copy under way.
template <class Layout, int NTiles, bool Plain>
OSCAR_DEVICE void attend_pages(const Cursor& now, const DecodeParams& p, PageBuffer<Layout>& buffer, Producer& next,
                               const QueryRows<Layout::kTiles> (&query)[NTiles],
                               Accumulator<Layout::kTiles> (&acc)[NTiles], int lane) {
  constexpr int kRowTiles = 2 * kBlocksAtOnce<Layout::kTiles, NTiles>;
  do {
    const Request& request = now.request;  // in shared memory: registers are scarce
    const int page = (Plain ? 0 : request.first / kPageTokens) + next.page(), start = page * kPageTokens;
    const int begin = Plain ? 0 : request.first - start, end = request.ring_start - start;
    const bool cut = begin > 0 || end < kPageTokens;  // not all of the page is read
    const bool capped = !Plain && p.soft_cap.used();
    const bool slides = !Plain && request.seen_by_all > start;  // not all rows see the whole page
    const bool unfinished = cut || slides || capped;
    const auto finish = [&](int token, int n, float(&score)[kRowTiles][4]) {
      if (capped) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) score[r][j] = p.soft_cap(score[r][j]);
        }
      }
      int first[2] = {};  // tokens of the page that the lane's rows see
      if (slides) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          first[c] = first_visible(p.cache.softmax, request.context + token_of_row<NTiles>(now, p, n, c, lane)) - start;
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = token + 16 * r + 8 * (j >> 1);
          if (at < first[j & 1] || at >= end) score[r][j] = -INFINITY;
        }
      }
    };
    const auto values_ready = [&] { buffer.wait_values(); };
    const auto keys_done = [&] {
      __syncwarp();
      next.confirm();
      if (next.kind() == Producer::kPage) buffer.fill_keys(next.source());
    };
    next.advance();
    buffer.wait_keys();
    if (cut) clear_value_params<Layout>(buffer.params(), begin, end, lane);
    attend_page<Layout, NTiles>(buffer.codes(), buffer.params(), page == 0, unfinished, finish, values_ready, keys_done,
                                query, acc, lane);
    if (cut) fence_before_async_copy();
    __syncwarp();
    if (next.kind() == Producer::kPage) {
      buffer.fill_values(next.source());
    } else {
      if (next.kind() == Producer::kWanted) next.take();
      fill_all(buffer, next);
    }
  } while (next.continues());
}

// Tokens in 16 bit, in the model's dtype.
template <class Layout, int NTiles, bool Plain>
OSCAR_DEVICE void attend_16_bit(const Tokens& tokens, const Cursor& now, const DecodeParams& p, float scale_log2,
                                const QueryRows<Layout::kTiles> (&query)[NTiles],
                                Accumulator<Layout::kTiles> (&acc)[NTiles], int lane) {
  const int first_row = now.row_block * 8 * NTiles + p.launch.first_token * p.group;  // of the step
  const auto attend = [&](auto is_bf16) {
    constexpr bool kBf16 = decltype(is_bf16)::value;
    attend_tokens<kBf16, Plain>(tokens, query, first_row, p.group, p.reach, scale_log2, p.soft_cap, acc, lane);
  };
  if (p.dtype == OSCAR_BF16) attend(std::true_type());
  else attend(std::false_type());
}

// Ring pages `unit` .. `end - 1` of the segment at `now`.
template <class Layout, int NTiles, bool Plain>
OSCAR_DEVICE void attend_ring(int unit, int end, const Cursor& now, const DecodeParams& p, float scale_log2,
                              PageBuffer<Layout>& buffer, Producer& next,
                              const QueryRows<Layout::kTiles> (&query)[NTiles],
                              Accumulator<Layout::kTiles> (&acc)[NTiles], int lane) {
  constexpr int kTokens = Layout::kRingTokens;
  const int capacity = kTokens * p.cache.ring_pages;
  for (; unit < end; ++unit) {
    next.advance();
    const Request request = now.request;
    const int index = request.ring_first + unit;
    const int slot = (index < p.cache.ring_pages ? index : index - p.cache.ring_pages) * kTokens;
    const int age_of_first = slot - request.ring_start % capacity;  // from the oldest token on, cyclic
    const auto age = [&](int token) {
      const int plain = age_of_first + token;
      return plain < 0 ? plain + capacity : plain;
    };
    const auto readable = [&](int token) {
      return token < kTokens && age(token) < request.context - request.ring_start;
    };
    buffer.wait_values();
    if constexpr (Layout::kInt8Ring) {
#pragma unroll 1
      for (int first = 0; first < kTokens; first += 16) {
        const uint32_t valid = __ballot_sync(kFullWarp, lane < 16 && readable(first + lane));
        const auto finish = [&](int token, int n, int c, float score) {
          if (Plain) return score;
          if (p.soft_cap.used()) score = p.soft_cap(score);
          if (request.seen_by_all > request.ring_start) {
            const int position = request.ring_start - request.context + age(first + token);  // in the step
            if (token_of_row<NTiles>(now, p, n, c, lane) - position >= p.reach) score = -INFINITY;
          }
          return score;
        };
        if (valid) attend_int8_tokens<Layout>(buffer.codes(), first, valid, finish, query, acc, lane);
      }
    } else {
      static_assert(Layout::kInt8Ring || kTokens <= 32, "all tokens of a 16-bit ring page at once");
      Tokens tokens;
      tokens.key = buffer.codes();
      tokens.value = buffer.codes() + Layout::kRingRowBytes;
      tokens.key_stride = tokens.value_stride = 2 * Layout::kRingRowBytes;
      tokens.oldest = request.ring_start - request.context;
      tokens.position = tokens.oldest + age_of_first;
      tokens.turn = capacity;
      tokens.valid = __ballot_sync(kFullWarp, readable(lane));
      attend_16_bit<Layout, NTiles, Plain>(tokens, now, p, scale_log2, query, acc, lane);
    }
    __syncwarp();
    fill_all(buffer, next);
  }
}

// Units `unit` .. `end - 1` of the in-flight tokens of the segment at `now`.
template <class Layout, int NTiles, bool Plain>
OSCAR_DEVICE void attend_in_flight(int unit, int end, const Cursor& now, const DecodeParams& p, float scale_log2,
                                   PageBuffer<Layout>& buffer, Producer& next,
                                   const QueryRows<Layout::kTiles> (&query)[NTiles],
                                   Accumulator<Layout::kTiles> (&acc)[NTiles], int lane) {
  for (; unit < end; ++unit) {
    next.advance();
    fill_all(buffer, next);  // these tokens do not need the buffer
    const Request request = now.request;
    Tokens tokens;
    tokens.position = (unit - request.ring) * kInFlightTokens;
    const int64_t token = request.begin + tokens.position;
    tokens.key = token_address(p.key, token, now.head);
    tokens.value = token_address(p.value, token, now.head);
    tokens.key_stride = p.key.token;
    tokens.value_stride = p.value.token;
    tokens.oldest = 0;
    tokens.turn = 0;
    tokens.valid = __ballot_sync(kFullWarp, tokens.position + lane < request.query_len);
    attend_16_bit<Layout, NTiles, Plain>(tokens, now, p, scale_log2, query, acc, lane);
    __syncwarp();
  }
}

template <class Layout, int NTiles, bool Plain>
__global__ void __launch_bounds__(32 * decode_warps(Layout::kHeadDim, NTiles, kCapability), 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int kRows = 8 * NTiles, kTiles = Layout::kTiles;
  constexpr Tiling kTiling{kRows, Layout::kRingTokens, kTakesPages<Layout, NTiles>, Plain};
  extern __shared__ __align__(128) uint8_t raw[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  PageBuffer<Layout>::init(reinterpret_cast<WarpShared<Layout>*>(raw)[warp].barriers, lane);  // need not wait
  if (!p.launch.tables_settled) wait_for_previous_grid();

  Share share = find_share(p, kTiling, warp, lane);
  // The combine kernel, which waits for this one alone, may read what others wrote before: dependents only after a wait.
  if (share.count == 0) {
    wait_for_previous_grid();
    launch_dependents();
    return;
  }
  WarpShared<Layout>& shared = reinterpret_cast<WarpShared<Layout>*>(raw)[warp];
  if (lane == 0) {
    shared.walk.cursor = shared.now = share.cursor;
    shared.left = share.count;
    shared.walk.shares = share.shares;
    shared.walk.rank = share.rank;
  }
  __syncwarp();
  PageBuffer<Layout> buffer(shared.page, shared.barriers, lane);
  Producer next(p, &shared.walk, share.count, kTiling, lane);

  const float scale_log2 = p.cache.softmax.scale * kLog2E;
  QueryRows<kTiles> query[NTiles];
  Accumulator<kTiles> acc[NTiles];
  const Cursor& now = shared.now;
  bool started = false;
  while (true) {
    const bool pages = now.in_pages();
    const int first_row = now.row_block * kRows;
    const auto query_row = [&](int n) -> const uint8_t* {
      const int row = first_row + 8 * n + g;
      if (row >= now.request.rows) return nullptr;
      const int64_t token = now.request.begin + p.launch.first_token + row / p.group;
      return token_address(p.query, token, now.head * p.group + row % p.group);
    };
    const uint8_t* source[NTiles];
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
      acc[n].reset();
      source[n] = query_row(n);
    }
    if (!started) {
      wait_for_previous_grid();
      launch_dependents();
    }
#pragma unroll
    for (int n = 0; n < NTiles; ++n) query[n].load(source[n], lane);
    if (!started) fill_all(buffer, next);  // only now: the query must not queue behind every warp's first page
    started = true;
    if (pages) {
#pragma unroll
      for (int n = 0; n < NTiles; ++n) query[n].rotate(p.dtype == OSCAR_BF16, scale_log2, lane);
      attend_pages<Layout, NTiles, Plain>(now, p, buffer, next, query, acc, lane);
    } else {
      if (now.in_ring()) {
        if constexpr (Layout::kInt8Ring) {
#pragma unroll
          for (int n = 0; n < NTiles; ++n) query[n].to_half(p.dtype == OSCAR_BF16, scale_log2, lane);
        }
        const int end = min(now.request.ring, shared.end());
        attend_ring<Layout, NTiles, Plain>(now.unit, end, now, p, scale_log2, buffer, next, query, acc, lane);
        if (Layout::kInt8Ring && now.request.ring < shared.end()) {
#pragma unroll
          for (int n = 0; n < NTiles; ++n) query[n].load(query_row(n), lane);
        }
      }
      const int begin = max(now.unit, now.request.ring);
      attend_in_flight<Layout, NTiles, Plain>(begin, shared.end(), now, p, scale_log2, buffer, next, query, acc, lane);
    }

    // Read again what the registers had no room for.
    const int rows = min(now.request.rows - now.row_block * kRows, kRows);
    const int end = shared.end();
    const int part_begin = pages ? now.request.recent : 0, part_end = pages ? now.request.units : now.request.recent;
    const int part = 2 * segment_index(p, now.index, now.head, now.row_block) + (pages ? 1 : 0);
    const int slot = shared.walk.rank + part;
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
      float* target = p.partial + (static_cast<int64_t>(slot) * p.slot_rows + 8 * n) * Layout::kHeadDim;
      if (pages) write_page_result<Layout>(acc[n], target, rows - 8 * n, lane);
      else write_token_result(acc[n], target, rows - 8 * n, lane);
      if (g == 0) {
        float2* max_sum = p.max_sum + static_cast<int64_t>(slot) * p.slot_rows + 8 * n;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * n + 2 * t + c < rows) max_sum[2 * t + c] = make_float2(acc[n].maximum[c], acc[n].extra[2 + c]);
        }
      }
    }
    if (lane == 0) {
      if (now.unit == part_begin) p.ranges[part].x = slot;
      if (end == part_end) p.ranges[part].y = slot;
    }
    const int left = shared.left - (end - now.unit);
    if (left == 0) return;
    Cursor c = now;
    __syncwarp();
    c.move_to(end, p, kTiling);
    if (lane == 0) {
      shared.now = c;
      shared.left = left;
    }
    __syncwarp();
  }
}

}  // namespace oscar
