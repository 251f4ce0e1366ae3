# SPDX-License-Identifier: Apache-2.0
"""Check, then time, prefill of requests with history on a GPU, beside FlashAttention-3 over a bf16 cache.

    python benchmarks/prefill.py --output benchmarks/results/prefill.json

A step is planned once and attended by every layer, each with a cache of its own; attention alone is timed, launched
one by one as vLLM does. FlashAttention-3 gets blocks of 16 tokens, vLLM's default, and of 128; the ratio is to the
faster. A shape whose output is wrong is not timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not this folder, where kernels.py hides a package of its name

import torch  # noqa: E402

from benchmarks.kernel_cases import Case, make_case, random_ring  # noqa: E402
from benchmarks.kernels import MODELS, Results, stamp  # noqa: E402
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS  # noqa: E402
from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.core.softmax import Softmax  # noqa: E402
from vllm_oscar.ops import dense_prefill  # noqa: E402
from vllm_oscar.ops.step import Cache, Limits, Step  # noqa: E402

ERROR_LIMIT = 1e-2
RUNS = 11


@dataclass(frozen=True)
class Shape:
    """``requests`` that share ``shared`` tokens of history, have ``own`` besides, and bring ``tokens``."""

    name: str
    requests: int
    shared: int
    own: int
    tokens: int

    @property
    def length(self) -> int:
        return self.shared + self.own + self.tokens

    def smaller(self) -> Shape:
        """The same in kind, for a comparison with the reference."""
        cut = [min(n, most) // PAGE_TOKENS * PAGE_TOKENS for n, most in ((self.shared, 2048), (self.own, 1024))]
        return Shape(self.name, min(self.requests, 4), *cut, min(self.tokens, 640))


SHAPES = (
    Shape("64 x (16k shared + 128)", 64, 16384, 0, 128),
    Shape("last 8k chunk of 32k", 1, 0, 24576, 8192),
    Shape("64 x (2k own + 128)", 64, 0, 2048, 128),
)


# ---- a step and its layers ---------------------------------------------------------------
def page_table(shape: Shape, page: int, device: str) -> tuple[torch.Tensor, int]:
    """Blocks of ``page`` tokens in random order, ``[requests, n]``, and their number; the shared ones come first."""
    shared, columns = shape.shared // page, -(-shape.length // page)
    count = shared + shape.requests * (columns - shared)
    order = torch.randperm(count, device=device).int()
    own = order[shared:].view(shape.requests, columns - shared)
    return torch.cat([order[:shared].expand(shape.requests, -1), own], 1).contiguous(), count


def make_layers(shape: Shape, fmt: PageFormat, heads: int, group: int, layers: int, device: str) -> list[Case]:
    """Cases of one step, one for each layer. Pages repeat a pool of encoded random ones."""
    dtype = torch.bfloat16
    seed = make_case(fmt, [(PAGE_TOKENS * 32, 1)] * 4, kv_heads=heads, group=group, dtype=dtype, device=device)
    pool = seed.cache.pages[seed.step.page_table[:, :32].long()]  # [4, 32, H, bytes]
    table, count = page_table(shape, PAGE_TOKENS, device)
    requests, context = shape.requests, shape.shared + shape.own
    ring_pages = seed.cache.ring_pages
    # What a request has computed itself it reads from the ring, as far as the window reaches.
    start = context - fmt.config.window if shape.own else context
    step = Step(
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32, device=device) * shape.tokens,
        seq_lens=torch.full((requests,), shape.length, dtype=torch.int32, device=device),
        page_table=table,
        ring_table=torch.randperm(requests * ring_pages, device=device).int().view(requests, ring_pages),
        ring_start=torch.full((requests,), start, dtype=torch.int32, device=device),
        max_query_len=shape.tokens,
        tables_settled=True,
    )
    rows = requests * shape.tokens
    query = torch.randn(rows, heads * group, fmt.head_dim, device=device).to(dtype)
    key, value = (torch.randn(rows, heads, fmt.head_dim, device=device).to(dtype) for _ in range(2))
    cases = []
    for _ in range(layers):
        pages = pool[:, 1:].flatten(0, 1)[torch.randint(4 * 31, (count,), device=device)]
        firsts = table[:, 0].unique().long()
        pages[firsts] = pool[:, 0][torch.randint(4, (len(firsts),), device=device)]
        ring = random_ring(requests * ring_pages, heads, fmt, dtype, device)
        cases.append(Case(step, Cache(pages, ring, ring_pages, fmt, Softmax(fmt.head_dim**-0.5)), query, key, value))
    return cases


def planner(shape: Shape, case: Case) -> Callable[[], Step]:
    """Plans the step as often as it is called."""
    starts = [r * shape.tokens for r in range(shape.requests + 1)]
    limits = Limits(
        256, max(8192, starts[-1]), 1, case.query.shape[1], case.key.shape[1], case.key.dtype, case.key.device
    )
    dense_prefill.reserve(case.fmt, limits)
    return lambda: dense_prefill.plan(case.step, case.fmt, limits, starts, [shape.length] * shape.requests, 1)


def error_of(shape: Shape, fmt: PageFormat, heads: int, group: int, device: str = "cuda") -> float:
    """``|out - expected| / |expected|`` of a smaller shape."""
    (case,) = make_layers(shape.smaller(), fmt, heads, group, 1, device)
    step, out = planner(shape.smaller(), case)(), torch.full_like(case.query, float("nan"))
    dense_prefill.attention(step, case.cache, case.query, case.key, case.value, out)
    expected = case.exact_attention()
    return ((out.double() - expected).norm() / expected.norm()).item()


# ---- what is timed -------------------------------------------------------------------------
def oscar(shape: Shape, cases: list[Case]) -> Callable[[], None]:
    """Plans a step and attends it in every layer."""
    out, plan = torch.empty_like(cases[0].query), planner(shape, cases[0])

    def run() -> None:
        step = plan()
        for case in cases:
            dense_prefill.attention(step, case.cache, case.query, case.key, case.value, out)

    return run


def parts(shape: Shape, cases: list[Case]) -> dict[str, Callable[[], object]]:
    """The plan alone; and all layers without FlashAttention: gathering, empty waves included."""
    plan = planner(shape, cases[0])
    step = plan()

    def gather() -> None:
        for case in cases:
            for one in step.prefill.passes:
                dense_prefill._attend_pass(
                    lambda *args, **options: (None, None), step, one, case.cache, case.query, case.key, case.value, None
                )

    return {"plan of a step": plan, "gather alone": gather}


def flash_attention_3(shape: Shape, heads: int, group: int, dim: int, layers: int, page: int) -> Callable[[], None]:
    """FlashAttention-3 in every layer, on bf16 blocks of ``page`` tokens that are shared alike."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    table, count = page_table(shape, page, "cuda")
    caches = [torch.empty(2, count, page, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in range(layers)]
    for cache in caches:
        cache.normal_()
    query = torch.randn(shape.requests * shape.tokens, heads * group, dim, dtype=torch.bfloat16, device="cuda")
    starts = torch.arange(shape.requests + 1, dtype=torch.int32, device="cuda") * shape.tokens
    lens = torch.full((shape.requests,), shape.length, dtype=torch.int32, device="cuda")
    out = torch.empty_like(query)

    def run() -> None:
        for key, value in caches:
            flash_attn_varlen_func(
                query, key, value, shape.tokens, starts, shape.length, seqused_k=lens, block_table=table, causal=True,
                out=out, fa_version=3,
            )  # fmt: skip

    return run


def time_us(runs: list[Callable[[], object]]) -> list[tuple[float, float]]:
    """Median time on the device and on the host of each of ``runs``, which take turns."""
    found = [([], []) for _ in runs]
    for turn in range(RUNS + 2):
        for run, (device, host) in zip(runs, found):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            started = time.perf_counter()
            begin.record()
            run()
            end.record()
            launched = time.perf_counter()
            end.synchronize()
            if turn >= 2:  # the clocks have settled
                device.append(begin.elapsed_time(end) * 1e3)
                host.append((launched - started) * 1e6)
    return [(sorted(device)[RUNS // 2], sorted(host)[RUNS // 2]) for device, host in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-8b", choices=MODELS)
    parser.add_argument("--presets", nargs="*", default=["oscar"], choices=PRESETS)
    parser.add_argument("--layers", nargs="*", type=int, default=[1, 36])
    parser.add_argument("--commit", help="recorded; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()

    usable, reason = dense_prefill.available()
    if not usable:
        raise SystemExit(f"dense prefill does not run here: {reason}")
    results = Results(stamp(options.commit), 0.0, options.output)
    heads, group, dim = MODELS[options.model]
    for shape in SHAPES:
        for preset in options.presets:
            fmt = PageFormat.preset(preset, dim)
            error = error_of(shape, fmt, heads, group)
            print(f"check {shape.name}, {preset}: {error:.1e} {'ok' if error < ERROR_LIMIT else 'WRONG, not timed'}")
            if not error < ERROR_LIMIT:
                continue
            for layers in options.layers:
                sizes = {"model": options.model, "batch": shape.requests, "context": shape.length, "layers": layers}
                cases = make_layers(shape, fmt, heads, group, layers, "cuda")
                runs = {f"flash-attention-3 bf16, blocks of {page}": page for page in (16, 128)}
                runs = {n: flash_attention_3(shape, heads, group, dim, layers, p) for n, p in runs.items()}
                runs |= {"dense prefill": oscar(shape, cases), **parts(shape, cases)}
                times = dict(zip(runs, time_us(list(runs.values()))))
                best = min(us for name, (us, _) in times.items() if name.startswith("flash"))
                for name, (us, host_us) in times.items():
                    ours = not name.startswith("flash")
                    results.add(
                        kernel=f"{shape.name}: {name}",
                        preset=preset if ours else None,
                        **sizes,
                        us=us,
                        host_us=host_us,
                        ratio_to_best_bf16=best / us if name == "dense prefill" else None,
                    )
                del cases, runs
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
