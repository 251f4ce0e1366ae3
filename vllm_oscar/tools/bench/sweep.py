# SPDX-License-Identifier: Apache-2.0
"""The commands of a benchmark, all of them vLLM's, and how they are run.

For each KV-cache dtype one ``vllm bench sweep serve`` starts a server and measures every workload at every concurrency
on it with ``vllm bench serve``. After each measurement it calls :mod:`scrape <vllm_oscar.tools.bench.scrape>`, which
keeps the server's counters and empties its prefix cache. ``vllm bench throughput`` measures offline batches.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm_oscar.tools.bench.workloads import Workload, point_name
from vllm_oscar.tools.plan import Load, ModelShape, plan

SPARE = 128
WARM_UP = "warm-up"  # a short run first on each server, not reported


def script(name: str, module: str) -> list[str]:
    """The command ``name`` of this Python's environment, or the same as a module where there is no such script."""
    path = Path(sys.executable).with_name(name)
    return [str(path)] if path.exists() else [sys.executable, "-m", module]


@dataclass(frozen=True)
class Settings:
    """What every measurement in one folder has in common; kept there as ``settings.json``.

    Attributes:
        model: path or name of the model.
        shape: name of a shape with dummy weights, or "".
        kv_memory: bytes of KV cache, per rank, the same for every dtype.
        scale: factor of all lengths, as text.
        rounds: requests of a run for each in flight.
        tensor_parallel: ranks.
        engine_args: more arguments of ``vllm serve``.
        device: in words.
    """

    model: str
    shape: str
    kv_memory: int
    scale: str
    rounds: int
    tensor_parallel: int
    engine_args: list[str]
    device: str

    def save(self, folder: Path) -> None:
        """Write them, or raise ``ValueError`` if the folder's measurements were made with others."""
        path = folder / "settings.json"
        if path.exists() and any(folder.rglob("run=*.json")):
            found = json.loads(path.read_text())
            for name, value in asdict(self).items():
                if found.get(name) != value:
                    raise ValueError(
                        f"{folder} holds measurements with {name} {found.get(name)!r}, not {value!r}; "
                        "choose another folder with --out, or remove that one"
                    )
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Sweep:
    """Everything that is measured. Commands have ``vllm`` as their first word, for printing.

    Attributes:
        settings: see there.
        dtypes: values of ``--kv-cache-dtype``.
        points: workloads, already scaled, each with its numbers of requests in flight.
        folder: where everything is written.
        port: of the server, on 127.0.0.1.
        runs: measurements of each point.
        batches: workloads that ``vllm bench throughput`` runs, already scaled, each with its numbers of requests.
    """

    settings: Settings
    dtypes: list[str]
    points: list[tuple[Workload, list[int]]]
    folder: Path
    port: int = 8000
    runs: int = 1
    batches: list[tuple[Workload, list[int]]] = field(default_factory=list)
    url: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", f"http://127.0.0.1:{self.port}")

    @property
    def max_model_len(self) -> int:
        """Of the longest request and a little more, for a tokenizer may give a text back with more tokens."""
        return self.longest.longest + SPARE

    @property
    def longest(self) -> Workload:
        return max((workload for workload, _ in self.points + self.batches), key=lambda workload: workload.longest)

    @property
    def most_requests(self) -> int:
        return max(max(requests) for _, requests in self.points + self.batches)

    @property
    def engine(self) -> list[str]:
        """Arguments of every engine but its KV-cache dtype."""
        settings = self.settings
        return [
            *(["--load-format", "dummy"] if settings.shape else []),
            "--kv-cache-memory-bytes", str(settings.kv_memory),
            "--max-model-len", str(self.max_model_len),
            "--max-num-seqs", str(self.most_requests),
            "--tensor-parallel-size", str(settings.tensor_parallel),
            *settings.engine_args,
        ]  # fmt: skip

    def bench_params(self) -> dict[str, dict]:
        short = min(64, self.max_model_len // 2)
        warm_up = {"dataset_name": "random", "random_input_len": short, "random_output_len": 8, "num_prompts": 4,
                   "max_concurrency": 2}  # fmt: skip
        return {WARM_UP: warm_up} | {
            point_name(workload.name, users): workload.arguments(users, self.settings.rounds, self.folder)
            for workload, concurrency in self.points
            for users in concurrency
        }

    def serve_command(self, dtype: str) -> list[str]:
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        return ["vllm", "serve", self.settings.model, *address, *self.engine, "--kv-cache-dtype", dtype]

    def bench_command(self, dtype: str) -> list[str]:
        # plot_pareto knows the number of GPUs and the labels of points from the metadata.
        return [
            "vllm", "bench", "serve", "--base-url", self.url, "--model", self.settings.model, "--temperature", "0",
            "--ignore-eos", "--metric-percentiles", "50,99", "--seed", "0",
            "--metadata", f"kv_cache_dtype={dtype}", f"tensor_parallel_size={self.settings.tensor_parallel}",
        ]  # fmt: skip

    def sweep_command(self, dtype: str) -> list[str]:
        scrape = [*script("vllm-oscar", "vllm_oscar.tools.cli"), "bench", "scrape", self.url, str(self.folder / dtype)]
        command = [
            "vllm", "bench", "sweep", "serve",
            "--serve-cmd", shlex.join(executable(self.serve_command(dtype))),
            "--bench-cmd", shlex.join(executable(self.bench_command(dtype))),
            "--after-bench-cmd", shlex.join(scrape),
            "--bench-params", str(self.folder / "bench_params.json"),
            "--output-dir", str(self.folder), "--experiment-name", dtype,
            "--num-runs", str(self.runs), "--server-ready-timeout", "1800", "--show-stdout",
        ]  # fmt: skip
        return [*command, "--resume"] if (self.folder / dtype).exists() else command

    def pareto_command(self) -> list[str]:
        labels = ["--label-by", "kv_cache_dtype,max_concurrency"]
        return ["vllm", "bench", "sweep", "plot_pareto", str(self.folder), *labels]

    def batch_results(self, dtype: str) -> Iterator[tuple[Path, Workload, int]]:
        """Result file, workload and number of requests of each offline batch."""
        for workload, numbers in self.batches:
            for requests in numbers:
                yield self.folder / "offline" / f"{dtype}-{workload.name}-{requests}.json", workload, requests

    def offline_commands(self) -> Iterator[tuple[Path, list[str]]]:
        """Result file and command of each offline batch."""
        for dtype in self.dtypes:
            for result, workload, requests in self.batch_results(dtype):
                yield result, [
                    "vllm", "bench", "throughput", "--model", self.settings.model, *self.engine,
                    "--kv-cache-dtype", dtype, "--dataset-name", "random",
                    "--random-input-len", str(workload.input), "--random-output-len", str(workload.output),
                    "--num-prompts", str(requests), "--output-json", str(result),
                ]  # fmt: skip

    def single_commands(self, dtype: str) -> list[list[str]]:
        """The server of a dtype and its measurements one by one, as the sweep runs them."""
        measurements = self.bench_params().items()
        return [
            self.serve_command(dtype),
            *([*self.bench_command(dtype), *_options(given)] for name, given in measurements if name != WARM_UP),
        ]

    def forget(self, dtype: str, names: list[str]) -> None:
        """Remove these points and the warm-up: every server is warmed up, and no plot shows it."""
        for name in (WARM_UP, *names):
            for path in (self.folder / dtype).glob(f"BENCH--{name}"):
                shutil.rmtree(path)

    def write(self) -> None:
        """Write the files that the commands read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings.save(self.folder)
        (self.folder / "bench_params.json").write_text(json.dumps(self.bench_params(), indent=1) + "\n")
        for workload, concurrency in self.points:
            for users in concurrency:
                workload.write_trace(users, self.folder)

    def check(self) -> None:
        """Raise ``ValueError``, in one sentence, for what would fail only when a server has started."""
        try:
            shape = ModelShape.load(self.settings.model, self.settings.tensor_parallel)
        except ValueError:
            shape = None  # not a folder, or a model of which we do not know the size: vLLM will say
        longest = self.longest
        for row in plan(shape, self.settings.kv_memory, Load(self.max_model_len)) if shape else ():
            if row.name in self.dtypes and row.requests < 1:
                raise ValueError(
                    f"{row.name} cannot hold one request of {longest.name} ({longest.longest:,} tokens) in "
                    f"{self.settings.kv_memory:,} bytes; raise --kv-memory, lower --scale or leave out that workload"
                )
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise ValueError(f"port {self.port} of 127.0.0.1 cannot be used ({error}); choose --port") from None


def _options(parameters: dict[str, object]) -> list[str]:
    options = []
    for name, value in parameters.items():
        name = name.replace("_", "-")
        options += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return options


def executable(command: list[str]) -> list[str]:
    """The command with the ``vllm`` of this Python's environment."""
    return [*script("vllm", "vllm.entrypoints.cli.main"), *command[1:]]


_POINT = re.compile(r"^Benchmark overrides: (.*)")
_END = re.compile(r"^\[(SKIPPED|END) BENCHMARK\]")
_REQUESTS = re.compile(r"(\d+)/(\d+) \[")


def _name(overrides: str) -> str:
    """The name of a point from its parameters, which the sweep prints as a Python dict."""
    return str(ast.literal_eval(overrides).get("_benchmark_name", "")) if overrides.startswith("{") else overrides


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: list[str], log: Path) -> Iterator[tuple[str, str]]:
    """Run a command, append its output to ``log`` and yield ``(event, text)`` as it works.

    Events: ``point`` (its name), ``requests`` ("done/all"), ``end`` (of a
    point, also one that is skipped). Raises ``RuntimeError`` with the last error of the output if the command fails.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # In a session of its own: a signal for our whole process group, as `timeout` sends it, would end the sweep before
    # it ends its server, which is in another session and would keep memory and port. A shell's background job ignores
    # interrupts and its children inherit that: the sweep must not.
    process = subprocess.Popen(
        executable(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=environment, bufsize=1, start_new_session=True, preexec_fn=_heed_interrupts,
    )  # fmt: skip
    last: list[str] = []
    try:
        with log.open("a") as file:
            # Universal newlines: a carriage return, with which progress bars repaint, ends a line, too.
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = [*last[-30:], line.rstrip()] if line.strip() else last
                if point := _POINT.match(line):
                    yield "point", _name(point[1])
                elif _END.match(line):
                    yield "end", ""
                elif requests := _REQUESTS.search(line):
                    yield "requests", f"{requests[1]}/{requests[2]}"
        if process.wait():
            wanted = [line for line in last if "rror" in line] or last
            raise RuntimeError(f"{' '.join(command[:4])} failed, see {log}: {wanted[-1] if wanted else ''}")
    finally:
        if process.poll() is None:  # stopped by the user: let the sweep end its server
            process.send_signal(signal.SIGINT)
            process.wait(60)
