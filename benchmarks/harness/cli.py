# SPDX-License-Identifier: Apache-2.0
"""The commands: one per suite, and lm-eval's tasks by name."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS

from . import suites

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)

Model = Annotated[str, typer.Option(help="Model folder or name, as for vLLM.")]
Data = Annotated[Path | None, typer.Option(help="Folder with the suite's files; see benchmarks/harness/suites.py.")]
Dtypes = Annotated[str, typer.Option("--kv", help="KV-cache dtypes to compare, comma-separated.")]
Limit = Annotated[int | None, typer.Option(help="At most this many samples per task.")]
Args = Annotated[list[str] | None, typer.Option("--arg", help="key=value for vLLM's LLM(), e.g. max_model_len=32768.")]
Out = Annotated[Path, typer.Option(help="Results folder.")]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Tokens per prefill step, all requests together: what is older than this and the window is read from "
        "quantized pages. 0: vLLM's own. [default: one page]"
    ),
]
ALL = ",".join(("auto", *PRESETS))


# The suites that need nothing but their data, and what they are.
PUBLISHED = {
    "gsm8k": "Grade-school arithmetic: what low-bit caches break first.",
    "longbench_e": "LongBench-E, all its tasks of which data is there.",
    "ruler": "RULER.",
}


def _add_command(suite: str, about: str) -> None:
    @app.command(suite.replace("_", "-"), help=about)
    def command(
        model: Model,
        data: Data = None,
        kv: Dtypes = ALL,
        limit: Limit = None,
        arg: Args = None,
        chunk: Chunk = None,
        out: Out = Path("harness"),
    ):
        compare(suite, model, kv, out, arg, chunk, limit, data=data)


for _suite, _about in PUBLISHED.items():
    _add_command(_suite, _about)


@app.command()
def needle(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder of text files to hide the facts in.")],
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, comma-separated.")] = "4096,16384,65536",
    samples: Annotated[int, typer.Option(help="Documents per length and depth.")] = 10,
    kv: Dtypes = ALL,
    arg: Args = None,
    chunk: Chunk = None,
    out: Out = Path("harness"),
):
    """A needle in a haystack of your own text, over length and depth."""
    chosen = [int(n) for n in lengths.split(",")]
    compare("needle", model, kv, out, arg, chunk, None, data=data, lengths=chosen, samples=samples)


@app.command("lm-eval")
def lm_eval(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks, comma-separated.")],
    kv: Dtypes = ALL,
    limit: Limit = None,
    arg: Args = None,
    chunk: Chunk = None,
    out: Out = Path("harness"),
):
    """Any lm-eval tasks."""
    compare("lm-eval", model, kv, out, arg, chunk, limit, tasks=tasks.split(","))


def make_tasks(suite: str, model: str, data=None, tasks=(), lengths=(), samples=0) -> list[suites.Task]:
    if suite == "lm-eval":
        return list(tasks)
    if suite == "needle":
        from transformers import AutoTokenizer

        return suites.needle(data, AutoTokenizer.from_pretrained(model), lengths, samples)
    made = getattr(suites, suite)(data)
    if not made:
        raise ValueError(f"{data} holds no files of {suite}; see benchmarks/harness/suites.py for their names")
    return made


def engine_options(arg: list[str] | None, chunk: int | None) -> dict:
    """What goes to vLLM's ``LLM()``: the user's pairs, and chunks that let a score see the loss."""
    engine = {}
    for pair in arg or []:
        key, _, value = pair.partition("=")
        try:
            engine[key] = json.loads(value)
        except json.JSONDecodeError:
            engine[key] = value
    chunk = PAGE_TOKENS if chunk is None else chunk
    if not chunk:
        return engine
    if "max_num_batched_tokens" in engine:
        raise typer.BadParameter("--arg max_num_batched_tokens is what --chunk sets; give one of them, or --chunk 0")
    # A step holds at least one token of every request that runs.
    requests = min(chunk, engine.get("max_num_seqs", chunk))
    return engine | {"enable_chunked_prefill": True, "max_num_batched_tokens": chunk, "max_num_seqs": requests}


def evaluate(
    suite: str, model: str, dtype: str, window: int | None, engine: dict, limit: int | None, options: dict
) -> dict[str, dict]:
    """Metrics per task of one KV-cache dtype. Runs in a process of its own, which then frees the device.

    ``window``: the widest of the presets that are compared; the first dtype already refuses tasks that
    could not tell them apart.
    """
    from lm_eval import simple_evaluate

    from .model import WatchedVLLM

    lm = WatchedVLLM(
        pretrained=model, kv_cache_dtype=dtype, window=window, **{"seed": 0, "batch_size": "auto"} | engine
    )
    try:
        tasks = make_tasks(suite, model, **options)
        results = simple_evaluate(model=lm, tasks=tasks, limit=limit, log_samples=False, bootstrap_iters=1000)
    finally:
        lm.model.llm_engine.engine_core.shutdown()  # otherwise this process would wait for the engine's for ever
    for task, share in lm.shares.items():
        results["results"][task]["read from pages,none"] = share
    found = results["results"].items()
    return {task: {k: v for k, v in metrics.items() if isinstance(v, (int, float))} for task, metrics in found}


def compare(
    suite: str, model: str, kv: str, out: Path, arg: list[str] | None, chunk: int | None, limit: int | None, **options
) -> None:
    """Evaluate every dtype and write ``<suite>.json`` and ``<suite>.md``; dtypes already there are kept."""
    engine = engine_options(arg, chunk)
    windows = [PRESETS[dtype].window for dtype in kv.split(",") if dtype in PRESETS]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{suite}.json"
    settings = {"model": model, "limit": limit, "engine": engine, "options": {k: str(v) for k, v in options.items()}}
    saved = json.loads(path.read_text()) if path.exists() else {}
    found = saved["results"] if saved.get("settings") == settings else {}
    for dtype in kv.split(","):
        if dtype in found:
            continue
        console.rule(f"{suite}: {dtype}")
        job = evaluate, suite, model, dtype, max(windows, default=None), engine, limit, options
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                found[dtype] = pool.submit(*job).result()
            except suites.NoLossSeen as error:
                raise typer.BadParameter(str(error)) from None
        path.write_text(json.dumps({"settings": settings, "results": found}, indent=1) + "\n")
    table = markdown(suite, found)
    (out / f"{suite}.md").write_text(table)
    typer.echo(table)


def markdown(suite: str, results: dict[str, dict]) -> str:
    """A row per task and metric, a column per dtype, with standard errors where lm-eval gives them."""
    dtypes = list(results)
    rows = dict.fromkeys((task, k) for found in results.values() for task, metrics in found.items() for k in metrics)
    lines = [f"# {suite}", "", "| task | metric | " + " | ".join(dtypes) + " |", "|---|---|" + "---:|" * len(dtypes)]
    for task, metric in rows:
        name, _, detail = metric.partition(",")
        if name.endswith("_stderr") or name in ("sample_len", "alias"):
            continue
        cells = []
        for dtype in dtypes:
            metrics = results[dtype].get(task, {})
            error = metrics.get(f"{name}_stderr,{detail}")
            value = f"{metrics[metric]:.4f}" if metric in metrics else ""
            cells.append(value + (f" ± {error:.4f}" if isinstance(error, float) else ""))
        lines.append(f"| {task} | {name} {'' if detail == 'none' else detail} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
