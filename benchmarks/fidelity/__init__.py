# SPDX-License-Identifier: Apache-2.0
"""What a quantized KV cache loses, measured on trained models: ``python -m benchmarks.fidelity``."""
