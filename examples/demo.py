# SPDX-License-Identifier: Apache-2.0
"""The demo: real servers with an INT2 KV cache, asked over HTTP.

Starts ``vllm serve`` on 127.0.0.1 with ``--kv-cache-dtype oscar``, sends requests with the ``openai`` client, shows
what the cache holds, and stops the server; twice:

1. SmolLM2-135M-Instruct, if its folder is there (``fetch_smollm2.py`` makes it), answers questions in a chat, among
   them some about a text of over a thousand tokens. Whether the answers make sense is for a person to judge.
2. The demo model, small and trained for that, recalls facts from thousands of tokens back: exits with 1 if one is
   wrong.

    python examples/demo.py [--chat-model DIR] [--model DIR] [--kv-cache-dtype oscar]
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
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_oscar.tools import plan as planner
from vllm_oscar.tools.recall import FACTS, long_prompt, question

HERE = Path(__file__).parent
DEMO_MODEL = HERE / "demo_model"
CHAT_MODEL = HERE.parent / "models" / "smollm2-135m"
PASSAGE = HERE / "lighthouses.txt"
CONTEXT = 4096
MEMORY = 256 * 2**20
console = Console()

CONVERSATIONS = [
    ["What is the capital of France?", "What is that city known for?"],
    ["Explain in two sentences why it rains."],
    ["Give me three tips for a good night's sleep."],
    [
        "{passage}\n\nIn one sentence, what is the main topic of this text?",
        "Which French physicist made a better lens in 1822?",
    ],
]
"""What a user says, turn by turn: questions that a model of 135 million parameters can answer."""


@contextmanager
def server(model: Path, dtype: str, log: Path, *options: str):
    """Run ``vllm serve`` until the block ends, its log appended to ``log``; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(model),
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--kv-cache-dtype", dtype, "--max-model-len", str(CONTEXT),
        "--kv-cache-memory-bytes", str(MEMORY), "--max-num-seqs", "16", *options,
    ]  # fmt: skip
    console.print(f"[bold]$ {' '.join(command[1:])}[/]", highlight=False)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as output:
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


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=120, max_retries=0)


def reported_tokens(url: str) -> int:
    """KV cache size in tokens, as the server reports it in ``/metrics``."""
    metrics = urllib.request.urlopen(url + "/metrics", timeout=10).read().decode()
    return int(re.search(r'vllm:cache_config_info\{.*kv_cache_size_tokens="(\d+)"', metrics).group(1))


def show_capacity(url: str, model: Path, dtype: str) -> None:
    """What the cache holds, beside what it would hold in the model's own type."""
    tokens = reported_tokens(url)
    auto = planner.plan(planner.ModelShape.load(model), MEMORY, planner.Load(CONTEXT))[0].tokens
    console.print(
        f"KV cache of {MEMORY >> 20} MiB: [bold]{tokens:,} tokens[/] with {dtype} (reported by the server), "
        f"{auto:,} with auto: [bold]{tokens / auto:.2f}x[/]."
    )


def converse(client: openai.OpenAI) -> None:
    """Chat, turn by turn: every turn sends all that was said before."""
    passage = PASSAGE.read_text().strip()
    shown = f"[a text about lighthouses, {len(passage.split()):,} words]"
    for turns in CONVERSATIONS:
        messages = []
        for turn in turns:
            messages.append({"role": "user", "content": turn.replace("{passage}", passage)})
            reply = answer(client, messages, turn.replace("{passage}", shown).replace("\n\n", " "))
            messages.append({"role": "assistant", "content": reply})


def answer(client: openai.OpenAI, messages: list[dict], shown: str) -> str:
    """The reply to ``messages``, under the question as ``shown``, while it arrives."""
    console.print(Text(f"\n{shown}", style="bold"))
    stream = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=100, temperature=0,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    reply, tokens = "", None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for chunk in stream:
            if chunk.choices:
                reply += chunk.choices[0].delta.content or ""
            if chunk.usage:
                tokens = f"after {chunk.usage.prompt_tokens:,} tokens"
            live.update(Panel(Text(reply)), refresh=True)
    console.print(Panel(Text(reply), subtitle=tokens, subtitle_align="right"))
    return reply


def ask_recall(client: openai.OpenAI) -> bool:
    """Several thousand tokens, then one question per fact; True if all answers are right."""
    prompt = long_prompt(400)
    table = Table(title="Recall from thousands of tokens back", title_justify="left")
    for header in ("asked", "prompt tokens", "answer", "expected", ""):
        table.add_column(header)
    right = 0
    for name, code in FACTS.items():
        reply = client.completions.create(model="demo", prompt=question(prompt, name), max_tokens=9, temperature=0)
        found = re.match(r"\s*(\d*)", reply.choices[0].text).group(1)
        right += found == code
        mark = "[green]right[/]" if found == code else "[red]wrong[/]"
        table.add_row(name, f"{reply.usage.prompt_tokens:,}", found, code, mark)
    console.print(table)
    console.print(f"[bold]{right} of {len(FACTS)}[/] facts recalled.")
    return right == len(FACTS)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model that recalls facts.")] = DEMO_MODEL,
    chat_model: Annotated[Path, typer.Option(help="Folder of the model that chats.")] = CHAT_MODEL,
    kv_cache_dtype: Annotated[str, typer.Option(help="What vllm serve is given.")] = "oscar",
    log: Annotated[Path, typer.Option(help="Where the servers' log goes.")] = Path("demo-server.log"),
) -> None:
    """Serve, ask, compare, stop."""
    started = time.monotonic()
    log.unlink(missing_ok=True)
    if (chat_model / "config.json").exists():
        console.rule(f"1. {chat_model.name}, a real language model, answers questions")
        # Compiling 30 layers would take longer than the chat.
        with server(chat_model, kv_cache_dtype, log, "--enforce-eager") as url:
            converse(connect(url))
            show_capacity(url, chat_model, kv_cache_dtype)
    else:
        console.print(f"There is no language model in {chat_model}, so the demo goes on with the demo model alone.")
    console.rule(f"2. {model.name}, small and trained for this, recalls facts from far back")
    # torch.compile needs a C++ compiler.
    options = [] if shutil.which(os.environ.get("CXX", "g++")) else ["--enforce-eager"]
    with server(model, kv_cache_dtype, log, *options) as url:
        right = ask_recall(connect(url))
        show_capacity(url, model, kv_cache_dtype)
    console.print(f"{time.monotonic() - started:.0f} s in all.")
    if not right:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
