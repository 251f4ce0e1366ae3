// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory that complete on a barrier: bulk copies
// (sm_90 and newer) or 16 bytes per lane and instruction.
#pragma once

#include "oscar/ptx.cuh"

namespace oscar {

OSCAR_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A copy of `bytes`, a multiple of 16, to an address in shared memory.
struct Copy {
  uint32_t target;
  const uint8_t* source;
  int bytes;
};

// Transactions on one shared-memory barrier.
class CopyBarrier {
 public:
#if __CUDA_ARCH__ >= 900
  static constexpr int kArrivals = 1;
#else
  static constexpr int kArrivals = 32;
#endif

  OSCAR_DEVICE static void init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(kArrivals));
  }

  // Make initialised barriers known to the copy engine.
  OSCAR_DEVICE static void publish() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

  // The copies of one phase; by the whole warp.
  template <class... Copies>
  OSCAR_DEVICE static void start(uint32_t barrier, int lane, const Copies&... copies) {
#if __CUDA_ARCH__ >= 900
    // An election tells the compiler that one lane runs this; after `lane == 0` it makes loops over lanes.
    uint32_t elected;
    asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    if (elected) {
      const int bytes = (copies.bytes + ...);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
      (copy(barrier, copies), ...);
    }
#else
    (copy(lane, copies), ...);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
  }

  OSCAR_DEVICE static void wait(uint32_t barrier, uint32_t phase) {
    uint32_t done = 0;
    while (!done) {
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(phase)
          : "memory");
#else
      asm volatile(
          "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(phase)
          : "memory");
#endif
    }
  }

 private:
#if __CUDA_ARCH__ >= 900
  OSCAR_DEVICE static void copy(uint32_t barrier, const Copy& c) {
    constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // what createpolicy makes; pages are read once
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(c.target),
        "l"(c.source), "r"(c.bytes), "r"(barrier), "l"(kEvictFirst)
        : "memory");
  }
#else
  OSCAR_DEVICE static void copy(int lane, const Copy& c) {
    for (int i = lane * 16; i < c.bytes; i += 32 * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(c.target + i), "l"(c.source + i) : "memory");
    }
  }
#endif
};

// Order ordinary writes to a buffer before the next asynchronous copy into it.
OSCAR_DEVICE void fence_before_async_copy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace oscar
