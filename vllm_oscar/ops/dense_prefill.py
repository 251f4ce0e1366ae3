# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, with dense FlashAttention for requests that bring many tokens.

A long query is limited by arithmetic, not by memory: it pays to dequantize pages once into
16 bit and to let the fastest dense kernel attend. Decodes, which lead the batch, stay with
:mod:`.cuda`; requests without history need no page. For the others, once per step:

=====  ==========================================================================
slot   a page of the workspace: 128 tokens of all KV heads in 16 bit; slots form a
       paged cache that FlashAttention reads through a block table
wave   consecutive requests whose pages fit into the workspace together; a page
       that several of them share has one slot
pass   a part of every request's pages. The last pass holds a request's newest pages
       and its own tokens, and is causal. Only a history that does not fit into the
       workspace has other passes, of a workspace each, merged by log-sum-exp
=====  ==========================================================================

With a sliding window, a request's pages begin with the first one of which it sees a token, and
the workspace holds them all. Sinks, of which FlashAttention-2 knows nothing, change the
denominator alone: the output is scaled once its log-sum-exp is known.

The host knows lengths, but only the device knows which pages are shared. So :func:`plan`
counts waves as if none were, and a kernel fills them (``csrc/include/oscar/prefill_plan.cuh``);
those left empty cost two short launches each. A layer then does nothing but launch: per
wave a gather (``gather.cuh``) and FlashAttention, which writes the wave's rows of the output.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from ctypes import c_int32, c_void_p
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby

import torch

from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.softmax import Softmax, first_visible
from vllm_oscar.ops import cuda
from vllm_oscar.ops.native import SoftmaxStruct, StepStruct, fields
from vllm_oscar.ops.step import Cache, Limits, Step

GRAPH_SUPPORT, HEAD_DIMS = cuda.GRAPH_SUPPORT, cuda.HEAD_DIMS
store_pages, write_ring = cuda.store_pages, cuda.write_ring

WORKSPACE_BYTES = 256 << 20
"""65,536 tokens of 8 KV heads of 128. In half of it, 64 requests of 16k would be counted as 64 waves instead of 22."""
MOST_SLOTS = 2048
"""Of a workspace, unless one step needs more: the planning kernel keeps 16 bytes of shared memory for each."""


# ---- FlashAttention ----------------------------------------------------------------
@lru_cache(maxsize=None)
def _flash_attention(head_dim: int) -> Callable | None:
    """vLLM's ``flash_attn_varlen_func`` in the version it would choose, or None.

    All of 2, 3 and 4 take block tables with pages of 128 tokens, ``seqused_k`` and ``out``.
    """
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=head_dim)
    if version is None:
        return None
    return partial(fa_utils.flash_attn_varlen_func, fa_version=version, return_softmax_lse=True)


def _merge(*states: torch.Tensor) -> None:
    """vLLM's ``merge_attn_states``."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merge_attn_states(*states)


@lru_cache(maxsize=None)
def available() -> tuple[bool, str]:
    """Whether vLLM's FlashAttention and our CUDA library are usable here."""
    usable, reason = cuda.available()
    if not usable:
        return False, reason
    try:
        return (True, "") if _flash_attention(128) else (False, "vLLM has no FlashAttention for this device")
    except ImportError as error:
        return False, str(error)


def _serves(fmt: PageFormat, sliding_window: int | None) -> bool:
    """Whether FlashAttention attends; otherwise the CUDA kernels do, long queries too.

    With heads of 256 version 3 of vLLM 0.32 is wrong by itself at some sliding windows, keys in pages or not: on an
    H100 in bf16 1,500 tokens are 4.7 % off at a window of 100, 4.2 % at 300, 0.9 % at 700, but 0.2 %, as they should
    be, at 64, 128, 256 and 1,024. Heads of 128 and 192 are always right.
    """
    return sliding_window is None or fmt.head_dim <= 192


# ---- workspace ---------------------------------------------------------------------
_workspaces: dict[tuple, torch.Tensor] = {}


def _capacity(fmt: PageFormat, limits: Limits) -> int:
    """Slots of the workspace: at least one request's tokens of a step and the pages cut at their ends.

    And its sliding window: FlashAttention's window ends where the keys of a pass do, and so serves the last one alone.
    """
    slot_bytes = 2 * PAGE_TOKENS * limits.kv_heads * fmt.head_dim * limits.dtype.itemsize
    tokens = limits.tokens + (limits.sliding_window or 0)
    return max(min(WORKSPACE_BYTES // slot_bytes, MOST_SLOTS), -(-tokens // PAGE_TOKENS) + 2)


def _workspace(head_dim: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _workspaces[head_dim, kv_heads, dtype, device.type, device.index]


def reserve(fmt: PageFormat, limits: Limits) -> None:
    """Allocate the decode kernel's workspace and ours, ``[2, slots, 128, H, D]`` for keys and values."""
    if not _serves(fmt, limits.sliding_window):
        cuda.reserve(fmt, limits)
        return
    cuda.reserve(fmt, limits, long_queries=False)
    device = torch.empty(0, device=limits.device).device  # with an index
    key = (fmt.head_dim, limits.kv_heads, limits.dtype, device.type, device.index)
    shape = (2, _capacity(fmt, limits), PAGE_TOKENS, limits.kv_heads, fmt.head_dim)
    if key not in _workspaces or _workspaces[key].shape[1] < shape[1]:
        _workspaces[key] = torch.empty(shape, dtype=limits.dtype, device=device)


# ---- the plan of a step ------------------------------------------------------------
class PassParams(ctypes.Structure):
    """``OscarPassParams`` of csrc/include/oscar/prefill.h."""

    _fields_ = [
        ("step", StepStruct),
        ("softmax", SoftmaxStruct),
        *fields(c_void_p, "query_starts keys table sources"),
        *fields(c_int32, "first_request requests index capacity slots columns waves"),
    ]


@dataclass(frozen=True, eq=False)
class Wave:
    """``n`` requests with history are in the plan, with ``T`` rows.

    Attributes:
        query_starts: int32 ``[n + 1]``; requests of other waves have no rows.
        sources: int32 ``[slots, 2]`` request and page index of each slot, or -1.
        rows: bool ``[T]`` the wave's rows; None if it is the plan's only one.
    """

    query_starts: torch.Tensor
    sources: torch.Tensor
    rows: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Pass:
    """A part of every request's pages.

    Attributes:
        causal: the request's own tokens are the last ones of the part.
        keys: int32 ``[n]`` tokens of the part, possibly none.
        table: int32 ``[n, m]`` slots of its pages.
        waves: every request is in one of them.
    """

    causal: bool
    keys: torch.Tensor
    table: torch.Tensor
    waves: list[Wave]


@dataclass(frozen=True, eq=False)
class Fresh:
    """Consecutive requests without history: their rows, int32 ``[n + 1]`` starts among these, the longest."""

    rows: slice
    starts: torch.Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class PrefillPlan:
    """How the requests of a step are attended.

    Attributes:
        sliding_window: of the layers that this plan is for, or None.
        decodes: the step of the leading requests that are left to the decode kernel.
        rows: of the requests with history, from the first to the last.
        longest: most tokens that one of these brings.
        passes: over these; the causal one last.
        fresh: requests without history. Those between ``rows`` are attended afterwards,
            as the passes leave zeros there.
    """

    sliding_window: int | None
    decodes: Step | None
    rows: slice
    longest: int
    passes: list[Pass]
    fresh: list[Fresh]


def plan(
    step: Step, fmt: PageFormat, limits: Limits, query_starts: list[int], seq_lens: list[int], decode_query_len: int
) -> Step:
    """``step`` with its prefill plan, or as it is if all requests are decodes. Launches, but never waits.

    The plan is for layers with ``limits.sliding_window``. ``query_starts`` and ``seq_lens`` are the
    host's copies, exact from the first request on that has more than ``decode_query_len`` tokens.
    """
    lengths = [end - begin for begin, end in zip(query_starts, query_starts[1:])]
    decodes = next((r for r, length in enumerate(lengths) if length > decode_query_len), len(lengths))
    behind = range(decodes, len(lengths))
    if not behind or not _serves(fmt, limits.sliding_window):
        return step
    contexts = [total - length for total, length in zip(seq_lens, lengths)]
    history = [r for r in behind if lengths[r] and contexts[r]]
    fresh = []
    for is_fresh, run in groupby((r for r in behind if lengths[r]), key=lambda r: not contexts[r]):
        if is_fresh:
            run = list(run)
            rows = slice(query_starts[run[0]], query_starts[run[-1] + 1])
            starts = step.query_start_loc[run[0] : run[-1] + 2] - rows.start
            fresh.append(Fresh(rows, starts, max(lengths[r] for r in run)))
    rows, passes = slice(0), []
    if history:
        first, end = history[0], history[-1] + 1
        rows = slice(query_starts[first], query_starts[end])
        spans = [(contexts[r], lengths[r]) if lengths[r] and contexts[r] else (0, 0) for r in range(first, end)]
        passes = _plan_passes(step, first, spans, limits.sliding_window, _capacity(fmt, limits), rows.stop - rows.start)
    longest = max((lengths[r] for r in history), default=0)
    head = step.head(decodes, decode_query_len) if decodes else None
    return replace(step, prefill=PrefillPlan(limits.sliding_window, head, rows, longest, passes, fresh))


def _pages(context: int, length: int, sliding_window: int | None, capacity: int) -> tuple[int, int, int]:
    """A request's first page, first one of its last pass, and one past the last; ``PageSpan`` in prefill_plan.cuh."""
    total = -(-(context + length) // PAGE_TOKENS)
    first = first_visible(sliding_window, context) // PAGE_TOKENS
    full = (context // PAGE_TOKENS - first) // capacity * capacity
    return first, first + max(full, total - first - capacity), total


def _wave_count(counts: Iterable[int], slots: int) -> int:
    """Waves of requests that need so many slots each and share none."""
    waves, used = 1, 0
    for count in counts:
        if used + count > slots:
            waves, used = waves + 1, 0
        used += count
    return waves


def _plan_passes(
    step: Step, first: int, spans: list[tuple[int, int]], sliding_window: int | None, capacity: int, rows: int
) -> list[Pass]:
    """The passes over requests ``first ..``, each with ``(context, length)`` or ``(0, 0)``; launches a kernel each."""
    pages = [_pages(context, length, sliding_window, capacity) for context, length in spans]
    for (visible, last, _), (context, length) in zip(pages, spans):
        if last * PAGE_TOKENS > context or (sliding_window and last > visible):
            raise ValueError(
                f"{length} tokens of a request{' and a sliding window' if sliding_window else ''} do not fit into a "
                f"prefill workspace of {capacity} pages"
            )
    device = step.seq_lens.device
    index = torch.arange(rows, device=device)
    struct, stream = cuda.BINDING.step_struct(step), cuda._stream(step.seq_lens.get_device())
    softmax = SoftmaxStruct(sliding_window=sliding_window or 0)
    numbers = [*range(-(-max(last - visible for visible, last, _ in pages) // capacity)), -1]
    passes = []
    for number in numbers:
        begins = [last if number < 0 else min(visible + number * capacity, last) for visible, last, _ in pages]
        ends = [end if number < 0 else min(begin + capacity, last) for begin, (_, last, end) in zip(begins, pages)]
        counts = [end - begin for begin, end in zip(begins, ends)]
        slots, columns = min(capacity, sum(counts)), max(counts)
        waves, n = _wave_count(counts, slots), len(spans)
        query_starts, sources, table, keys = (
            torch.empty(shape, dtype=torch.int32, device=device)
            for shape in ((waves, n + 1), (waves, slots, 2), (n, columns), (n,))
        )
        params = PassParams(
            struct, softmax, query_starts.data_ptr(), keys.data_ptr(), table.data_ptr(), sources.data_ptr(),
            first, n, number, capacity, slots, columns, waves,
        )  # fmt: skip
        cuda._call("oscar_plan_pass", step.seq_lens.get_device(), ctypes.byref(params), stream)
        of_wave = [None] * waves
        if len(numbers) > 1 or waves > 1:
            of_wave = (index >= query_starts[:, :1]) & (index < query_starts[:, -1:])
        passes.append(Pass(number < 0, keys, table, [Wave(*wave) for wave in zip(query_starts, sources, of_wave)]))
    return passes


# ---- the operations ----------------------------------------------------------------
def attention(
    step: Step, cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of the step's tokens; writes ``out [T, Hq, D]``."""
    prefill = step.prefill
    if prefill is None:
        cuda.attention(step, cache, query, key, value, out)
        return
    if prefill.decodes:
        cuda.attention(prefill.decodes, cache, query, key, value, out)
    softmax = cache.softmax
    if softmax.sliding_window != prefill.sliding_window:
        raise ValueError(f"a plan for layers with the sliding window {prefill.sliding_window}, not {softmax}")
    flash = partial(_flash_attention(cache.fmt.head_dim), **_flash_options(softmax))
    if prefill.passes:
        part = out[prefill.rows]
        lse = _attend_history(flash, step, cache, query[prefill.rows], key, value, part)
        _add_sinks(softmax, part, lse)
    for run in prefill.fresh:
        _, lse = flash(
            query[run.rows], key[run.rows], value[run.rows], out=out[run.rows], causal=True,
            cu_seqlens_q=run.starts, cu_seqlens_k=run.starts, max_seqlen_q=run.longest, max_seqlen_k=run.longest,
        )  # fmt: skip
        _add_sinks(softmax, out[run.rows], lse)


def _flash_options(softmax: Softmax) -> dict[str, object]:
    options = {"softmax_scale": softmax.scale}
    if softmax.sliding_window is not None:
        options["window_size"] = [softmax.sliding_window - 1, 0]  # tokens before and behind each query
    if softmax.soft_cap is not None:
        options["softcap"] = softmax.soft_cap
    return options


def _add_sinks(softmax: Softmax, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Add the weight of each head's sink to the denominators of ``out [T, Hq, D]``; ``lse [Hq, T]`` is without."""
    if softmax.sinks is not None:
        out.mul_(torch.sigmoid(lse.T - softmax.sinks)[..., None])


def _attend_history(
    flash: Callable,
    step: Step,
    cache: Cache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """All passes; ``query`` and ``out`` are the plan's rows, ``key`` and ``value`` the step's tokens.

    Returns the log-sum-exp ``[Hq, T]`` where the plan has several passes, or the layer sinks.
    """
    passes = step.prefill.passes
    result = lse = None
    for number, one in enumerate(passes):
        part = out if len(passes) == 1 else torch.empty_like(out)
        part_lse = _attend_pass(flash, step, one, cache, query, key, value, part)
        if result is None:
            result, lse = part, part_lse
            continue
        merged, merged_lse = out if number == len(passes) - 1 else torch.empty_like(out), torch.empty_like(lse)
        _merge(merged, result, lse, part, part_lse, merged_lse)
        result, lse = merged, merged_lse
    return lse


def _attend_pass(
    flash: Callable,
    step: Step,
    one: Pass,
    cache: Cache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """One pass into ``out``; returns the log-sum-exp ``[Hq, T]``, of the last wave alone if nobody asks for it."""
    wanted = len(step.prefill.passes) > 1 or cache.softmax.sinks is not None
    keys, values = _workspace(cache.fmt.head_dim, cache.kv_heads, key.dtype, key.device)
    params, device = ctypes.byref(cuda.BINDING.store(step, cache, key, value)), key.get_device()
    into, stream = (c_void_p(keys.data_ptr()), c_void_p(values.data_ptr())), cuda._stream(device)
    lse = None
    for wave in one.waves:
        sources = c_void_p(wave.sources.data_ptr())
        cuda._call("oscar_gather", device, params, sources, len(wave.sources), *into, stream)
        _, found = flash(
            query, keys, values, out=out, causal=one.causal,
            cu_seqlens_q=wave.query_starts, max_seqlen_q=step.prefill.longest,
            seqused_k=one.keys, max_seqlen_k=one.table.shape[1] * PAGE_TOKENS, block_table=one.table,
        )  # fmt: skip
        lse = torch.where(wave.rows, found, lse) if wanted and lse is not None else found
    return lse
