# SPDX-License-Identifier: Apache-2.0
"""The cache operations on each device. May import :mod:`vllm_oscar.core`; vLLM only where a kernel is vLLM's own."""
