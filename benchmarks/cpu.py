# SPDX-License-Identifier: Apache-2.0
"""CPU attention over INT2 pages beside vLLM's own CPU attention over bf16 blocks.

Both run in this process, on the same batch, in turns; a case's ratio is the median of
the ratios of its pairs. Each OScaR result is first compared with the reference.

A case has as many copies of both caches as it takes for each to exceed ``--cold-mib``, and
calls go round them: between two calls of a layer a real model reads its other layers and
its weights, so that no cache of the processor still holds this layer's tokens. Without it
(``--cold-mib 0``) short contexts of bf16 are read from L2 or L3.

    python benchmarks/cpu.py                                  # contexts x batches of decode
    python benchmarks/cpu.py --context 8192 --batch 4 --json out.json
    python benchmarks/cpu.py --query 1024 --context 4096      # one chunk of a prefill
    python benchmarks/cpu.py --sliding-window 1024            # its times should not grow with the context
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).parents[1])  # not this folder, whose kernels.py would hide a package of that name

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vllm_oscar.core.config import PAGE_TOKENS  # noqa: E402
from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.core.softmax import Softmax  # noqa: E402
from vllm_oscar.ops import cpu, reference  # noqa: E402
from vllm_oscar.ops.step import Cache, Step  # noqa: E402

DTYPE = torch.bfloat16


@dataclass
class Record:
    """One case. Times are medians; bandwidths count the bytes of the cache that is read."""

    context: int
    batch: int
    query: int
    heads: int
    kv_heads: int
    head_dim: int
    preset: str
    sliding_window: int  # 0: none
    threads: int
    cold_mib: float
    isa: str
    us_oscar: float
    us_bf16: float
    ratio: float
    error: float
    percent_bandwidth_oscar: float
    percent_bandwidth_bf16: float


class Case:
    """A batch of requests of equal length, for both implementations."""

    def __init__(
        self,
        fmt: PageFormat,
        softmax: Softmax,
        context: int,
        batch: int,
        query: int,
        heads: int,
        kv_heads: int,
        cold: int,
    ):
        self.fmt, self.softmax, self.query_heads, self.heads = fmt, softmax, heads, kv_heads
        dim, seq_len = fmt.head_dim, context + query
        self.context, self.batch, self.new = context, batch, query
        count, skipped = -(-seq_len // PAGE_TOKENS), softmax.first_visible(context) // PAGE_TOKENS
        blocks = batch * (count - skipped)  # those before the window are free
        page_table = torch.zeros(batch, count, dtype=torch.int32)
        page_table[:, skipped:] = torch.randperm(blocks, dtype=torch.int32).view(batch, -1)
        self.query = torch.randn(batch * query, heads, dim).to(DTYPE)
        self.key, self.value = (torch.randn(batch * query, kv_heads, dim).to(DTYPE) for _ in range(2))
        self.out_oscar, self.out_bf16 = torch.empty_like(self.query), torch.empty_like(self.query)

        ring_pages = fmt.ring_pages(DTYPE.itemsize)
        start = min(context // PAGE_TOKENS * PAGE_TOKENS, max(context - fmt.config.window, 0))
        self.step = Step(
            query_start_loc=torch.arange(batch + 1, dtype=torch.int32) * query,
            seq_lens=torch.full((batch,), seq_len, dtype=torch.int32),
            page_table=page_table,
            ring_table=torch.arange(batch * ring_pages, dtype=torch.int32).view(batch, -1),
            ring_start=torch.full((batch,), start, dtype=torch.int32),
            max_query_len=query,
        )
        # Sixteen different pages, over and over: encoding 64k x 16 tokens would take longer than measuring.
        some = 16
        first = Cache(
            pages=torch.empty(some, kv_heads, fmt.page_bytes, dtype=torch.uint8),
            ring=torch.zeros(batch * ring_pages, kv_heads, fmt.page_bytes, dtype=torch.uint8),
            ring_pages=ring_pages,
            fmt=fmt,
            softmax=softmax,
        )
        whole = replace(
            self.step.head(1, some * PAGE_TOKENS),
            query_start_loc=torch.tensor([0, some * PAGE_TOKENS], dtype=torch.int32),
            seq_lens=torch.tensor([some * PAGE_TOKENS], dtype=torch.int32),
            page_table=torch.arange(some, dtype=torch.int32)[None],
        )
        cpu.store_pages(whole, first, *torch.randn(2, some * PAGE_TOKENS, kv_heads, dim).to(DTYPE))
        pages = first.pages[1:].repeat(-(-blocks // (some - 1)), 1, 1)[:blocks].clone()
        if not skipped:
            pages[page_table[:, 0].long()] = first.pages[0]  # only there does a first page make sense
        recent = min(context, fmt.config.ring_capacity())
        newest_tokens = replace(
            self.step,
            query_start_loc=torch.arange(batch + 1, dtype=torch.int32) * recent,
            seq_lens=torch.full((batch,), context, dtype=torch.int32),
            max_query_len=recent,
        )
        cpu.write_ring(newest_tokens, first, *torch.randn(2, batch * recent, kv_heads, dim).to(DTYPE))

        self.turn, (oscar_bytes, bf16_bytes) = 0, self.bytes_read()
        copies = range(max(1, -(-cold // oscar_bytes)))
        self.caches = [replace(first, pages=pages.clone(), ring=first.ring.clone()) for _ in copies]

        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.vllm = _custom_ops
        block = torch.randn(1, kv_heads, 2 * PAGE_TOKENS, dim).to(DTYPE)
        copies = range(max(1, -(-cold // bf16_bytes)))
        self.blocks = [block.repeat(blocks, 1, 1, 1).chunk(2, dim=2) for _ in copies]
        self.metadata = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            seq_lens=self.step.seq_lens,
            dtype=DTYPE,
            query_start_loc=self.step.query_start_loc,
            causal=True,
            sliding_window_size=softmax.sliding_window or -1,
            isa=_get_attn_isa(DTYPE, PAGE_TOKENS, dim),
            enable_kv_split=True,
        )

    def error(self) -> float:
        """Relative error of the first request and KV head; the reference is too slow for more."""
        step, cache, group = self.step.head(1, self.new), self.caches[0], self.query_heads // self.heads
        cache = replace(cache, pages=cache.pages[:, :1], ring=cache.ring[:, :1])
        rows = slice(self.new)
        key, value, query = self.key[rows, :1], self.value[rows, :1], self.query[rows, :group]
        got, want = torch.empty_like(query), torch.empty_like(query)
        cpu.attention(step, cache, query, key, value, got)
        reference.attention(step, cache, query, key, value, want)
        return float((got.float() - want.float()).norm() / want.float().norm())

    def oscar(self) -> None:
        """The operation on the copy whose turn it is."""
        cache = self.caches[self.turn % len(self.caches)]
        cpu.attention(self.step, cache, self.query, self.key, self.value, self.out_oscar)

    def bf16(self) -> None:
        key_cache, value_cache = self.blocks[self.turn % len(self.blocks)]
        self.vllm.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=self.out_bf16,
            query_start_loc=self.step.query_start_loc,
            seq_lens=self.step.seq_lens,
            scale=self.softmax.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=self.softmax.sliding_window or -1,
            block_table=self.step.page_table,
            softcap=0,
            scheduler_metadata=self.metadata,
            s_aux=None,
        )

    def bytes_read(self) -> tuple[int, int]:
        """Cache bytes of OScaR and of bf16."""
        token = 2 * self.fmt.head_dim * DTYPE.itemsize
        first = self.softmax.first_visible(self.context)
        start = max(int(self.step.ring_start[0]), first)
        pages = (-(-start // PAGE_TOKENS) - first // PAGE_TOKENS if start > first else 0) * self.fmt.page_bytes
        ring = (self.context - start) * self.fmt.config.ring.token_bytes(self.fmt.head_dim, DTYPE.itemsize)
        heads = self.batch * self.heads
        return heads * (pages + ring + self.new * token), heads * (self.context - first + self.new) * token


def read_bandwidth() -> float:
    """Bytes per second that all threads read from memory, the best of several sums."""
    data = torch.ones(1 << 25, dtype=torch.int64)  # 256 MiB
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


def measure(case: Case, repeats: int, cpu_time: bool) -> tuple[float, float, float]:
    """Median microseconds of both, and the median ratio of the pairs."""
    clock = time.process_time if cpu_time else time.perf_counter
    case.oscar(), case.bf16()
    oscar, bf16 = [], []
    for case.turn in range(1, repeats + 1):
        begin = clock()
        case.bf16()
        middle = clock()
        case.oscar()
        end = clock()
        bf16.append((middle - begin) * 1e6)
        oscar.append((end - middle) * 1e6)
    ratios = [b / o for b, o in zip(bf16, oscar)]
    return statistics.median(oscar), statistics.median(bf16), statistics.median(ratios)


def draw(records: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for batch in sorted({r.batch for r in records}):
        mine = sorted((r for r in records if r.batch == batch), key=lambda r: r.context)
        axes.plot([r.context for r in mine], [r.ratio for r in mine], marker="o", label=f"batch {batch}")
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("times as fast as vLLM's bf16 CPU attention")
    first = records[0]
    axes.set_title(f"{first.preset}: {first.heads} query heads on {first.kv_heads}, head size {first.head_dim}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(
    context: Annotated[list[int] | None, typer.Option(help="Tokens before the step; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Requests; repeatable.")] = None,
    query: Annotated[int, typer.Option(help="New tokens of each request: 1 is decode.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: int = 128,
    preset: str = "oscar",
    sliding_window: Annotated[int, typer.Option(help="Of the model; 0: none.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(help="Pairs a case.")] = 25,
    cpu_time: Annotated[
        bool, typer.Option(help="Count CPU time instead of wall time; for one thread on a busy machine.")
    ] = False,
    cold_mib: Annotated[
        float, typer.Option(help="Go round copies of each cache that are this large together; 0: one copy.")
    ] = 128.0,
    max_gib: Annotated[float, typer.Option(help="Leave out cases whose bf16 cache is larger.")] = 8.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one record per case.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG.")] = None,
) -> None:
    """Compare OScaR's CPU attention with vLLM's bf16 CPU attention."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if threads:
        torch.set_num_threads(threads)
    if cpu_time and torch.get_num_threads() > 1:
        raise typer.BadParameter("--cpu-time needs --threads 1")
    fmt = PageFormat.preset(preset, head_dim)
    bandwidth = read_bandwidth()
    console = Console()
    isa = cpu.isa()
    softmax = Softmax(head_dim**-0.5, sliding_window or None)
    title = f"{preset}, {torch.get_num_threads()} threads, {isa}, reads {bandwidth / 1e9:.1f} GB/s"
    table = Table(title=title + (f", sliding window {sliding_window}" if sliding_window else ""))
    for column in ("context", "batch", "oscar us", "bf16 us", "ratio", "oscar % bw", "bf16 % bw", "error"):
        table.add_column(column, justify="right")
    records = []
    for length in context or [1024, 2048, 4096, 8192, 16384, 32768, 65536]:
        for requests in batch or [1, 4, 16]:
            tokens = length - softmax.first_visible(length) + query
            if requests * tokens * kv_heads * head_dim * 2 * DTYPE.itemsize > max_gib * 2**30:
                continue
            case = Case(fmt, softmax, length, requests, query, heads, kv_heads, int(cold_mib * 2**20))
            error = case.error()
            if not error < 5e-3:
                raise SystemExit(f"context {length}, batch {requests}: relative error {error:.2e}; nothing was timed")
            us_oscar, us_bf16, ratio = measure(case, repeats, cpu_time)
            share = [100 * n / (us * 1e-6) / bandwidth for n, us in zip(case.bytes_read(), (us_oscar, us_bf16))]
            record = Record(
                length, requests, query, heads, kv_heads, head_dim, preset, sliding_window, torch.get_num_threads(),
                cold_mib, isa, round(us_oscar, 1), round(us_bf16, 1), round(ratio, 3), error, round(share[0], 1),
                round(share[1], 1),
            )  # fmt: skip
            records.append(record)
            table.add_row(
                f"{length}", f"{requests}", f"{us_oscar:.0f}", f"{us_bf16:.0f}", f"{ratio:.2f}",
                f"{share[0]:.0f}", f"{share[1]:.0f}", f"{error:.1e}",
            )  # fmt: skip
            del case
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")
    if plot and records:
        draw(records, plot)


if __name__ == "__main__":
    typer.run(main)
