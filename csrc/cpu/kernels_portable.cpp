// SPDX-License-Identifier: Apache-2.0
#define OSCAR_TABLE oscar_kernels_portable
#include "kernels.inc"
