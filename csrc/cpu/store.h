// SPDX-License-Identifier: Apache-2.0
// Quantizing full blocks. Follows reference.py operation by operation, so that codes
// differ from it only where a rotated element is a rounding tie.
#pragma once

#include "dense.h"
#include "oscar_cpu.h"

namespace {

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
    const uint16_t h = to_fp16_saturating(x);
    return {h, from_fp16(h)};
  }
  const uint8_t b = to_e4m3(clamp(x, 448.0f));
  return {b, from_e4m3(b)};
}

inline void affine_params(float low, float high, int levels, float clip, bool integer_zero, int bytes, Param& scale,
                          Param& zero) {
  const float middle = (low + high) / 2, half = (high - low) / 2 * clip;
  scale = round_param(2 * half / levels, bytes);
  const float step = scale.value;
  float z = middle - half;
  if (integer_zero) z = step > 0 ? -__builtin_nearbyintf(-low / step) * step : low;
  zero = round_param(z, bytes);
}

// What a coded vector is to be multiplied by so that it is not shorter along the original (reference.py): of the
// sums of x * x and of x * coded.
inline float gain(float squares, float product) {
  const float ratio = product > 0 ? squares / product : 1.0f;
  return ratio != ratio ? 1.0f : ratio < 0.5f ? 0.5f : ratio > 2.0f ? 2.0f : ratio;
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
      : a(params), how(run), step(a.step), cache(a.cache), format(cache.format), s(format) {}

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

  // The block's tokens: from the ring before the step's own.
  struct Tokens {
    TokenTile ring;  // the first ring.count
    oscar::StepTokens step;
    int begin;  // position of the first
  };

  void find(const Block& block, int head, Tokens& out) const {
    out.step = oscar::StepTokens(step, block.request);
    out.begin = block.index * kPage;
    const RingReader ring(cache, oscar::ring_row(step, block.request), head, a.dtype);
    out.ring.count = max_of(0, min_of(kPage, out.step.context - out.begin));
    out.ring.dtype = ring.dtype;
    ring.read(out.begin, out.ring.count, out.ring);
  }

  void load(const Tokens& tokens, int i, int head, bool value, float* out) const {
    if (i < tokens.ring.count) {
      load_token(value ? tokens.ring.value[i] : tokens.ring.key[i], tokens.ring.dtype, s.dim, out);
      if (tokens.ring.dtype != kInt8) return;
      const F scale = set_f(value ? tokens.ring.value_scale[i] : tokens.ring.key_scale[i]);
      for (int c = 0; c < s.dim; c += 16) store(out + c, load_f(out + c) * scale);
    } else {
      const int row = tokens.step.begin + tokens.begin + i - tokens.step.context;
      load_token(oscar::token_address(value ? a.value : a.key, row, head), a.dtype, s.dim, out);
    }
  }

  void load_rotated(const Tokens& tokens, int head, bool value, float* plain, float* rotated) const {
    for (int i = 0; i < kPage; i++) load(tokens, i, head, value, plain + i * s.dim);
    rotate(plain, how.hadamard, s.dim, kPage, rotated);
  }

  static float squares(const float* x, int dim) {
    F total = zero_f();
    for (int i = 0; i < dim; i += 16) total = fma(load_f(x + i), load_f(x + i), total);
    return sum(total);
  }

  void encode(const Block& block, int head) {
    const bool sink = block.index == 0 && format.first_token;  // token 0 is coded in 8 bits
    uint8_t* page = oscar::page_address(cache, oscar::page_row(step, block.request)[block.index], head);
    float* plain = thread_scratch.take<float>(kPage * s.dim);
    float* rotated = thread_scratch.take<float>(kPage * s.dim);
    uint8_t* codes = thread_scratch.take<uint8_t>(kPage * s.dim);
    float* work = thread_scratch.take<float>(4 * s.dim);
    const int used = format.norms + (format.norm != OSCAR_NORM_NONE ? 2 * kPage : 0);
    memset(page + used, 0, format.page_bytes - used);

    Tokens tokens;
    float norms[kPage];
    if (format.norm == OSCAR_NORM_JOINT) {  // rotations keep norms, so the heads need not be rotated here
      for (int i = 0; i < kPage; i++) norms[i] = 0;
      for (int h = 0; h < cache.kv_heads; h++) {
        find(block, h, tokens);
        for (int i = 0; i < kPage; i++) {
          load(tokens, i, h, false, plain);
          norms[i] += squares(plain, s.dim);
        }
      }
    }
    find(block, head, tokens);
    load_rotated(tokens, head, false, plain, rotated);
    if (format.norm != OSCAR_NORM_NONE) normalise(rotated, sink, norms);
    encode_keys(rotated, sink, page, norms, codes, work);
    if (format.norm != OSCAR_NORM_NONE) put_norms(norms, page);

    load_rotated(tokens, head, true, plain, rotated);
    encode_values(rotated, sink, page, codes);
  }

  // norms: in, where they are of all heads, sums of squares; out, as the keys were divided by them.
  void normalise(float* keys, bool sink, float* norms) const {
    const bool joint = format.norm == OSCAR_NORM_JOINT;
    const float count = static_cast<float>(s.dim) * (joint ? cache.kv_heads : 1);
    for (int i = 0; i < kPage; i++) {
      float* row = keys + i * s.dim;
      const float exact = sink && i == 0 ? largest_magnitude(row, s.dim) / 127
                                         : __builtin_sqrtf((joint ? norms[i] : squares(row, s.dim)) / count);
      const float norm = norms[i] = from_fp16(to_fp16_saturating(exact));
      for (int c = 0; c < s.dim; c += 16)
        store(row + c, norm > 0 ? load_f(row + c) / set_f(norm) : zero_f());
    }
  }

  void put_norms(const float* norms, uint8_t* page) const {
    for (int i = 0; i < kPage; i++) {
      const uint16_t half = to_fp16(norms[i]);
      memcpy(page + format.norms + 2 * ((i >> 4) * 16 + (i & 7) * 2 + ((i >> 3) & 1)), &half, 2);
    }
  }

  void encode_keys(const float* unit, bool sink, uint8_t* page, float* norms, uint8_t* codes, float* work) const {
    const int dim = s.dim, bytes = format.key_param_bytes, levels = (1 << format.key_bits) - 1;
    float *low = work, *high = work + dim, *scale = work + 2 * dim, *zero = work + 3 * dim;
    for (int group = 0; group < s.key_groups; group++) {
      const int begin = group * format.key_group, end = begin + format.key_group;
      // In a first page every token but the first shapes the one range that serves all groups.
      const int from = sink ? 1 : begin, to = sink ? kPage : end;
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
      for (int i = begin; i < end; i++) {
        const float g = encode_row(unit + i * dim, 0, dim, levels, codes + i * dim,
                                   [&](int c) { return load_f(scale + c); }, [&](int c) { return load_f(zero + c); });
        if (format.key_gain && !(sink && i == 0)) norms[i] = from_fp16(to_fp16_saturating(norms[i] * g));
      }
    }
    if (sink) {
      for (int c = 0; c < dim; c += 16) {
        int8_t lanes[kLanes];
        narrow_8(lanes, to_signed_byte(load_f(unit + c)));
        for (int i = 0; i < kLanes; i++) {
          const int place = 2 * pair_of(c + i, s.tiles) + (i & 1);
          memcpy(page + format.first_key + place, lanes + i, 1);
        }
      }
      memset(codes, 0, dim);
    }
    pack<false>(codes, format.key_bits, page + format.k_codes, page + format.k_high);
  }

  // Codes of channels begin .. end - 1 of a row, whose parameters are scale(c) and zero(c) from channel c on.
  // Returns the gain.
  template <class Scale, class Zero>
  static float encode_row(const float* x, int begin, int end, int levels, uint8_t* codes, Scale scale, Zero zero) {
    F squares = zero_f(), products = zero_f();
    for (int c = begin; c < end; c += 16) {
      const F exact = load_f(x + c);
      const I code = quantize(exact, scale(c), zero(c), levels);
      narrow_8(codes + c, code);
      squares = fma(exact, exact, squares);
      products = fma(exact, fma(scale(c), to_float(code), zero(c)), products);
    }
    return gain(sum(squares), sum(products));
  }

  void encode_values(const float* value, bool sink, uint8_t* page, uint8_t* codes) const {
    const int dim = s.dim, groups = s.value_groups;
    for (int i = 0; i < kPage; i++)
      for (int group = 0; group < groups; group++) {
        const int begin = group * format.value_group, end = min_of(dim, begin + format.value_group);
        const bool is_sink = sink && i == 0;
        const int levels = is_sink ? 255 : (1 << format.value_bits) - 1;
        const float* row = value + i * dim;
        float low, high;
        range(row, begin, end, low, high);
        Param scale, zero;
        affine_params(low, high, levels, is_sink ? 1.0f : format.value_clip, format.integer_zero, 2, scale, zero);
        const float g = encode_row(row, begin, end, levels, codes + i * dim,
                                   [&](int) { return set_f(scale.value); }, [&](int) { return set_f(zero.value); });
        if (format.value_gain && !is_sink) {
          scale = round_param(scale.value * g, 2);
          zero = round_param(zero.value * g, 2);
        }
        const int tile = i >> 4, b = (i >> 3) & 1, t = (i >> 1) & 3, half = i & 1;
        memcpy(page + format.v_scale + 4 * (((tile * 4 + t) * groups + group) * 2 + b) + 2 * half, &scale.bits, 2);
        memcpy(page + format.v_zero + 4 * (((tile * groups + group) * 4 + t) * 2 + b) + 2 * half, &zero.bits, 2);
      }
    if (sink) {
      uint8_t* p = page + format.first_value;
      for (int g = 0; g < 8; g++)
        for (int tile = 0; tile < s.tiles; tile++)
          for (int j0 = 0; j0 < 2; j0++) *p++ = codes[16 * tile + 8 * j0 + g];
      memset(codes, 0, dim);
    }
    pack<true>(codes, format.value_bits, page + format.v_codes, page + format.v_high);
  }

  // Smallest and largest of channels begin .. end - 1; NaN if one is.
  static void range(const float* x, int begin, int end, float& low, float& high) {
    F lo = load_f(x + begin), hi = lo;
    for (int c = begin + 16; c < end; c += 16) {
      const F v = load_f(x + c);
      lo = min(v, lo), hi = max(v, hi);  // a NaN stays
      lo = select(ordered(v), lo, v), hi = select(ordered(v), hi, v);
    }
    float lanes[2][kLanes];
    store(lanes[0], lo);
    store(lanes[1], hi);
    low = lanes[0][0], high = lanes[1][0];
    for (int k = 1; k < kLanes; k++) {
      low = lanes[0][k] < low || lanes[0][k] != lanes[0][k] ? lanes[0][k] : low;
      high = lanes[1][k] > high || lanes[1][k] != lanes[1][k] ? lanes[1][k] : high;
    }
  }

  // Byte offset of a word inside a 32-token block.
  int64_t word_at(int tile, int g, int t) const {
    const int chunk = tile / 4;
    return 4 * (chunk * 128 + (4 * g + t) * s.width(chunk) + tile % 4);
  }

  // Codes [token][channel] to their planes, in the order of keys or of values.
  template <bool VALUE>
  void pack(const uint8_t* codes, int bits, uint8_t* low_plane, uint8_t* high_plane) const {
    const int dim = s.dim, block_bytes = 32 * s.tiles * 4;
    for (int block = 0; block < 4; block++)
      for (int tile = 0; tile < s.tiles; tile++)
        for (int g = 0; g < 8; g++)
          for (int t = 0; t < 4; t++) {
            uint32_t low = 0, high = 0;
            for (int slot = 0; slot < 16; slot++) {  // half, r, j1, j0
              const int half = slot >> 3, r = (slot >> 2) & 1, j1 = (slot >> 1) & 1, j0 = slot & 1;
              const int token = 16 * r + (VALUE ? 8 * j1 + 2 * t + half : 8 * j0 + g);
              const int channel = VALUE ? 8 * j0 + g : 8 * j1 + 2 * t + half;
              const uint32_t code = codes[(32 * block + token) * dim + 16 * tile + channel];
              low |= (code & 3) << 2 * slot;
              high |= (code >> 2) << 2 * slot;
            }
            const int64_t at = word_at(tile, g, t);
            memcpy(low_plane + block * block_bytes + at, &low, 4);
            if (bits == 4) {
              high = high << 2 | high >> 30;
              memcpy(high_plane + block * block_bytes + at, &high, 4);
            } else if (bits == 3) {  // two blocks share a word
              uint8_t* p = high_plane + (block >> 1) * block_bytes + at;
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
};

}  // namespace
