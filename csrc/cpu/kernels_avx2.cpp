// SPDX-License-Identifier: Apache-2.0
#define OSCAR_TABLE oscar_kernels_avx2
#if defined(__x86_64__)
#include "kernels.inc"
#endif
