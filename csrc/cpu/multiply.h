// SPDX-License-Identifier: Apache-2.0
// Matrix products in bf16, for the instruction sets that have them.
#pragma once

#include <cstdint>

// C[row][column] = A[row][depth] B, or + C, with fp32 sums.
//
// a: bf16 [rows][lda]. b: [depth / 2][ldb] words; a word has two consecutive depths of a column, the
// first in its low half. columns is a multiple of 16, depth of 32. Rows up to the next multiple of 16
// exist in a and c and may be read and written.
typedef void (*MultiplyBf16)(const uint16_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows,
                             int columns, int depth, bool add);

// Null where the compiler lacks the instructions.
extern const MultiplyBf16 oscar_multiply_avx512_bf16, oscar_multiply_amx;

// Whether this process may use them; on Linux a process asks for AMX's registers once.
bool oscar_has_avx512_bf16();
bool oscar_has_amx();
