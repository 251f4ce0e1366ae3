// SPDX-License-Identifier: Apache-2.0
// csrc/include/oscar/copy.cuh on a CPU: copies happen at once. Found first by -I.
#pragma once

#include "oscar/ptx.cuh"

namespace oscar {

alignas(128) inline uint8_t raw[256 << 10];  // the shared memory of the running block

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - raw);
}

struct Copy {
  uint32_t target;
  const uint8_t* source;
  int bytes;
};

struct CopyBarrier {
  static void init(uint64_t* barrier) { *barrier = 0; }
  static void publish() {}
  static uint64_t& phases(uint32_t barrier) { return *reinterpret_cast<uint64_t*>(raw + barrier); }
  template <class... Copies>
  static void start(uint32_t barrier, int lane, const Copies&... copies) {
    if (lane != 0) return;
    (std::memcpy(raw + copies.target, copies.source, copies.bytes), ...);
    ++phases(barrier);
  }
  static void wait(uint32_t barrier, uint32_t phase) {
    __syncwarp();
    if (((phases(barrier) - 1) & 1) != phase || phases(barrier) == 0) {
      std::fprintf(stderr, "emulator: waiting for a copy that was not issued\n");
      std::abort();
    }
  }
};

inline void fence_before_async_copy() {}

}  // namespace oscar
