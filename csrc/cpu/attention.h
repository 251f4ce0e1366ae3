// SPDX-License-Identifier: Apache-2.0
// Attention of a whole step: work items, threads, and the merge of partial results.
//
// How work is split depends on the shapes alone, never on the number of threads, and each
// item is computed by one thread: the result has the same bits for any number of threads.
#pragma once

#include "decode.h"
#include "dense_bf16.h"
#include "dense_int8.h"

namespace {

constexpr int kSplitPages = 16;   // pages of one decode item
constexpr int kDecodeRows = 128;  // rows of a KV head up to which pages are read as integers
constexpr int kDenseRows = 256;   // rows of one item otherwise

// Rows `row0 ..` of one KV head of one request: row = token * query heads per KV head + head.
struct Item {
  int32_t request, head, row0, rows;
  int32_t page0, page1;  // pages it reads, as integers; none: ring and in-flight tokens
  int32_t part, parts;   // its place among the partial results of these rows; parts 0: it does everything
  int64_t partial;       // of the rows' first partial result
  int64_t set;           // counts the rows' finished parts
};

// What a request's tokens from the step's token `token` on read: positions first .. exact - 1 from pages
// page0 .. page1 - 1, the outermost possibly in part, and those from `exact` on from ring and step.
struct Request : oscar::StepTokens {
  int first, exact, page0, page1;
  Request(const OscarStep& step, const OscarSoftmax& softmax, int request, int token)
      : StepTokens(step, request), first(oscar::first_visible(softmax, context + token)),
        exact(max_of(first, oscar::ring_start(step, softmax, request, context))), page0(first / kPage),
        page1(exact > first ? oscar::pages_before(exact) : page0) {}
  int pages() const { return page1 - page0; }
};

class Attention {
 public:
  Attention(const OscarAttentionParams& params, const OscarCpuRun& run)
      : a(params), how(run), step(a.step), cache(a.cache), softmax(cache.softmax), s(cache.format), group(a.group) {}

  int32_t run() {
    if (!plan()) return 1;
    int failed = 0;
#pragma omp parallel num_threads(how.threads) if (how.threads > 1 && count_ > 1) reduction(| : failed)
    {
      // OpenMP wants every thread at every loop, so a thread without memory passes items by.
      const bool ready = thread_scratch.reserve(scratch_bytes());
      if (!ready) failed = 1;
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < count_; i++) {
        thread_scratch.reserve(0);
        if (!ready) failed = 1;
        else compute(items_[i]);
      }
    }
    free(items_);
    free(partials_);
    free(finished_);
    return failed;
  }

 private:
  const OscarAttentionParams& a;
  const OscarCpuRun& how;
  const OscarStep& step;
  const OscarCache& cache;
  const OscarSoftmax& softmax;
  const Shape s;
  const int group;  // query heads per KV head
  Item* items_ = nullptr;
  float* partials_ = nullptr;
  int32_t* finished_ = nullptr;
  int64_t count_ = 0, sets_ = 0;
  int max_rows_ = 0;

  // A partial result: output [dim], maximum, total.
  int partial_floats() const { return s.dim + 16; }

  size_t scratch_bytes() const {
    const auto pad = Scratch::padded;
    const int rows = max_rows_;
    return decode_bytes(s, kMaxRows) + dense_bytes(s, rows) + 3 * pad(4 * rows * s.dim) + Fp32Tiles::bytes(s) +
           (multiply_of(false) ? Bf16Tiles::bytes(s, rows) : Fp32Tiles::bytes(s)) + pad(64 * 4 * s.words);
  }

  float soft_cap() const { return softmax.soft_cap * kLog2e; }

  MultiplyBf16 multiply_of(bool pages) const { return multiply_bf16_of(how.isa, a.dtype, cache.format, pages); }

  template <class Emit>
  void enumerate(Emit emit) const {
    int64_t partial = 0, set = 0;
    for (int r = 0; r < step.requests; r++) {
      const Request q(step, softmax, r, 0);
      const int rows = q.query_len * group;
      if (rows <= 0) continue;
      const bool integers = rows <= kDecodeRows && q.pages() > 0;
      const int limit = integers ? kMaxRows : max_of(1, kDenseRows / group) * group;
      const int tiles = (rows + limit - 1) / limit;
      const int tile = integers ? (rows + tiles - 1) / tiles : limit;
      for (int head = 0; head < cache.kv_heads; head++)
        for (int row0 = 0; row0 < rows; row0 += tile) {
          Item item = {r, head, row0, min_of(tile, rows - row0), 0, 0, 0, 0, partial, set};
          const Request seen = row0 ? request(item) : q;  // later tokens may see fewer pages
          if (!integers || !seen.pages()) {
            emit(item);
            continue;
          }
          const int splits = (seen.pages() + kSplitPages - 1) / kSplitPages;
          // A window has few: a last one of a page or two would leave the work to the others.
          const int pages = softmax.sliding_window > 0 ? (seen.pages() + splits - 1) / splits : kSplitPages;
          item.parts = splits + 1;
          for (int split = 0; split < splits; split++) {
            item.part = split;
            item.page0 = min_of(seen.page1, seen.page0 + split * pages);
            item.page1 = min_of(seen.page1, item.page0 + pages);
            emit(item);
          }
          item.part = splits;
          item.page0 = item.page1 = 0;
          emit(item);
          partial += static_cast<int64_t>(item.rows) * item.parts * partial_floats();
          set++;
        }
    }
  }

  bool plan() {
    int64_t floats = 0;
    enumerate([&](const Item& item) {
      count_++;
      max_rows_ = max_of(max_rows_, item.rows);
      if (!item.parts) return;
      floats = item.partial + static_cast<int64_t>(item.rows) * item.parts * partial_floats();
      sets_ = item.set + 1;
    });
    items_ = static_cast<Item*>(malloc(sizeof(Item) * (count_ + 1)));
    partials_ = static_cast<float*>(aligned_alloc(64, (floats * 4 + 64) / 64 * 64));
    finished_ = static_cast<int32_t*>(calloc(sets_ + 1, sizeof(int32_t)));
    if (!items_ || !partials_ || !finished_) {
      free(items_);
      free(partials_);
      free(finished_);
      return false;
    }
    int64_t next = 0;
    enumerate([&](const Item& item) { items_[next++] = item; });
    return true;
  }

  // Whoever finishes the last part of some rows merges them: no thread waits for another.
  void compute(const Item& item) {
    if (item.parts == 0) return everything(item);
    if (item.page1 > item.page0) pages_as_integers(item);
    else exact_part(item);
    if (__atomic_add_fetch(&finished_[item.set], 1, __ATOMIC_ACQ_REL) < item.parts) return;
    thread_scratch.reserve(0);
    merge(item);
  }

  // What the rows of an item read.
  Request request(const Item& item) const { return Request(step, softmax, item.request, item.row0 / group); }

  // Position of a row's token.
  int position(const Item& item, const Request& q, int row) const { return q.context + (item.row0 + row) / group; }

  // Queries of an item, [row][dim], times `scale`: all logits are to base two.
  void load_queries(const Item& item, const Request& q, float scale, float* out) const {
    for (int row = 0; row < item.rows; row++) {
      const int token = q.begin + (item.row0 + row) / group, head = item.head * group + (item.row0 + row) % group;
      load_token(oscar::token_address(a.query, token, head), a.dtype, s.dim, out + row * s.dim);
      for (int i = 0; i < s.dim; i++) out[row * s.dim + i] *= scale;
    }
  }

  const uint8_t* page(const Item& item, int index) const {
    return oscar::page_address(cache, oscar::page_row(step, item.request)[index], item.head);
  }

  float* partial(const Item& item, int row, int part) const {
    return partials_ + item.partial + (static_cast<int64_t>(row) * item.parts + part) * partial_floats();
  }

  void put_partial(const Item& item, const float* output, const float* maximum, const float* total) const {
    for (int row = 0; row < item.rows; row++) {
      float* p = partial(item, row, item.part);
      memcpy(p, output + row * s.dim, 4 * s.dim);
      p[s.dim] = maximum[row];
      p[s.dim + 1] = total[row];
    }
  }

  // The tokens of `count` pages from page `index` on that a row sees.
  Seen seen_of_pages(const Item& item, const Request& q, int row, int index, int count) const {
    const int first = oscar::first_visible(softmax, position(item, q, row)), begin = index * kPage;
    return seen_of(first - begin, q.exact - begin, count * kPage);
  }

  void decode(const Item& item, const Request& q, DecodeState& d) const {
    const uint8_t* pages[kSplitPages + kGroupPages];
    const int count = item.page1 - item.page0;
    for (int i = 0; i < count; i++) pages[i] = page(item, item.page0 + i);
    // After the last come those that this thread may well read next.
    int total = count;
    const int64_t next = &item - items_ + how.threads;
    for (int64_t j = next; j < min_of(next + 2, count_) && total == count; j++)
      for (int i = items_[j].page0; i < min_of(items_[j].page1, items_[j].page0 + kGroupPages); i++)
        pages[total++] = page(items_[j], i);
    for (int i = 0; i < count; i += kGroupPages) {
      const int n = min_of(kGroupPages, count - i), begin = item.page0 + i;
      const auto visible = [&](int row) { return seen_of_pages(item, q, row, begin, n); };
      decode_pages(d, s, pages + i, n, begin == 0, visible, pages + i + n, min_of(kGroupPages, total - i - n));
    }
  }

  void pages_as_integers(const Item& item) {
    const Request q = request(item);
    float* plain = thread_scratch.take<float>(item.rows * s.dim);
    float* rotated = thread_scratch.take<float>(item.rows * s.dim);
    DecodeState d = take_decode(thread_scratch, s, item.rows, soft_cap());
    for (int p = item.page0; p < min_of(item.page1, item.page0 + kGroupPages); p++)
      for (int64_t i = 0; i < cache.format.page_bytes; i += 64) __builtin_prefetch(page(item, p) + i, 0, 2);
    load_queries(item, q, softmax.scale * kLog2e, plain);
    rotate(plain, how.hadamard, s.dim, item.rows, rotated);
    begin_decode(d, s, rotated);
    decode(item, q, d);
    end_decode(d, s, rotated);
    put_partial(item, rotated, d.maximum, d.total);
  }

  // Tiles of the ring and in-flight tokens that the rows of `item` may see.
  template <class Attend>  // Attend(tile, visible)
  void attend_exact(const Item& item, const Request& q, Attend attend) const {
    const RingReader ring(cache, oscar::ring_row(step, item.request), item.head, a.dtype);
    // Tokens are counted from q.exact on. Where the window begins behind the context, none is held.
    const int held = q.context - q.exact, end = held + (item.row0 + item.rows - 1) / group + 1;
    TokenTile tile;
    for (int begin = 0; begin < end; begin += tile.count) {
      const int from_ring = max_of(0, min_of(kTile, held - begin));
      const bool alone = from_ring && ring.dtype != a.dtype;  // a tile has tokens of one type
      tile.dtype = alone ? ring.dtype : a.dtype;
      tile.count = alone ? from_ring : min_of(kTile, end - begin);
      ring.read(q.exact + begin, from_ring, tile);
      for (int i = from_ring; i < tile.count; i++) {
        const int token = q.begin + begin + i - held;
        tile.key[i] = oscar::token_address(a.key, token, item.head);
        tile.value[i] = oscar::token_address(a.value, token, item.head);
      }
      attend(tile, [&](int row) {
        const int at = position(item, q, row), base = q.exact + begin;
        return seen_of(oscar::first_visible(softmax, at) - base, at + 1 - base, tile.count);
      });
    }
  }

  // The same for few rows, which read the tokens where they are.
  void attend_few(const Item& item, const Request& q, const DenseState& d) const {
    float* query = thread_scratch.take<float>(item.rows * s.dim);
    load_queries(item, q, softmax.scale * kLog2e, query);
    attend_exact(item, q, [&](const TokenTile& tile, auto visible) {
      if (tile.dtype == kInt8) attend_int8(d, s, query, tile, visible);
      else attend_in_place(d, s, query, tile, visible);
    });
  }

  void exact_part(const Item& item) {
    const Request q = request(item);
    DenseState d = take_dense(thread_scratch, s, item.rows, soft_cap());
    begin_dense(d, s);
    attend_few(item, q, d);
    put_partial(item, d.output, d.maximum, d.total);
  }

  template <class Tiles>
  void dense_pages(const Item& item, const Request& q, Tiles& tiles) const {
    I* planes = thread_scratch.take<I>(4 * s.words);
    float* keys = thread_scratch.take<float>(kTile * s.dim);
    float* values = thread_scratch.take<float>(kTile * s.dim);
    for (int i = q.page0; i < q.page1; i++) {
      const auto visible = [&](int row) { return seen_of_pages(item, q, row, i, 1); };
      const Seen seen = visible(0);  // by any row
      const int count = seen.end;
      const TokenParams params(page(item, i), s, i == 0, seen);
      with_bits(cache.format.key_bits, [&](auto bits) {
        dequantize_keys<bits, Tiles::kWholePages>(page(item, i), s, i == 0, count, params, planes, keys);
      });
      with_bits(cache.format.value_bits, [&](auto bits) {
        dequantize_values<bits, Tiles::kWholePages>(page(item, i), s, params, values);
      });
      tiles.page(keys, values, params, count, visible);
    }
  }

  // Dequantize each page once for all rows.
  template <class Tiles>
  void attend_staged(const Item& item, const Request& q, const DenseState& d, Tiles tiles) const {
    float* query = thread_scratch.take<float>(item.rows * s.dim);
    load_queries(item, q, Tiles::kScaledQueries ? softmax.scale * kLog2e : 1.0f, query);
    if (q.pages()) {
      float* rotated = thread_scratch.take<float>(item.rows * s.dim);
      rotate(query, how.hadamard, s.dim, item.rows, rotated);
      tiles.set_rotated_query(rotated);
      dense_pages(item, q, tiles);
      rotate(d.output, how.hadamard_t, s.dim, item.rows, rotated);
      memcpy(d.output, rotated, 4 * item.rows * s.dim);
    }
    tiles.set_query(query);
    attend_exact(item, q, [&](const TokenTile& tile, auto visible) { tiles.tokens(tile, visible); });
  }

  // Many rows, or no pages.
  void everything(const Item& item) {
    const Request q = request(item);
    const DenseState d = take_dense(thread_scratch, s, item.rows, soft_cap());
    begin_dense(d, s);
    if (!q.pages() && item.rows <= kMaxRows) attend_few(item, q, d);
    else if (const MultiplyBf16 multiply = multiply_of(q.pages()))
      attend_staged(item, q, d, Bf16Tiles(thread_scratch, s, d, softmax.scale * kLog2e, multiply));
    else attend_staged(item, q, d, Fp32Tiles(thread_scratch, s, d));
    for (int row = 0; row < item.rows; row++) finish(item, row, d.output + row * s.dim, d.maximum[row], d.total[row]);
  }

  // A row's output from its sum of values, its largest logit and its sum of weights relative to that.
  void finish(const Item& item, int row, float* output, float maximum, float total) const {
    const int token = oscar::StepTokens(step, item.request).begin + (item.row0 + row) / group;
    const int head = item.head * group + (item.row0 + row) % group;
    float weight = 1.0f;
    if (softmax.sinks) {
      const float sink = softmax.sinks[head] * kLog2e, top = sink > maximum ? sink : maximum;
      weight = exp2_nonpositive(maximum - top);
      total = total * weight + exp2_nonpositive(sink - top);
    }
    const float inverse = weight / total;
    for (int i = 0; i < s.dim; i++) output[i] *= inverse;
    store_token(output, a.dtype, s.dim, oscar::token_address(a.out, token, head));
  }

  // All parts but the last are in the rotated space.
  void merge(const Item& item) {
    float* rotated = thread_scratch.take<float>(item.rows * s.dim);
    float* plain = thread_scratch.take<float>(item.rows * s.dim);
    float* totals = thread_scratch.take<float>(item.rows);
    float* last_weight = thread_scratch.take<float>(item.rows);
    float* maximum = thread_scratch.take<float>(item.rows);
    memset(rotated, 0, 4 * item.rows * s.dim);
    const int last = item.parts - 1;
    for (int row = 0; row < item.rows; row++) {
      float top = -__builtin_inff();
      for (int part = 0; part <= last; part++) {
        const float m = partial(item, row, part)[s.dim];
        top = m > top ? m : top;
      }
      float total = 0, *out = rotated + row * s.dim;
      for (int part = 0; part <= last; part++) {
        const float* p = partial(item, row, part);
        const float weight = exp2_nonpositive(p[s.dim] - top);
        total += weight * p[s.dim + 1];
        if (part == last) last_weight[row] = weight;
        else for (int i = 0; i < s.dim; i++) out[i] += weight * p[i];
      }
      totals[row] = total, maximum[row] = top;
    }
    rotate(rotated, how.hadamard_t, s.dim, item.rows, plain);
    for (int row = 0; row < item.rows; row++) {
      const float* p = partial(item, row, last);
      for (int i = 0; i < s.dim; i++) plain[row * s.dim + i] += last_weight[row] * p[i];
      finish(item, row, plain + row * s.dim, maximum[row], totals[row]);
    }
  }
};

}  // namespace
