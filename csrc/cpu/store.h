// SPDX-License-Identifier: Apache-2.0
// Quantizing full blocks. Follows reference.py operation by operation, so that codes
// differ from it only where a rotated element is a rounding tie.
#pragma once

#include "dense.h"
#include "oscar_cpu.h"

namespace {

inline float clamp(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }  // keeps NaN

inline uint8_t to_e4m3(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 24) & 0x80;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return static_cast<uint8_t>(sign | 0x7f);
  if (u < 121u << 23) {  // subnormal: let the adder round
    float f;
    memcpy(&f, &u, 4);
    f += 16384.0f;
    memcpy(&u, &f, 4);
    return static_cast<uint8_t>(sign | (u - 0x46800000));
  }
  u += 0x7ffff + ((u >> 20) & 1);
  return static_cast<uint8_t>(sign | ((u - (120u << 23)) >> 20));
}

// A parameter rounded to its storage type: bits and value.
struct Param {
  uint16_t bits;
  float value;
};
inline Param round_param(float x, int bytes) {
  if (bytes == 2) {
    const uint16_t h = to_fp16(clamp(x, 65504.0f));
    return {h, from_fp16(h)};
  }
  const uint8_t b = to_e4m3(clamp(x, 448.0f));
  return {b, from_e4m3(b)};
}

inline void affine_params(float low, float high, int levels, float clip, bool integer_zero, int bytes, Param& scale,
                          Param& zero) {
  const float middle = (low + high) / 2, half = (high - low) / 2 * clip;
  scale = round_param(2 * half / levels, bytes);
  float z = middle - half;
  if (integer_zero) {
    const float step = scale.value;
    float q = 0;
    if (step > 0) {
      q = __builtin_nearbyintf(-low / step);
      q = q < 0 ? 0 : q > levels ? levels : q;
    }
    z = -q * step;
  }
  zero = round_param(z, bytes);
}

// Nearest codes for rounded parameters. NaN becomes 0, as does everything at scale 0.
OSCAR_INLINE I quantize(F x, F scale, F zero, int levels) {
  const F q = (x - zero) / scale;
  const F clamped = min(max(select(ordered(q), q, zero_f()), set_f(-1.0f)), set_f(levels + 1.0f));
  const F code = min(max(round_even(clamped), zero_f()), set_f(levels));
  return select(greater(scale, zero_f()), to_int(code), zero_i());
}

class Store {
 public:
  Store(const OscarStoreParams& params, const OscarCpuRun& run)
      : a(params), how(run), step(a.step), cache(a.cache), format(cache.format), s(format),
        head_bytes(s.dim * item_bytes(a.dtype)) {}

  int32_t run() {
    if (!plan()) return 1;
    int failed = 0;
#pragma omp parallel num_threads(how.threads) if (how.threads > 1 && count_ * cache.kv_heads > 1) reduction(| : failed)
    {
      const bool ready = thread_scratch.reserve(scratch_bytes());
      if (!ready) failed = 1;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count_ * cache.kv_heads; i++) {
        thread_scratch.reserve(0);
        if (ready) encode(blocks_[i / cache.kv_heads], static_cast<int>(i % cache.kv_heads));
      }
    }
    free(blocks_);
    return failed;
  }

 private:
  struct Block {
    int32_t request, index;
  };
  const OscarStoreParams& a;
  const OscarCpuRun& how;
  const OscarStep& step;
  const OscarCache& cache;
  const OscarFormat& format;
  const Shape s;
  const int head_bytes;  // of a model token
  Block* blocks_ = nullptr;
  int64_t count_ = 0;

  size_t scratch_bytes() const {
    const auto pad = Scratch::padded;
    return 2 * pad(4 * kPage * s.dim) + pad(kPage * s.dim) + 4 * pad(4 * s.dim) + 4 * pad(4 * kPage);
  }

  template <class Emit>
  void enumerate(Emit emit) const {
    for (int r = 0; r < step.requests; r++) {
      const oscar::StepTokens q(step, r);
      if (q.query_len <= 0) continue;
      const int end = q.context + q.query_len;
      for (int index = q.context / kPage; (index + 1) * kPage <= end; index++) emit(Block{r, index});
    }
  }

  bool plan() {
    enumerate([&](Block) { count_++; });
    blocks_ = static_cast<Block*>(malloc(sizeof(Block) * (count_ + 1)));
    if (!blocks_) return false;
    int64_t next = 0;
    enumerate([&](Block block) { blocks_[next++] = block; });
    return true;
  }

  // Where a token of the block is: ring before the step's own.
  const void* token(const oscar::StepTokens& q, const Block& block, int i, int head, bool value) const {
    const int position = block.index * kPage + i;
    if (position >= q.context)
      return oscar::token_address(value ? a.value : a.key, q.begin + position - q.context, head);
    const int32_t* row = oscar::ring_row(step, block.request);
    const uint8_t* key = oscar::ring_token(cache, row, head, position, format.ring_tokens, 2 * head_bytes);
    return value ? key + head_bytes : key;
  }

  void load_rotated(const oscar::StepTokens& q, const Block& block, int head, bool value, float* plain,
                    float* rotated) const {
    for (int i = 0; i < kPage; i++) load_token(token(q, block, i, head, value), a.dtype, s.dim, plain + i * s.dim);
    rotate(plain, how.hadamard, s.dim, kPage, rotated);
  }

  static float squares(const float* x, int dim) {
    F total = zero_f();
    for (int i = 0; i < dim; i += 16) total = fma(load_f(x + i), load_f(x + i), total);
    return sum(total);
  }

  void encode(const Block& block, int head) {
    const oscar::StepTokens q(step, block.request);
    uint8_t* page = oscar::page_address(cache, oscar::page_row(step, block.request)[block.index], head);
    float* plain = thread_scratch.take<float>(kPage * s.dim);
    float* rotated = thread_scratch.take<float>(kPage * s.dim);
    uint8_t* codes = thread_scratch.take<uint8_t>(kPage * s.dim);
    float* work = thread_scratch.take<float>(4 * s.dim);
    const int used = format.norms + (format.norm != OSCAR_NORM_NONE ? 2 * kPage : 0);
    memset(page + used, 0, format.page_bytes - used);

    float square[kPage];
    if (format.norm == OSCAR_NORM_JOINT) {  // rotations keep norms, so the heads need not be rotated here
      for (int i = 0; i < kPage; i++) square[i] = 0;
      for (int h = 0; h < cache.kv_heads; h++)
        for (int i = 0; i < kPage; i++) {
          load_token(token(q, block, i, h, false), a.dtype, s.dim, plain);
          square[i] += squares(plain, s.dim);
        }
    }
    load_rotated(q, block, head, false, plain, rotated);
    if (format.norm == OSCAR_NORM_HEAD)
      for (int i = 0; i < kPage; i++) square[i] = squares(rotated + i * s.dim, s.dim);
    if (format.norm != OSCAR_NORM_NONE) normalise(rotated, square, page);
    encode_keys(rotated, block.index == 0 && format.exact_first_key, page, codes, work);

    load_rotated(q, block, head, true, plain, rotated);
    encode_values(rotated, page, codes);
  }

  void normalise(float* keys, const float* square, uint8_t* page) const {
    const float count = static_cast<float>(s.dim) * (format.norm == OSCAR_NORM_JOINT ? cache.kv_heads : 1);
    for (int i = 0; i < kPage; i++) {
      const uint16_t h = to_fp16(clamp(__builtin_sqrtf(square[i] / count), 65504.0f));
      const float norm = from_fp16(h);
      memcpy(page + format.norms + 2 * ((i >> 4) * 16 + (i & 7) * 2 + ((i >> 3) & 1)), &h, 2);
      float* row = keys + i * s.dim;
      for (int c = 0; c < s.dim; c += 16)
        store(row + c, norm > 0 ? load_f(row + c) / set_f(norm) : zero_f());
    }
  }

  void encode_keys(const float* unit, bool first, uint8_t* page, uint8_t* codes, float* work) const {
    const int dim = s.dim, bytes = format.key_param_bytes, levels = (1 << format.key_bits) - 1;
    float *low = work, *high = work + dim, *scale = work + 2 * dim, *zero = work + 3 * dim;
    for (int group = 0; group < s.key_groups; group++) {
      const int begin = group * format.key_group, end = begin + format.key_group;
      // In a first page every token but the first shapes the one range that serves all groups.
      const int from = first ? 1 : begin, to = first ? kPage : end;
      for (int c = 0; c < dim; c += 16) {
        F lo = load_f(unit + from * dim + c), hi = lo;
        for (int i = from + 1; i < to; i++) {
          const F x = load_f(unit + i * dim + c);
          lo = min(x, lo), hi = max(x, hi);  // a NaN stays
          lo = select(ordered(x), lo, x), hi = select(ordered(x), hi, x);
        }
        store(low + c, lo);
        store(high + c, hi);
      }
      uint8_t* params = page + format.k_params + group * 2 * dim * bytes;
      for (int c = 0; c < dim; c++) {
        Param sc, ze;
        affine_params(low[c], high[c], levels, format.key_clip, format.integer_zero, bytes, sc, ze);
        const int place = 2 * pair_of(c, s.tiles) + (c & 1);
        memcpy(params + place * bytes, &sc.bits, bytes);
        memcpy(params + (dim + place) * bytes, &ze.bits, bytes);
        scale[c] = sc.value, zero[c] = ze.value;
      }
      for (int i = begin; i < end; i++) quantize_row(unit + i * dim, scale, zero, levels, codes + i * dim);
    }
    if (first) {
      uint8_t* exact = page + format.k_params + 2 * dim * bytes;
      for (int c = 0; c < dim; c++) {
        const uint16_t h = to_fp16(clamp(unit[c], 65504.0f));
        memcpy(exact + 2 * (2 * pair_of(c, s.tiles) + (c & 1)), &h, 2);
      }
    }
    pack_keys(codes, page);
  }

  void quantize_row(const float* x, const float* scale, const float* zero, int levels, uint8_t* codes) const {
    for (int c = 0; c < s.dim; c += 16) {
      int32_t lanes[kLanes];
      store(lanes, quantize(load_f(x + c), load_f(scale + c), load_f(zero + c), levels));
      for (int i = 0; i < kLanes; i++) codes[c + i] = static_cast<uint8_t>(lanes[i]);
    }
  }

  // Byte offset of a word inside a 32-token block.
  int64_t word_at(int tile, int g, int t) const {
    const int chunk = tile / 4;
    return 4 * (chunk * 128 + (4 * g + t) * s.width(chunk) + tile % 4);
  }

  void pack_keys(const uint8_t* codes, uint8_t* page) const {
    const int dim = s.dim, block_bytes = 32 * s.tiles * 4;
    for (int block = 0; block < 4; block++)
      for (int tile = 0; tile < s.tiles; tile++)
        for (int g = 0; g < 8; g++)
          for (int t = 0; t < 4; t++) {
            uint32_t low = 0, high = 0;
            for (int slot = 0; slot < 16; slot++) {  // half, r, j1, j0
              const int half = slot >> 3, r = (slot >> 2) & 1, j1 = (slot >> 1) & 1, j0 = slot & 1;
              const uint32_t code =
                  codes[(32 * block + 16 * r + 8 * j0 + g) * dim + 16 * tile + 8 * j1 + 2 * t + half];
              low |= (code & 3) << 2 * slot;
              high |= (code >> 2) << 2 * slot;
            }
            const int64_t at = word_at(tile, g, t);
            memcpy(page + format.k_codes + block * block_bytes + at, &low, 4);
            if (format.key_bits == 4) {
              high = high << 2 | high >> 30;
              memcpy(page + format.k_high + block * block_bytes + at, &high, 4);
            } else if (format.key_bits == 3) {  // two blocks share a word
              uint8_t* p = page + format.k_high + (block >> 1) * block_bytes + at;
              uint32_t both = 0;
              if (block & 1) {
                memcpy(&both, p, 4);
                high <<= 1;
              }
              both |= high << 2 | high >> 30;
              memcpy(p, &both, 4);
            }
          }
  }

  void encode_values(const float* value, uint8_t* page, uint8_t* codes) const {
    const int dim = s.dim, groups = s.value_groups;
    for (int i = 0; i < kPage; i++)
      for (int group = 0; group < groups; group++) {
        const int begin = group * format.value_group, end = min_of(dim, begin + format.value_group);
        F lo = load_f(value + i * dim + begin), hi = lo;
        for (int c = begin + 16; c < end; c += 16) {
          const F x = load_f(value + i * dim + c);
          lo = min(x, lo), hi = max(x, hi);  // a NaN stays
          lo = select(ordered(x), lo, x), hi = select(ordered(x), hi, x);
        }
        float lanes[2][kLanes];
        store(lanes[0], lo);
        store(lanes[1], hi);
        float low = lanes[0][0], high = lanes[1][0];
        for (int k = 1; k < kLanes; k++) {
          low = lanes[0][k] < low || lanes[0][k] != lanes[0][k] ? lanes[0][k] : low;
          high = lanes[1][k] > high || lanes[1][k] != lanes[1][k] ? lanes[1][k] : high;
        }
        Param scale, zero;
        affine_params(low, high, 3, format.value_clip, format.integer_zero, 2, scale, zero);
        const int tile = i >> 4, b = (i >> 3) & 1, t = (i >> 1) & 3, half = i & 1;
        memcpy(page + format.v_scale + 4 * (((tile * 4 + t) * groups + group) * 2 + b) + 2 * half, &scale.bits, 2);
        memcpy(page + format.v_zero + 4 * (((tile * groups + group) * 4 + t) * 2 + b) + 2 * half, &zero.bits, 2);
        for (int c = begin; c < end; c += 16) {
          int32_t out[kLanes];
          store(out, quantize(load_f(value + i * dim + c), set_f(scale.value), set_f(zero.value), 3));
          for (int k = 0; k < kLanes; k++) codes[i * dim + c + k] = static_cast<uint8_t>(out[k]);
        }
      }
    for (int block = 0; block < 4; block++)
      for (int tile = 0; tile < s.tiles; tile++)
        for (int g = 0; g < 8; g++)
          for (int t = 0; t < 4; t++) {
            uint32_t word = 0;
            for (int slot = 0; slot < 16; slot++) {
              const int half = slot >> 3, r = (slot >> 2) & 1, j1 = (slot >> 1) & 1, j0 = slot & 1;
              const uint32_t code =
                  codes[(32 * block + 16 * r + 8 * j1 + 2 * t + half) * dim + 16 * tile + 8 * j0 + g];
              word |= code << 2 * slot;
            }
            memcpy(page + format.v_codes + block * 32 * s.tiles * 4 + word_at(tile, g, t), &word, 4);
          }
  }
};

}  // namespace
