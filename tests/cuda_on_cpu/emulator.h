// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to run the kernels of csrc/include/oscar on a CPU, one block at a time.
//
// Every thread is a fiber; a fiber runs until a collective operation (shuffle, vote, matrix
// product, barrier) and continues when all threads concerned have reached it. Copies into
// shared memory happen when they are issued, so that one into a buffer still in use shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Exchange {  // of one warp or block: every thread leaves a value and sees all
  int members = 0, arrived = 0, generation = 0;
  std::vector<std::vector<uint64_t>> values[2];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline int current = 0;
inline std::vector<Exchange> warps;
inline Exchange block;
inline std::function<void()> body;
inline uint64_t progress = 0;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void entry() {
  body();
  fibers[current].done = true;
  ++progress;
  // Threads that have returned no longer take part in barriers of the block.
  if (--block.members > 0 && block.arrived == block.members) {
    block.arrived = 0;
    ++block.generation;
  }
  swapcontext(&fibers[current].context, &scheduler);
}

inline const std::vector<std::vector<uint64_t>>& exchange(Exchange& group, int member, std::vector<uint64_t> value) {
  const int mine = group.generation;
  group.values[mine & 1][member] = std::move(value);
  ++progress;
  if (++group.arrived == group.members) {
    group.arrived = 0;
    ++group.generation;
  }
  while (group.generation == mine) yield();
  return group.values[mine & 1];
}

inline int lane() { return current & 31; }
inline const std::vector<std::vector<uint64_t>>& in_warp(std::vector<uint64_t> value) {
  return exchange(warps[current >> 5], lane(), std::move(value));
}

template <class T>
uint64_t bits(T x) {
  uint64_t b = 0;
  std::memcpy(&b, &x, sizeof(T));
  return b;
}
template <class T>
T value(uint64_t b) {
  T x;
  std::memcpy(&x, &b, sizeof(T));
  return x;
}

// Run `kernel` for every block of the grid.
inline void launch(dim3 grid, dim3 block_size, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  blockDim = block_size;
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        fibers = std::vector<Fiber>(threads);
        warps.assign(threads / 32, {});
        for (auto& warp : warps) {
          warp.members = 32;
          for (auto& v : warp.values) v.resize(32);
        }
        block = {};
        block.members = threads;
        for (auto& v : block.values) v.resize(threads);
        constexpr int kStack = 256 << 10;
        for (auto& fiber : fibers) {
          fiber.stack.reset(new char[kStack]);
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.get();
          fiber.context.uc_stack.ss_size = kStack;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, entry, 0);
        }
        for (bool running = true; running;) {
          running = false;
          const uint64_t before = progress;
          for (current = 0; current < threads; ++current) {
            if (fibers[current].done) continue;
            running = true;
            threadIdx = {current % blockDim.x, current / blockDim.x};
            swapcontext(&scheduler, &fibers[current].context);
          }
          if (running && progress == before) {
            std::fprintf(stderr, "emulator: threads wait for each other for ever\n");
            std::abort();
          }
        }
      }
}

}  // namespace emulator

// ---- collectives ---------------------------------------------------------------------
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return emulator::value<T>(emulator::in_warp({emulator::bits(x)})[from & 31][0]);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::value<T>(emulator::in_warp({emulator::bits(x)})[emulator::lane() ^ mask][0]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  const auto& all = emulator::in_warp({emulator::bits(x)});
  return emulator::value<T>(all[emulator::lane() < by ? emulator::lane() : emulator::lane() - by][0]);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto& all = emulator::in_warp({x});
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<unsigned>(all[i][0]) << i;
  return mask;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __reduce_add_sync(unsigned, int x) {
  int sum = 0;
  for (const auto& v : emulator::in_warp({emulator::bits(x)})) sum += emulator::value<int>(v[0]);
  return sum;
}
inline int __reduce_max_sync(unsigned, int x) {
  int top = INT32_MIN;
  for (const auto& v : emulator::in_warp({emulator::bits(x)})) top = std::max(top, emulator::value<int>(v[0]));
  return top;
}
inline void __syncwarp() { emulator::in_warp({}); }
inline void __syncthreads() { emulator::exchange(emulator::block, emulator::current, {}); }

// ---- memory: one thread runs at a time -------------------------------------------------
inline unsigned atomicAdd(unsigned* x, unsigned by) {
  const unsigned before = *x;
  *x += by;
  return before;
}
inline int atomicCAS(int* x, int expected, int desired) {
  const int before = *x;
  if (before == expected) *x = desired;
  return before;
}
template <class T>
T __ldcg(const T* x) { return *x; }
inline void __trap() {
  std::fprintf(stderr, "emulator: trap\n");
  std::abort();
}

// ---- arithmetic ------------------------------------------------------------------------
using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (by & 31) >> 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return d;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(emulator::bits(x)); }
inline float __uint_as_float(uint32_t x) { return emulator::value<float>(x); }

struct __half {
  _Float16 x;
  __half() = default;
  explicit __half(float f) : x(static_cast<_Float16>(f)) {}
};
inline __half __float2half_rn(float f) { return __half(f); }
inline float __half2float(__half h) { return static_cast<float>(h.x); }
