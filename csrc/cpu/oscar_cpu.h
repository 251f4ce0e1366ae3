// SPDX-License-Identifier: Apache-2.0
// The C ABI of the CPU library: ops/cpu.py calls it. The arguments are those of oscar/abi.h; here is how to run.
#pragma once

#include <cstdint>

#include "oscar/abi.h"

#define OSCAR_EXPORT __attribute__((visibility("default")))

extern "C" {

enum OscarIsa : int32_t { OSCAR_PORTABLE = 0, OSCAR_AVX2 = 1, OSCAR_AVX512 = 2, OSCAR_AVX512_BF16 = 3, OSCAR_AMX = 4 };

struct OscarCpuRun {
  const float *hadamard, *hadamard_t;  // [head_dim, head_dim], H and its transpose
  int32_t threads;
  int32_t isa;                         // OscarIsa
};

// Instruction sets that both this build and this machine have, as bits 1 << OscarIsa.
OSCAR_EXPORT int32_t oscar_cpu_isas();
// sizeof of OscarStoreParams, OscarAttentionParams and OscarCpuRun, so that a library of another version can
// be refused.
OSCAR_EXPORT void oscar_cpu_sizes(int32_t sizes[3]);

// OSCAR_FORMAT_VERSION: the library reads and writes pages of no other.
OSCAR_EXPORT int32_t oscar_cpu_format_version();

// 0, or 1 when memory for scratch is missing.
OSCAR_EXPORT int32_t oscar_cpu_store_pages(const OscarStoreParams* params, const OscarCpuRun* run);
OSCAR_EXPORT int32_t oscar_cpu_attention(const OscarAttentionParams* params, const OscarCpuRun* run);
OSCAR_EXPORT int32_t oscar_cpu_write_ring(const OscarStoreParams* params, const OscarCpuRun* run);
}

// The entry points of one instruction set.
struct OscarKernels {
  int32_t (*store_pages)(const OscarStoreParams&, const OscarCpuRun&);
  int32_t (*attention)(const OscarAttentionParams&, const OscarCpuRun&);
  int32_t (*write_ring)(const OscarStoreParams&, const OscarCpuRun&);
};
extern const OscarKernels oscar_kernels_portable, oscar_kernels_avx2, oscar_kernels_avx512;
