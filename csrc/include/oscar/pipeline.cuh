// SPDX-License-Identifier: Apache-2.0
// A warp's own page buffer in shared memory, filled asynchronously.
//
// Producer and consumer are the same warp: a part of the buffer is free once the warp has
// passed __syncwarp() after reading it, so only "full" barriers are needed and warps never
// wait for each other. The keys of the next page are fetched while the values of this one
// are used, and the other way round: with many warps, one page of memory each is enough.
// Copies are bulk copies (sm_90 and newer) or 16 bytes per lane and instruction.
#pragma once

#include "oscar/layout.cuh"
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

// One page: key codes, value codes, parameters as in the page, then a second place for
// parameters, which keys and values both need and which therefore alternate.
template <class Layout>
class PageBuffer {
 public:
  static constexpr int kKeyBytes = Layout::kValueCodes;
  static constexpr int kValueBytes = Layout::kKeyParams - Layout::kValueCodes;
  static constexpr int kParamBytes = Layout::kPageBytes - Layout::kKeyParams;
  static constexpr int kBytes = Layout::kPageBytes + kParamBytes;
  static constexpr int kBarriers = 2;

  OSCAR_DEVICE PageBuffer(uint8_t* buffer, uint64_t* barriers, int lane)
      : buffer_(buffer), keys_(shared_address(barriers)), values_(shared_address(barriers + 1)), lane_(lane) {
    if (lane == 0) {
      CopyBarrier::init(barriers);
      CopyBarrier::init(barriers + 1);
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    }
    __syncwarp();
  }

  // Fetch the keys and parameters of `page`; the key codes in the buffer must be done with.
  OSCAR_DEVICE void fill_keys(const uint8_t* page) {
    const uint32_t target = shared_address(buffer_);
    CopyBarrier::expect(keys_, kKeyBytes + kParamBytes, lane_);
    CopyBarrier::copy(keys_, target, page, kKeyBytes, lane_);
    CopyBarrier::copy(keys_, target + Layout::kKeyParams + fill_ * kParamBytes, page + Layout::kKeyParams, kParamBytes,
                      lane_);
    CopyBarrier::commit(keys_);
    fill_ ^= 1;
  }

  OSCAR_DEVICE void fill_values(const uint8_t* page) {
    CopyBarrier::expect(values_, kValueBytes, lane_);
    CopyBarrier::copy(values_, shared_address(buffer_) + Layout::kValueCodes, page + Layout::kValueCodes, kValueBytes,
                      lane_);
    CopyBarrier::commit(values_);
  }

  // Fetch a page of 16-bit tokens over everything in the buffer.
  OSCAR_DEVICE void fill_ring(const uint8_t* page) {
    constexpr int kRingBytes = Layout::kRingTokens * Layout::kRingTokenBytes;
    CopyBarrier::expect(values_, kRingBytes, lane_);
    CopyBarrier::copy(values_, shared_address(buffer_), page, kRingBytes, lane_);
    CopyBarrier::commit(values_);
  }

  OSCAR_DEVICE void wait_keys() {
    CopyBarrier::wait(keys_, keys_phase_);
    keys_phase_ ^= 1;
    params_ = buffer_ + read_ * kParamBytes;
    read_ ^= 1;
  }

  OSCAR_DEVICE void wait_values() {
    CopyBarrier::wait(values_, values_phase_);
    values_phase_ ^= 1;
  }

  OSCAR_DEVICE uint8_t* codes() const { return buffer_; }
  // Add a page offset from kKeyParams on.
  OSCAR_DEVICE uint8_t* params() const { return params_; }

 private:
  uint8_t* buffer_;
  uint8_t* params_ = nullptr;
  uint32_t keys_, values_;
  int lane_;
  int fill_ = 0, read_ = 0;
  uint32_t keys_phase_ = 0, values_phase_ = 0;
};

// Order ordinary writes to a buffer before the next asynchronous copy into it.
OSCAR_DEVICE void fence_before_async_copy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace oscar
