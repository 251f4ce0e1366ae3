# SPDX-License-Identifier: Apache-2.0
"""INT2 OScaR paged KV cache for vLLM."""

__version__ = "0.1.0"
