// SPDX-License-Identifier: Apache-2.0
// A warp's own page buffer in shared memory, filled asynchronously.
//
// Producer and consumer are the same warp: a part of the buffer is free once the warp has
// passed __syncwarp() after reading it, so only "full" barriers are needed and warps never
// wait for each other. The keys of the next page are fetched while the values of this one
// are used, and the other way round: with many warps, one page of memory each is enough.
#pragma once

#include "oscar/copy.cuh"
#include "oscar/layout.cuh"

namespace oscar {

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

  // Once, before the buffer is made.
  OSCAR_DEVICE static void init(uint64_t* barriers, int lane) {
    if (lane == 0) {
      CopyBarrier::init(barriers);
      CopyBarrier::init(barriers + 1);
      CopyBarrier::publish();
    }
    __syncwarp();
  }

  OSCAR_DEVICE PageBuffer(uint8_t* buffer, uint64_t* barriers, int lane)
      : buffer_(buffer), keys_(shared_address(barriers)), values_(shared_address(barriers + 1)), lane_(lane) {}

  // Fetch the keys and parameters of `page`; the key codes in the buffer must be done with. Every
  // wait_keys() follows one fetch, so that phase and place of the parameters alternate alike.
  OSCAR_DEVICE void fill_keys(const uint8_t* page) {
    const uint32_t target = shared_address(buffer_), params = target + Layout::kKeyParams + keys_phase_ * kParamBytes;
    CopyBarrier::start(keys_, lane_, Copy{target, page, kKeyBytes},
                       Copy{params, page + Layout::kKeyParams, kParamBytes});
  }

  OSCAR_DEVICE void fill_values(const uint8_t* page) {
    CopyBarrier::start(values_, lane_,
                       Copy{shared_address(buffer_) + Layout::kValueCodes, page + Layout::kValueCodes, kValueBytes});
  }

  // Fetch a ring page over everything in the buffer.
  OSCAR_DEVICE void fill_ring(const uint8_t* page) {
    constexpr int kRingBytes = (Layout::kRingScales + Layout::kRingTokens * Layout::kRingScaleBytes + 15) / 16 * 16;
    CopyBarrier::start(values_, lane_, Copy{shared_address(buffer_), page, kRingBytes});
  }

  OSCAR_DEVICE void wait_keys() {
    CopyBarrier::wait(keys_, keys_phase_);
    params_ = buffer_ + keys_phase_ * kParamBytes;
    keys_phase_ ^= 1;
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
  uint32_t keys_phase_ = 0, values_phase_ = 0;
};

}  // namespace oscar
