// SPDX-License-Identifier: Apache-2.0
#include "../../csrc/cpu/multiply.h"

bool oscar_has_avx512_bf16() { return false; }
bool oscar_has_amx() { return true; }
