# SPDX-License-Identifier: Apache-2.0
"""Standard long-context suites through vLLM, a column per KV-cache dtype: ``python -m benchmarks.harness``."""
