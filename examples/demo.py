# SPDX-License-Identifier: Apache-2.0
"""The demo: a real server with an INT2 KV cache, asked over HTTP.

Starts ``vllm serve`` on 127.0.0.1 with ``--kv-cache-dtype oscar``, sends completion and
chat requests with the ``openai`` client, among them one of several thousand tokens
with facts to recall from far back, shows what the cache holds, and stops the server.
Exits with 1 if a recalled fact is wrong.

    python examples/demo.py [--model DIR] [--kv-cache-dtype oscar]
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import openai
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from vllm_oscar.tools import plan as planner
from vllm_oscar.tools.recall import FACTS, long_prompt, question

DEMO_MODEL = Path(__file__).parent / "demo_model"
CONTEXT = 4096
MEMORY = 256 * 2**20
console = Console()


@contextmanager
def server(model: Path, dtype: str, log: Path):
    """Run ``vllm serve`` until the block ends; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(model),
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--kv-cache-dtype", dtype, "--max-model-len", str(CONTEXT),
        "--kv-cache-memory-bytes", str(MEMORY), "--max-num-seqs", "16",
    ]  # fmt: skip
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        command.append("--enforce-eager")  # torch.compile needs a C++ compiler
    console.print(f"[bold]$ {' '.join(command[1:])}[/]", highlight=False)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        with console.status(f"starting the server (log: {log})"):
            _wait_until_ready(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server stopped while starting:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(url + "/health", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server did not start within {timeout:.0f} s; see {log}")


def reported_tokens(url: str) -> int:
    """KV cache size in tokens, as the server reports it in ``/metrics``."""
    metrics = urllib.request.urlopen(url + "/metrics", timeout=10).read().decode()
    return int(re.search(r'vllm:cache_config_info\{.*kv_cache_size_tokens="(\d+)"', metrics).group(1))


def ask_recall(client: openai.OpenAI) -> bool:
    """Several thousand tokens, then one question per fact; True if all answers are right."""
    prompt = long_prompt(400)
    table = Table(title="Recall from far back", title_justify="left")
    for header in ("asked", "prompt tokens", "answer", "expected", ""):
        table.add_column(header)
    right = True
    for name, code in FACTS.items():
        reply = client.completions.create(
            model="demo", prompt=question(prompt, name), max_tokens=9, temperature=0
        )
        answer = re.match(r"\s*(\d*)", reply.choices[0].text).group(1)
        right &= answer == code
        mark = "[green]right[/]" if answer == code else "[red]wrong[/]"
        table.add_row(name, f"{reply.usage.prompt_tokens:,}", answer, code, mark)
    console.print(table)
    return right


def converse(client: openai.OpenAI) -> None:
    """A completion and a streamed chat."""
    prompt = "class Point:\n    def __init__(self, x, y):\n        self.x ="
    reply = client.completions.create(model="demo", prompt=prompt, max_tokens=48, temperature=0)
    console.print(Panel(prompt + reply.choices[0].text, title="completion", title_align="left"))
    message = "import os\nimport sys\n\nclass Config:\n    def __init__(self"
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": message}], max_tokens=48, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    console.print(Panel(message + text, title="chat, streamed", title_align="left"))


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = DEMO_MODEL,
    kv_cache_dtype: Annotated[str, typer.Option(help="What vllm serve is given.")] = "oscar",
    log: Annotated[Path, typer.Option(help="Where the server's log goes.")] = Path("demo-server.log"),
) -> None:
    """Serve, ask, compare, stop."""
    started = time.monotonic()
    with server(model, kv_cache_dtype, log) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=120, max_retries=0)
        converse(client)
        right = ask_recall(client)
        tokens = reported_tokens(url)
    auto = planner.plan(planner.ModelShape.load(model), MEMORY, CONTEXT)[0].tokens
    console.print(
        f"KV cache of {MEMORY >> 20} MiB: [bold]{tokens:,} tokens[/] with {kv_cache_dtype} (reported by the server), "
        f"{auto:,} with auto: [bold]{tokens / auto:.2f}x[/]. {time.monotonic() - started:.0f} s in all."
    )
    if not right:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
