# SPDX-License-Identifier: Apache-2.0
"""Compare KV-cache dtypes at equal memory with vLLM's own benchmarks."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_oscar.tools.bench.shapes import SHAPES, write_model
from vllm_oscar.tools.bench.workloads import WORKLOADS, Workload
from vllm_oscar.tools.failure import fail
from vllm_oscar.tools.plan import parse_bytes

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = Console()


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))


def _users(numbers: list[str], given: str) -> list[int]:
    """Numbers of requests in flight, which ``given`` says. Raises ``ValueError``."""
    try:
        users = [int(number) for number in numbers]
    except ValueError:
        users = [0]
    if any(number < 1 for number in users):
        raise ValueError(f"requests in flight are numbers of at least 1, such as 1,16,64, and not {given!r}")
    return users


def choose(names: str, scale: str, concurrency: str) -> list[tuple[Workload, list[int]]]:
    """The workloads of a comma-separated list, scaled, each with its numbers of requests in flight.

    A name may bring its own numbers, ``8k-1k:1:64``. Raises ``ValueError`` in one sentence for a name, factor or number
    that cannot be used.
    """
    try:
        factor = Fraction(scale)
    except (ValueError, ZeroDivisionError):
        factor = Fraction(0)
    if not 0 < factor <= 1:
        raise ValueError(f"--scale is a factor above 0 and up to 1, such as 1/32, not {scale!r}")
    common = _users(_names(concurrency), concurrency)
    chosen = []
    for given in _names(names):
        name, *own = given.split(":")
        if name not in WORKLOADS:
            raise ValueError(f"there is no workload {name!r}; choose --workload from {', '.join(WORKLOADS)}")
        users = _users(own, given) or common or list(WORKLOADS[name].concurrency)
        chosen.append((WORKLOADS[name].scaled(factor), users))
    return chosen


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Model folder or name, or with --shape the name of a shape.")],
    engine_args: Annotated[
        list[str] | None, typer.Argument(help="After `--`: more arguments of `vllm serve`, for every dtype.")
    ] = None,
    shape: Annotated[bool, typer.Option("--shape", help=f"Dummy weights of a shape: {', '.join(SHAPES)}.")] = False,
    dtypes: Annotated[str, typer.Option("--kv-cache-dtype", help="Compared dtypes.")] = "auto,fp8,oscar",
    workloads: Annotated[
        str, typer.Option("--workload", help="What is measured; 8k-1k:1:64 with 1 and 64 requests in flight.")
    ] = ",".join(WORKLOADS),
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight, e.g. 1,16,64. Empty: those that each workload names.")
    ] = "",
    kv_memory: Annotated[str, typer.Option(help="KV cache of every dtype, per rank.")] = "24GiB",
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Requests of a measurement for each in flight.")] = 2,
    runs: Annotated[int, typer.Option(min=1, help="Measurements of each point; the report has their medians.")] = 1,
    scale: Annotated[str, typer.Option(help="Factor of all lengths, for small machines, e.g. 1/32.")] = "1",
    offline: Annotated[
        str, typer.Option(help="What `vllm bench throughput` runs; 1k-2k:256 as a batch of 256 requests.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder of everything that is written.")] = Path("bench-results"),
    port: Annotated[int, typer.Option(help="Of the server, on 127.0.0.1.")] = 8000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print vLLM's commands and stop.")] = False,
) -> None:
    """Measure, or go on where it was stopped: what the folder holds is not measured again."""
    from vllm_oscar.tools.bench import records, scrape
    from vllm_oscar.tools.bench.sweep import Settings, Sweep

    out = out.resolve()
    try:
        if shape and model not in SHAPES:
            raise ValueError(f"there is no shape {model!r}; choose from {', '.join(SHAPES)}")
        path = str(out / model) if shape else model
        settings = Settings(
            path, model if shape else "", parse_bytes(kv_memory), scale, rounds, tensor_parallel, engine_args or [],
            scrape.device(),
        )  # fmt: skip
        points, batches = choose(workloads, scale, concurrency), choose(offline, scale, concurrency)
        if shared := [workload.name for workload, _ in batches if workload.kind != "random"]:
            raise ValueError(f"an offline batch shares nothing; leave {shared[0]} out of --offline")
        if not points + batches:
            raise ValueError(f"no workload is chosen; choose --workload from {', '.join(WORKLOADS)}")
        sweep = Sweep(settings, _names(dtypes), points, out, port, runs, batches)
        if not sweep.dtypes:
            raise ValueError("no dtype is chosen; choose --kv-cache-dtype, e.g. auto,fp8,oscar")
        if shape:
            write_model(model, out / model)
        if dry_run:
            sweep.write()
            _show(sweep)
            return
        sweep.check()
        sweep.write()
    except (ValueError, OSError) as error:
        fail(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended, too
    failures = _measure(sweep)
    record = records.write_record(sweep, shlex.join(["vllm-oscar", *sys.argv[1:]]))
    console.print(f"[bold]{escape(str(record))}[/]: {len(records.collect(sweep))} measurements", highlight=False)
    if importlib.util.find_spec("matplotlib"):
        _report(record)
    else:
        console.print("No report, for matplotlib is missing; with it: vllm-oscar bench report " + escape(str(record)))
    if failures:
        fail("; ".join(failures))


def _show(sweep) -> None:
    """Print what a user of vLLM's tools alone would run."""

    def line(command: list[str]) -> None:
        print(shlex.join(command))

    for dtype in sweep.dtypes if sweep.points else ():
        print(f"# {dtype}: a server and its measurements, one after the other")
        for command in sweep.single_commands(dtype):
            line(command)
        print(f"# {dtype}: the same in one command, as `vllm-oscar bench run` runs it")
        line(sweep.sweep_command(dtype))
    for _, command in sweep.offline_commands():
        line(command)
    if sweep.points:
        print("# vLLM's own plot of all of them (needs seaborn)")
        line(sweep.pareto_command())


def _measure(sweep) -> list[str]:
    """Run everything, with progress. Returns a sentence for each command that failed."""
    from vllm_oscar.tools.bench import records
    from vllm_oscar.tools.bench.sweep import run as run_command

    failures = []
    each = len(sweep.bench_params()) * sweep.runs
    offline = list(sweep.offline_commands())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("measurements", total=len(sweep.dtypes) * each + len(offline))
        current = progress.add_task("", total=None)
        for number, dtype in enumerate(sweep.dtypes, 1):
            progress.update(current, description=f"{dtype}: the server starts", completed=0, total=None)
            try:
                if records.missing(sweep, dtype):
                    _sweep(sweep, dtype, lambda: progress.advance(total), partial(progress.update, current))
            except RuntimeError as error:
                failures.append(f"{dtype}: {error}")
            failures += [
                f"{dtype}: {point['failed']} requests of {records.name_of(point)} failed, see "
                f"{sweep.folder / dtype}.log; run the same command again to measure it again"
                for point in records.failed(sweep, dtype)
            ]
            progress.update(total, completed=number * each)
        for result, command in offline:
            progress.update(current, description=f"{result.stem}: offline", completed=0, total=None)
            try:
                if not result.exists():
                    result.parent.mkdir(exist_ok=True)
                    for _ in run_command(command, result.with_suffix(".log")):
                        pass
                    records.stamp_batch(result)
            except RuntimeError as error:
                failures.append(str(error))
            progress.advance(total)
    return failures


def _sweep(sweep, dtype: str, advance, show) -> None:
    """Run the sweep of a dtype. ``show`` takes ``description``, ``completed`` and ``total`` of what runs now."""
    from vllm_oscar.tools.bench import records
    from vllm_oscar.tools.bench.sweep import run as run_command

    sweep.forget(dtype, [records.name_of(point) for point in records.failed(sweep, dtype)])
    for event, text in run_command(sweep.sweep_command(dtype), sweep.folder / f"{dtype}.log"):
        if event == "point":
            show(description=f"{dtype}: {text}", completed=0, total=None)
        elif event == "requests":
            done, requests = map(int, text.split("/"))
            show(completed=done, total=requests)
        elif event == "end":
            advance()
    sweep.forget(dtype, [])


def _report(record: Path) -> None:
    from vllm_oscar.tools.bench.report import write_report

    console.print(f"[bold]{escape(str(write_report(record)))}[/]", highlight=False)


@app.command()
def report(
    record: Annotated[Path, typer.Argument(help="bench.json, or the folder that holds it.")],
) -> None:
    """Write report.md and its plots beside a record."""
    path = record / "bench.json" if record.is_dir() else record
    if not path.is_file():
        fail(f"{path} does not exist; make it with vllm-oscar bench run")
    if not importlib.util.find_spec("matplotlib"):
        fail("plots need matplotlib; install it with pip install 'vllm-oscar[bench]'")
    _report(path)


@app.command(hidden=True)
def scrape(url: str, folder: Path) -> None:
    """Keep what the server counted beside the newest result, and empty its caches."""
    from vllm_oscar.tools.bench import scrape as scraper

    scraper.scrape(url, folder)
