// SPDX-License-Identifier: Apache-2.0
#include "multiply.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Leaf(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};

}  // namespace

bool oscar_has_avx512_bf16() { return oscar_multiply_avx512_bf16 && Leaf(1).eax >> 5 & 1; }

bool oscar_has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const unsigned features = Leaf(0).edx;
  return oscar_multiply_amx && features >> 22 & 1 && features >> 24 & 1 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool oscar_has_avx512_bf16() { return false; }
bool oscar_has_amx() { return false; }
#endif
