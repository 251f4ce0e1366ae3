// SPDX-License-Identifier: Apache-2.0
// Memory of one thread, kept between calls: a decode step must not touch fresh pages of memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace {

class Scratch {
 public:
  ~Scratch() { free(base_); }

  // Room for `bytes` in all; false when there is none.
  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    free(base_);
    size_ = (bytes + 4095) / 4096 * 4096;
    base_ = static_cast<char*>(aligned_alloc(64, size_));
    if (!base_) size_ = 0;
    return base_ != nullptr;
  }

  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += padded(count * sizeof(T));
    return p;
  }

  static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

thread_local Scratch thread_scratch;

}  // namespace
