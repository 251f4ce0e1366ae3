// SPDX-License-Identifier: Apache-2.0
// AMX's tile instructions in plain C++, and the product of csrc/cpu/multiply_amx.cpp on top of them.
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tiles {
  bool configured = false;
  uint8_t data[8][16][64];
};
thread_local Tiles tiles;

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

uint8_t (*tile(int number))[64] {
  require(tiles.configured && number >= 0 && number < 8, "a tile outside the configuration");
  return tiles.data[number];
}

void load_config(const void* memory) {
  const auto* bytes = static_cast<const uint8_t*>(memory);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0 is what there is");
  for (int i = 2; i < 16; i++) require(bytes[i] == 0, "reserved bytes");
  for (int i = 0; i < 8; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    require(row_bytes == 64 && bytes[48 + i] == 16, "whole tiles are what is emulated");
  }
  std::memset(tiles.data, 0xff, sizeof tiles.data);  // the real ones are zero; nobody may count on it
  tiles.configured = true;
}

void load(int number, const void* base, int64_t stride) {
  for (int row = 0; row < 16; row++)
    std::memcpy(tile(number)[row], static_cast<const uint8_t*>(base) + row * stride, 64);
}

void store(int number, void* base, int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(static_cast<uint8_t*>(base) + row * stride, tile(number)[row], 64);
}

float bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void dot_bf16(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float sum;
      std::memcpy(&sum, tile(c)[m] + 4 * n, 4);
      for (int k = 0; k < 16; k++)
        for (int half = 0; half < 4; half += 2)
          sum += bf16(tile(a)[m] + 4 * k + half) * bf16(tile(b)[k] + 4 * n + half);
      std::memcpy(tile(c)[m] + 4 * n, &sum, 4);
    }
}

}  // namespace

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig load_config
#define _tile_release() (tiles.configured = false)
#define _tile_loadd load
#define _tile_stored store
#define _tile_zero(number) std::memset(tile(number), 0, 16 * 64)
#define _tile_dpbf16ps dot_bf16
#define __AMX_BF16__ 1
#include "../../csrc/cpu/multiply_amx.cpp"
