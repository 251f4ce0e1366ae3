# SPDX-License-Identifier: Apache-2.0
"""Check, then time, the attention and store kernels on a GPU.

    python benchmarks/kernels.py --flash --output benchmarks/results/kernels.json

Times are CUDA-graph replays; caches rotate so that no launch finds its data in L2.
A kernel whose output is wrong is not timed. Nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not this folder, where this file hides a package of its name

import torch  # noqa: E402

from benchmarks import kernel_baselines as baselines  # noqa: E402
from benchmarks.kernel_cases import Case, make_case, random_ring, relative_error  # noqa: E402
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS  # noqa: E402
from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.core.softmax import first_visible  # noqa: E402
from vllm_oscar.ops import cuda  # noqa: E402
from vllm_oscar.ops.step import Step  # noqa: E402
from vllm_oscar.tools.bench import scrape  # noqa: E402

MODELS = {"qwen3-8b": (8, 4, 128), "llama-3.1-8b": (8, 4, 128), "qwen3-32b": (8, 8, 128), "d64": (8, 4, 64)}
CASES = [
    *((1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (8, 131072)),
    *((16, 32768), (64, 1024), (64, 8192), (64, 32768)),
]
SLIDING_CASES = [(64, 2048), (64, 32768)]  # a window's time does not grow with the context
ROTATED_BYTES = 240e6  # four times the L2 of an H200
ERROR_LIMIT = 8e-3
SETTLE_S = 0.15


# ---- timing ---------------------------------------------------------------------
def time_us(launches: list, minimum: int = 36) -> float:
    """Median time of one launch in a graph of ``minimum`` or more, as many as a model has layers.

    ``launches`` are equivalent calls on different data. Replays run for SETTLE_S before any counts:
    the clocks of a device that was idle, or busy with the check, take that long to settle.
    """
    repeat = -(-minimum // len(launches))
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for launch in launches:
                launch()
    times = []
    started = time.perf_counter()
    while len(times) < 9:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if time.perf_counter() - started > SETTLE_S:
            times.append(begin.elapsed_time(end) * 1e3 / (repeat * len(launches)))
    return sorted(times)[len(times) // 2]


def read_bandwidth() -> float:
    """Best rate in bytes/s at which a plain kernel reads 4 GiB."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(x, out, n, block: tl.constexpr):
        total = tl.zeros((block,), tl.int32)
        for start in range(tl.program_id(0) * block, n, tl.num_programs(0) * block):
            total ^= tl.load(x + start.to(tl.int64) + tl.arange(0, block))
        tl.store(out + tl.program_id(0) * block + tl.arange(0, block), total)

    n = 1 << 30
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, device="cuda")
    best = 0.0
    for block, programs in ((4096, 132 * 4), (8192, 132 * 2), (8192, 132 * 4), (4096, 132 * 8)):
        out = torch.empty(programs * block, dtype=torch.int32, device="cuda")
        us = time_us([lambda b=block, p=programs, o=out: read[(p,)](x, o, n, block=b, num_warps=8)], 2)
        best = max(best, 4 * n / us * 1e6)
    return best


# ---- caches of the size to be timed -----------------------------------------------
def big_case(
    fmt: PageFormat, batch: int, context: int, heads: int, group: int, dtype, sliding_window: int | None = None
) -> tuple[list[Case], int]:
    """Equal steps on disjoint blocks of a cache, and the bytes that one of them must read.

    Sequences have ``context`` tokens including the step's one; pages repeat a pool of
    encoded random blocks in random order.
    """
    seed = make_case(
        fmt, [(PAGE_TOKENS * 64, 1)] * 8, kv_heads=heads, group=group, dtype=dtype, lookahead=0, seed=context + batch
    )
    encoded = seed.cache.pages[seed.step.page_table[:, :64].long()]  # [8, 64, H, bytes]
    per_sequence = -(-context // PAGE_TOKENS)
    start = min((context - 1) // PAGE_TOKENS * PAGE_TOKENS, max(0, context - 1 - fmt.config.window))
    first = first_visible(sliding_window, context - 1)
    page_count = -(-start // PAGE_TOKENS) - first // PAGE_TOKENS if start > first else 0
    recent = fmt.config.ring.token_bytes(fmt.head_dim, dtype.itemsize) * (context - 1 - max(start, first))
    recent += 2 * fmt.head_dim * dtype.itemsize  # the step's own token
    nbytes = batch * heads * (page_count * fmt.page_bytes + recent)
    sets = min(16, max(1, -(-int(ROTATED_BYTES) // nbytes)))
    blocks = sets * batch * per_sequence
    pages = torch.empty(blocks, heads, fmt.page_bytes, dtype=torch.uint8, device="cuda")
    table = torch.randperm(blocks, device="cuda").int().view(sets, batch, per_sequence)
    rest = encoded[:, 1:].flatten(0, 1)
    for begin in range(0, blocks, 4096):
        part = pages[begin : begin + 4096]
        part.copy_(rest[torch.randint(len(rest), (len(part),), device="cuda")])
    firsts = table[..., 0].flatten().long()
    pages[firsts] = encoded[:, 0][torch.randint(8, (len(firsts),), device="cuda")]

    ring_pages = seed.cache.ring_pages
    ring = random_ring(sets * batch * ring_pages, heads, fmt, dtype, "cuda")
    ring_table = torch.randperm(len(ring), device="cuda").int().view(sets, batch, ring_pages)
    query = torch.randn(batch, heads * group, fmt.head_dim, device="cuda").to(dtype)
    key, value = (torch.randn(batch, heads, fmt.head_dim, device="cuda").to(dtype) for _ in range(2))
    softmax = replace(seed.cache.softmax, sliding_window=sliding_window)
    cache = replace(seed.cache, pages=pages, ring=ring, softmax=softmax)
    step = Step(
        query_start_loc=torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        seq_lens=torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        page_table=table[0],
        ring_table=ring_table[0],
        ring_start=torch.full((batch,), start, dtype=torch.int32, device="cuda"),
        max_query_len=1,
        tables_settled=True,  # as in vLLM: nothing that ran before has just written tables or lengths
    )
    steps = [replace(step, page_table=table[i], ring_table=ring_table[i]) for i in range(sets)]
    return [Case(step, cache, query, key, value) for step in steps], nbytes


def attention_launch(ops, case: Case, **options):
    """A function that launches the attention of ``ops``."""
    out = torch.empty_like(case.query)
    return lambda: ops.attention(case.step, case.cache, case.query, case.key, case.value, out, **options)


def flash_us(*shape: int, **options) -> tuple[float, int]:
    """FlashAttention-3 at the best of several split counts: time, bytes."""
    batch, _, heads, *_ = shape
    counts = [0] + ([16, 32] if batch * heads < 132 else [])
    runs = (baselines.flash_attention_3(*shape, ROTATED_BYTES, splits, **options) for splits in counts)
    return min((time_us(launches), nbytes) for launches, nbytes in runs)


def flashinfer_us(*shape: int) -> tuple[float, int]:
    """FlashInfer in bf16 at the better of two block sizes: time, bytes."""
    runs = (baselines.flashinfer(*shape, ROTATED_BYTES, page) for page in (16, 128))
    return min((time_us(launches), nbytes) for launches, nbytes in runs)


def draw(records: list[dict], path: Path) -> None:
    """Times as fast as the best bf16 kernel, over context, a line per kernel, preset, model and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if r.get("ratio_to_best_bf16"):
            window = r.get("sliding_window") and f"sliding window {r['sliding_window']}"
            label = " ".join(filter(None, (r["kernel"], r.get("preset"), r["model"], f"batch {r['batch']}", window)))
            lines.setdefault(label, []).append((r["context"], r["ratio_to_best_bf16"]))
    figure, axes = plt.subplots(figsize=(8, 5))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=label)
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("times as fast as the best bf16 kernel")
    axes.set_title(records[0]["device"])
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ---- the runs -----------------------------------------------------------------------
def triton_ops():
    try:
        from vllm_oscar.ops import triton as ops
    except ImportError:
        return None
    return ops if ops.available()[0] else None


# head_dim, dtype, query heads per KV head, query length
CHECKS = ((128, torch.bfloat16, 4, 1), (64, torch.float16, 8, 4), (128, torch.float16, 8, 4))


def check(backends: dict, presets: list[str], sliding_windows: list[int], limit: float) -> set[tuple[str, str]]:
    """Small ragged batches of the presets; prints a line and returns the wrong (kernel, preset) pairs."""
    wrong = set()
    for name, ops in backends.items():
        for preset in presets:
            errors = []
            for (dim, dtype, group, longest), window in product(CHECKS, (None, *sliding_windows)):
                requests = [(context, longest) for context in (0, 1, 127, 128, 129, 1000, 4099)]
                fmt = PageFormat.preset(preset, dim)
                case = make_case(fmt, requests, dtype=dtype, group=group, sliding_window=window)
                try:
                    errors.append(relative_error(case.attention(ops), case.exact_attention()))
                except (RuntimeError, ValueError) as error:  # report it and go on: this is a survey
                    errors.append(float("nan"))
                    print(f"  {name} {preset} {dim}: {type(error).__name__} {error}"[:300])
            good = all(error < limit for error in errors)
            wrong |= set() if good else {(name, preset)}
            verdict = "ok" if good else "WRONG, not timed"
            print(f"check {name:8} {preset:12} {' '.join(f'{e:.1e}' for e in errors)} {verdict}", flush=True)
    return wrong


def time_store(fmt: PageFormat, dtype) -> list[dict]:
    """All requests complete a block; none does; an 8k prefill chunk; the ring."""
    rows = []
    for name, requests in (
        ("store, 64 full blocks", [(255, 1)] * 64),
        ("store, none full", [(200, 1)] * 64),
        ("store, 8192 tokens", [(0, 8192)]),
    ):
        case = make_case(fmt, requests, kv_heads=8, group=1, dtype=dtype)
        arguments = (case.step, case.cache, case.key, case.value)
        rows.append({"kernel": name, "us": time_us([lambda a=arguments: cuda.store_pages(*a)], 20)})
        if name == "store, none full":
            us = time_us([lambda a=arguments: cuda.write_ring(*a)], 20)
            rows.append({"kernel": "write ring, 64 tokens", "us": us})
    return rows


def stamp(commit: str | None) -> dict:
    """What every record of a run begins with; ``commit`` where there is no git to ask."""
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "date": datetime.date.today().isoformat(),
        "commit": commit or scrape.commit(),
    }


class Results:
    """The records of a run: printed, and kept in a file after each, so that a run cut short keeps its numbers."""

    def __init__(self, stamp: dict, peak: float, path: Path | None):
        self.records: list[dict] = []
        self.stamp, self.peak, self.path = stamp, peak, path

    def add(self, **fields) -> None:
        self.records.append(self.stamp | fields)
        ratio = fields.get("ratio_to_best_bf16")
        line = (
            f"{fields['kernel']:24} {fields.get('preset') or '':12} {fields.get('model') or '':12} "
            f"{fields.get('batch', ''):>3} x {fields.get('context', ''):>6} "
            + (f"window {fields['sliding_window']} " if fields.get("sliding_window") else "")
            + f"{fields['us']:9.1f} us "
            + (f"{fields['gbps']:6.0f} GB/s {fields['percent_of_read_bandwidth']:5.1f} %" if "gbps" in fields else "")
            + (f"  {ratio:5.2f}x" if ratio else "")
        )
        print(line, flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.records, indent=1) + "\n")

    def add_attention(self, us: float, nbytes: int, best: float | None = None, **fields) -> None:
        """``best``: time of the best bf16 kernel on the same shape."""
        rate = nbytes / us / 1e3
        self.add(
            **fields,
            us=us,
            gbps=rate,
            percent_of_read_bandwidth=rate * 1e11 / self.peak,
            ratio_to_best_bf16=best / us if best else None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["qwen3-8b"], choices=MODELS)
    parser.add_argument("--presets", nargs="*", default=["oscar"], choices=PRESETS)
    parser.add_argument("--cases", nargs="*", help="BATCHxCONTEXT, e.g. 8x32768")
    parser.add_argument(
        "--sliding-window", nargs="*", type=int, default=[], metavar="TOKENS", help="time layers with such windows too"
    )
    parser.add_argument("--warps", nargs="*", default=["0"], help="WARPS[@LIBRARY] per block to compare")
    parser.add_argument("--flash", action="store_true", help="time FlashAttention-3 too, on bf16 and fp8")
    parser.add_argument("--flashinfer", action="store_true", help="time FlashInfer too")
    parser.add_argument("--xformers", action="store_true", help="time xformers' int4 kernel too")
    parser.add_argument("--turboquant", action="store_true", help="time vLLM's turboquant_3bit_nc kernel too")
    parser.add_argument("--triton", action="store_true", help="check and time the Triton kernels too")
    parser.add_argument("--store", action="store_true", help="time store_pages and write_ring too")
    parser.add_argument("--commit", help="recorded; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG")
    options = parser.parse_args()

    default_library = cuda.LIBRARY
    backends = {"cuda": cuda}
    if options.triton and triton_ops():
        backends["triton"] = triton_ops()
    wrong = check(backends, options.presets, options.sliding_window, ERROR_LIMIT)
    peak = read_bandwidth()
    print(f"read bandwidth {peak / 1e12:.2f} TB/s", flush=True)
    results = Results(stamp(options.commit), peak, options.output)
    chosen = [tuple(map(int, case.split("x"))) for case in options.cases or ()]
    cases = [(*case, None) for case in chosen or CASES]
    cases += [(*case, window) for window in options.sliding_window for case in chosen or SLIDING_CASES]
    for model in options.models:
        heads, group, dim = MODELS[model]
        for batch, context, window in cases:
            shape = {"model": model, "batch": batch, "context": context}
            if window:
                shape["sliding_window"] = window
            sizes = (batch, context, heads, group, dim)
            best = None
            if options.flash:
                best, nbytes = flash_us(*sizes, sliding_window=window)
                results.add_attention(best, nbytes, kernel="flash-attention-3 bf16", **shape)
                torch.cuda.empty_cache()
                us, nbytes = flash_us(*sizes, sliding_window=window, fp8=True)
                results.add_attention(us, nbytes, best, kernel="flash-attention-3 fp8", **shape)
                torch.cuda.empty_cache()
            if options.flashinfer and not window:
                us, nbytes = flashinfer_us(*sizes)
                results.add_attention(us, nbytes, best, kernel="flashinfer bf16", **shape)
                best = min(us, best or us)
                torch.cuda.empty_cache()
            if options.xformers and not window:
                launches, nbytes = baselines.xformers_int4(*sizes, ROTATED_BYTES)
                results.add_attention(time_us(launches), nbytes, best, kernel="xformers int4", **shape)
                del launches
                torch.cuda.empty_cache()
            if options.turboquant and not window:
                launches, nbytes = baselines.turboquant(*sizes, ROTATED_BYTES)
                results.add_attention(time_us(launches), nbytes, best, kernel="turboquant_3bit_nc", **shape)
                del launches
                torch.cuda.empty_cache()
            for preset in options.presets:
                fmt = PageFormat.preset(preset, dim)
                steps, nbytes = big_case(fmt, batch, context, heads, group, torch.bfloat16, window)
                visible = min(context, window or context)
                expected = steps[0].exact_attention() if batch * visible <= 1 << 19 else None
                runs = [(name, ops, {}) for name, ops in backends.items() if ops is not cuda]
                runs = [run for run in runs if (run[0], preset) not in wrong]
                for text in options.warps if ("cuda", preset) not in wrong else ():
                    warps, _, library = text.partition("@")
                    label = "cuda" if text == "0" else f"cuda {warps} {Path(library).stem}"
                    runs.append((label, cuda, {"warps": int(warps), "library": library}))
                for name, ops, extra in runs:
                    library = extra.pop("library", "")
                    path = Path(library).resolve() if library else default_library
                    if ops is cuda and path != cuda.LIBRARY:
                        cuda.LIBRARY = path
                        cuda._library.cache_clear()
                        for case in steps:  # how the other library was launched
                            case.step.native.clear()
                    try:
                        if expected is not None:
                            error = relative_error(steps[0].attention(ops, **extra), expected)
                            if not error < ERROR_LIMIT:
                                print(f"{name} {preset} {batch} x {context}: error {error:.1e}, not timed", flush=True)
                                continue
                        us = time_us([attention_launch(ops, step, **extra) for step in steps])
                    except (RuntimeError, ValueError) as error:
                        print(f"{name} {preset} {batch} x {context}: {error}"[:300], flush=True)
                        continue
                    results.add_attention(us, nbytes, best, kernel=name, preset=preset, **shape)
                del steps, expected
                torch.cuda.empty_cache()
    if options.store:
        for preset in options.presets:
            for row in time_store(PageFormat.preset(preset, 128), torch.bfloat16):
                results.add(preset=preset, **row)
    if options.plot:
        draw(results.records, options.plot)


if __name__ == "__main__":
    main()
