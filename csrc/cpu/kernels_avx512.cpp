// SPDX-License-Identifier: Apache-2.0
#define OSCAR_TABLE oscar_kernels_avx512
#if defined(__x86_64__)
#include "kernels.inc"
#endif
