// SPDX-License-Identifier: Apache-2.0
// A warp's own ring of page buffers in shared memory, filled asynchronously.
//
// Producer and consumer are the same warp: a buffer is free once the warp has
// passed __syncwarp() after reading it, so only "full" barriers are needed and
// warps never wait for each other. One bulk copy moves a whole page (sm_90 and
// newer); older devices copy 16 bytes per lane and instruction.
#pragma once

#include "oscar/ptx.cuh"

namespace oscar {

OSCAR_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int BufferBytes>
class PagePipeline {
 public:
  // `buffers`: this warp's `stages` buffers; `barriers`: as many barriers.
  OSCAR_DEVICE PagePipeline(uint8_t* buffers, uint64_t* barriers, int stages, int lane)
      : buffers_(buffers), barriers_(barriers), stages_(stages), lane_(lane) {
    if (lane == 0) {
      for (int i = 0; i < stages; ++i) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barriers + i)), "r"(kArrivals));
      }
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    }
    __syncwarp();
  }

  // Start filling the next buffer with `bytes` (a multiple of 16, or 0) from `source`.
  OSCAR_DEVICE void fill(const uint8_t* source, int bytes) {
    const uint32_t barrier = shared_address(barriers_ + fill_);
    uint8_t* target = buffers_ + fill_ * BufferBytes;
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
      if (bytes) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(target)),
            "l"(source), "r"(bytes), "r"(barrier)
            : "memory");
      }
    }
#else
    for (int i = lane_ * 16; i < bytes; i += 32 * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target + i)), "l"(source + i)
                   : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
    fill_ = fill_ + 1 == stages_ ? 0 : fill_ + 1;
  }

  // Wait for the oldest buffer in flight.
  OSCAR_DEVICE uint8_t* wait() {
    const uint32_t barrier = shared_address(barriers_ + read_);
    uint32_t done = 0;
    while (!done) {
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(phase_)
          : "memory");
#else
      asm volatile(
          "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(phase_)
          : "memory");
#endif
    }
    return buffers_ + read_ * BufferBytes;
  }

  // The buffer that wait() returned may be overwritten.
  OSCAR_DEVICE void release() {
    __syncwarp();
    if (++read_ == stages_) {
      read_ = 0;
      phase_ ^= 1;
    }
  }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr int kArrivals = 1;
#else
  static constexpr int kArrivals = 32;
#endif
  uint8_t* buffers_;
  uint64_t* barriers_;
  int stages_;
  int lane_;
  int fill_ = 0;
  int read_ = 0;
  uint32_t phase_ = 0;
};

// Order ordinary writes to a buffer before the next asynchronous copy into it.
OSCAR_DEVICE void fence_before_async_copy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace oscar
