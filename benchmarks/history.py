# SPDX-License-Identifier: Apache-2.0
"""How many tokens a query reads from quantized pages when vLLM prefills in chunks."""

from __future__ import annotations

import torch

from vllm_oscar.engine.metadata import ring_start


def history(position: torch.Tensor, chunk: int, window: int) -> torch.Tensor:
    """Tokens read from pages, at least, by queries at ``position`` (any shape, counted from 0).

    The one rule by which a score sees a loss or not. A step's own tokens are read in 16 bit and the
    ``window`` before them from the ring; what is older comes from pages. A step of at most ``chunk``
    tokens that holds ``position`` begins at ``position + 1 - chunk`` or later. So the first query that
    reads a page is at ``chunk + window``, and a generated token, a chunk of its own, reads
    ``position - window``. After a prefix hit more is read from pages, never less.

    ``chunk`` is vLLM's ``max_num_batched_tokens``. Its ``long_prefill_token_threshold`` does not bound
    a chunk: it is ignored for a request that is alone.
    """
    return ring_start((position + 1 - chunk).clamp(min=0), torch.zeros_like(position), window)
