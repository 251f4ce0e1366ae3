# SPDX-License-Identifier: Apache-2.0
"""What kernels may differ by, in one place. Errors are ratios to the truth in float64 or float32.

A bound holds for every case of a matrix; a kernel that reads one wrong token, or misses one, is
off by ten times as much.
"""

import torch

# Share of page bytes that may differ from the reference: rounding ties, from another order of summation.
STORED_BYTES = 1e-3

# The reference against tests/independent_codec.py, float32 against float64: of a token, the largest error of an element
# by the largest element, and the share of tokens that may be further off, since a stored parameter or a code lies on a
# rounding edge (0.4 % were seen). Where a channel lies off zero, sums cancel: 5e-6 was seen.
INDEPENDENT = 1e-5
INDEPENDENT_EDGES = 0.01
# A trained model's divergence with either of them, relative.
INDEPENDENT_KL = 0.02

# Root mean square over all outputs. The CPU kernels round queries and weights to 16 bits, then to the model's dtype.
CPU = {torch.float32: 2e-4, torch.bfloat16: 3e-3, torch.float16: 5e-4}

# The CUDA kernels round queries times key scales to fp16, so errors grow with the scores. Of the worst output row:
CUDA = {torch.float16: 6e-3, torch.bfloat16: 1e-2}
# Over a matrix with thousands of rows: CUDA bounds 99 % of a case's rows; and these the root mean square of all and the
# worst one, which was of oscar_4bit, probably because its codes go to 15 and its zeros lie far from 0.
CUDA_RMS = {torch.float16: 2.5e-3, torch.bfloat16: 5e-3}
CUDA_WORST_OF_MANY = 1e-2

# Of every element, absolute and relative; the interpreter's products of fp16 are exact.
TRITON = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# Logprobs through vLLM against an independent computation of the same numerics: worst, and median of a request.
# Two float32 computations differ by about 1e-5 until a value at the edge between two codes is rounded to different
# sides. Where none is, single logprobs differ by up to 5e-3, but the median of a request by 2e-4 at most (4e-5 was
# seen here). Reading one token from the codec instead of the ring moves the median by 5e-4 to 1.5e-3.
# The CPU kernels' rounding, 1e-4 of the attention's output in each layer, moves more values over edges: here by up
# to 2e-2, and 9e-4 in the median.
INT2_LOGPROBS = {"reference": (1e-2, 3e-4), "cpu": (5e-2, 2e-3)}

# Pages in a running engine's cache, decoded, against that computation: the norm of a page's difference by the page's.
# Codes and scales at edges, which later layers and chunks multiply, made up to 3e-2 here; another page makes 1.
INT2_PAGES = 6e-2
