# SPDX-License-Identifier: Apache-2.0
"""What the cache operations work on: a step, a layer's cache, and the operations themselves.

=========  ============================================================================
context    a request's tokens before this step
page       128 tokens of one KV head, quantized; one block of the page group, all heads
ring       the newest tokens of a request (core/ring.py), in blocks of the ring group;
           position p is in slot ``p % (ring_pages * tokens per page)``
=========  ============================================================================

Table entries beyond a request's need, page bytes never written, and requests without
tokens in this step may hold anything; nothing of them reaches an output.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.lossless import LosslessFormat
from vllm_oscar.core.softmax import Softmax

if TYPE_CHECKING:
    from vllm_oscar.ops.dense_prefill import PrefillPlan


@dataclass(frozen=True, eq=False)
class Step:
    """What the requests of one step look like: the same for all layers. ``R`` requests, int32 tensors.

    Attributes:
        query_start_loc: ``[R + 1]``; the step's tokens of request r are rows
            ``query_start_loc[r] .. query_start_loc[r + 1] - 1``; may be none.
        seq_lens: ``[R]`` tokens, the step's own included.
        page_table: ``[R, M]`` block of the tokens ``128 * i .. 128 * i + 127``.
        ring_table: ``[R, >= ring_pages]`` blocks of the ring.
        ring_start: ``[R]`` positions ``ring_start .. context - 1`` are read from the ring,
            those before from pages, the last one possibly in part.
        max_query_len: upper bound on the tokens of a request, on the host: launches depend on it.
        tables_settled: everything that writes the tensors above has ended when
            ``attention`` is called, because ``store_pages`` was launched in between:
            they may be read while the launch before is still running.
        prefill: what ``dense_prefill.plan`` made of the requests that are no decodes.
        native: what a native backend has checked and converted, by its name.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    ring_table: torch.Tensor
    ring_start: torch.Tensor
    max_query_len: int
    tables_settled: bool = False
    prefill: PrefillPlan | None = None
    native: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    @property
    def requests(self) -> int:
        return self.seq_lens.shape[0]

    def head(self, requests: int, max_query_len: int) -> Step:
        """The first ``requests`` requests, none of which has more than ``max_query_len`` tokens."""
        return replace(
            self,
            query_start_loc=self.query_start_loc[: requests + 1],
            seq_lens=self.seq_lens[:requests],
            page_table=self.page_table[:requests],
            ring_table=self.ring_table[:requests],
            ring_start=self.ring_start[:requests],
            max_query_len=max_query_len,
            prefill=None,
        )


@dataclass(frozen=True, eq=False)
class Cache:
    """One layer's cache: the same in all steps.

    Attributes:
        pages, ring: uint8 ``[blocks, H, page_bytes]``, last dimension contiguous. The ring
            has its own block numbers and may be another tensor.
        ring_pages: pages of one request's ring.
        fmt: the page layout.
        softmax: from logits to weights. With a sliding window, table entries of pages that no
            token of the step sees are never read.
        native: what a native backend has checked and converted, by its name.
    """

    pages: torch.Tensor
    ring: torch.Tensor
    ring_pages: int
    fmt: PageFormat | LosslessFormat
    softmax: Softmax
    native: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    @property
    def kv_heads(self) -> int:
        return self.pages.shape[1]


@dataclass(frozen=True)
class Limits:
    """The largest step that will come, for workspaces that must not grow later.

    Attributes:
        requests: of a step.
        tokens: of a step.
        decode_query_len: tokens of a request that counts as a decode, drafts included.
        query_heads, kv_heads: of one rank.
        dtype, device: of the model.
        sliding_window: of the layer; None: it has none.
    """

    requests: int
    tokens: int
    decode_query_len: int
    query_heads: int
    kv_heads: int
    dtype: torch.dtype
    device: torch.device
    sliding_window: int | None = None


@dataclass(frozen=True)
class HostLengths:
    """What the host knows of a step without asking the device; int32 tensors on the CPU.

    Attributes:
        query_start_loc: ``[R + 1]``.
        seq_lens: ``[R]`` upper bounds; exact for requests in prefill.
        decode_query_len: requests with more tokens come last in the batch.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    decode_query_len: int


class Kernels(Protocol):
    """The three operations of one backend; its module is the object.

    They run in this order for a whole batch, because a request may find in the prefix
    cache a block that another request of the same step is completing, and because the
    ring slots of new tokens still hold tokens that the step reads. ``key`` and ``value``
    are the step's tokens, ``[T, H, D]`` in the model's dtype, keys after RoPE.

    Attributes:
        HEAD_DIMS: head sizes that these kernels have; absent: all.
        GRAPH_SUPPORT: name of vLLM's ``AttentionCGSupport``; absent: ``"NEVER"``.
    """

    def store_pages(self, step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
        """Quantize every block that becomes full in this step, from ring and new tokens."""

    def attention(
        self, step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Causal attention over pages, ring and the step's own tokens; ``query``, ``out``: ``[T, Hq, D]``."""

    def write_ring(self, step: Step, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the newest tokens of each request, at most the ring's capacity."""

    def reserve(self, fmt: PageFormat, limits: Limits) -> None:
        """Allocate what the operations need, before memory is profiled and graphs are captured."""

    def available(self) -> tuple[bool, str]:
        """Whether these kernels can be used here, and if not, why not."""
