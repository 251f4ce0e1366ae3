// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory that complete on a barrier: bulk copies
// (sm_90 and newer) or 16 bytes per lane and instruction.
#pragma once

#include "oscar/ptx.cuh"

namespace oscar {

OSCAR_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

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

  // The phase that all bytes of the following copies complete; by every lane.
  OSCAR_DEVICE static void expect(uint32_t barrier, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    }
#endif
  }

  // `bytes`: a multiple of 16.
  OSCAR_DEVICE static void copy(uint32_t barrier, uint32_t target, const uint8_t* source, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
          "l"(source), "r"(bytes), "r"(barrier)
          : "memory");
    }
#else
    for (int i = lane * 16; i < bytes; i += 32 * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + i), "l"(source + i) : "memory");
    }
#endif
  }

  // No more copies for this phase.
  OSCAR_DEVICE static void commit(uint32_t barrier) {
#if __CUDA_ARCH__ < 900
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
};

// Order ordinary writes to a buffer before the next asynchronous copy into it.
OSCAR_DEVICE void fence_before_async_copy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace oscar
