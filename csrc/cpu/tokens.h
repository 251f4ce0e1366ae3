// SPDX-License-Identifier: Apache-2.0
// Tokens that are not quantized to pages: the step's, and the ring's (vllm_oscar/core/ring.py).
#pragma once

#include "oscar/step.h"
#include "simd.h"

namespace {

constexpr int kTile = 128;  // tokens
constexpr int kInt8 = 3;    // the type of a token of an int8 ring, beside those of OscarDtype

OSCAR_INLINE F load_model(const void* p, int dtype) {
  if (dtype == OSCAR_BF16) return load_bf16(static_cast<const uint16_t*>(p));
  if (dtype == OSCAR_FP16) return load_fp16(static_cast<const uint16_t*>(p));
  if (dtype == kInt8) return load_int8(static_cast<const int8_t*>(p));
  return load_f(p);
}
inline int item_bytes(int dtype) { return dtype == OSCAR_FP32 ? 4 : dtype == kInt8 ? 1 : 2; }

inline void load_token(const void* p, int dtype, int dim, float* out) {
  const char* bytes = static_cast<const char*>(p);
  for (int i = 0; i < dim; i += 16) store(out + i, load_model(bytes + i * item_bytes(dtype), dtype));
}

inline void store_token(const float* x, int dtype, int dim, void* p) {
  if (dtype == OSCAR_FP32) {
    memcpy(p, x, 4 * dim);
  } else if (dtype == OSCAR_BF16) {
    for (int i = 0; i < dim; i++) static_cast<uint16_t*>(p)[i] = to_bf16(x[i]);
  } else {
    for (int i = 0; i < dim; i++) static_cast<uint16_t*>(p)[i] = to_fp16(x[i]);
  }
}

// Largest |x|; NaN if one is: as integers, magnitudes are in the order of the numbers, and NaN is above all.
inline float largest_magnitude(const float* x, int dim) {
  I top = zero_i();
  for (int i = 0; i < dim; i += 16) {
    const I magnitude = bits(abs(load_f(x + i)));
    top = select(less(top, magnitude), magnitude, top);
  }
  int32_t lanes[kLanes], most = 0;
  store(lanes, top);
  for (int i = 0; i < kLanes; i++) most = max_of(most, lanes[i]);
  float result;
  memcpy(&result, &most, 4);
  return result;
}

inline float clamp(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }  // keeps NaN
inline uint16_t to_fp16_saturating(float x) { return to_fp16(clamp(x, 65504.0f)); }

// Nearest whole numbers between -127 and 127, ties to even; 0 for NaN.
OSCAR_INLINE I to_signed_byte(F x) {
  return round_to_int(min(max(select(ordered(x), x, zero_f()), set_f(-127.0f)), set_f(127.0f)));
}

// Some tokens of one KV head, all of one type, where they are.
struct TokenTile {
  int count, dtype;
  const void *key[kTile], *value[kTile];
  alignas(64) float key_scale[kTile], value_scale[kTile];  // of int8 tokens; 0 up to a multiple of 16
};

// A request's tokens in the ring, of one KV head.
class RingReader {
 public:
  const int dtype;

  RingReader(const OscarCache& cache, const int32_t* row, int head, int model_dtype)
      : dtype(cache.format.int8_ring ? kInt8 : model_dtype), cache_(cache), row_(row), head_(head) {}

  // Positions from `position` on become the first `count` tokens of a tile.
  void read(int position, int count, TokenTile& tile) const {
    const OscarFormat& format = cache_.format;
    const int per_page = format.ring_tokens, bytes = format.head_dim * item_bytes(dtype);
    const uint8_t *at = nullptr, *scales = nullptr;
    alignas(64) uint16_t halves[2][kTile] = {};
    int left = 0;  // tokens that follow each other in a page
    for (int i = 0; i < count; i++) {
      if (--left > 0) {
        at += 2 * bytes;
      } else {
        at = oscar::ring_token(cache_, row_, head_, position + i, per_page, 2 * bytes);
        left = per_page - (position + i) % per_page;
        if (dtype == kInt8) scales = oscar::ring_scales(cache_, row_, head_, position + i, per_page, format.head_dim);
      }
      tile.key[i] = at;
      tile.value[i] = at + bytes;
      if (dtype != kInt8) continue;
      memcpy(&halves[0][i], scales, 2);
      memcpy(&halves[1][i], scales + 2, 2);
      scales += 4;
    }
    if (dtype != kInt8) return;
    for (int i = 0; i < count; i += 16) {
      store(tile.key_scale + i, load_fp16(halves[0] + i));
      store(tile.value_scale + i, load_fp16(halves[1] + i));
    }
  }

 private:
  const OscarCache& cache_;
  const int32_t* row_;
  const int head_;
};

}  // namespace
