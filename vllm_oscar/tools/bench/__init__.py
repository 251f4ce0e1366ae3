# SPDX-License-Identifier: Apache-2.0
"""Serving benchmarks of KV-cache dtypes at equal memory: vLLM's own tools, one record, one report."""
