# SPDX-License-Identifier: Apache-2.0
"""A running ``vllm serve`` with the demo model, for the tests that talk to one."""

from __future__ import annotations

import argparse
import inspect
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import psutil
from vllm_engine import MODEL, environment

VLLM = str(Path(sys.executable).with_name("vllm"))
FACTS = {"calm-otter-17": "8302914", "brave-lamp-42": "5519073", "quick-river-88": "2746610"}


class Server:
    """A running server."""

    def __init__(self, url: str, process: subprocess.Popen, log: Path) -> None:
        self.url, self.process, self.log = url, process, log
        self.client = openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=300, max_retries=0)

    def complete(self, prompt, max_tokens: int = 8, **options):
        return self.client.completions.create(
            model="demo", prompt=prompt, max_tokens=max_tokens, **({"temperature": 0} | options)
        )

    def metric(self, name: str, label: str = "") -> float:
        """Sum of a metric over its labels; with ``label``, such as ``engine="1"``, over those among which it is."""
        page = urllib.request.urlopen(self.url + "/metrics", timeout=60).read().decode()
        rows = re.findall(rf"^vllm:{name}(\{{[^}}]*\}})? ([-+.\deE]+)$", page, flags=re.MULTILINE)
        values = [float(value) for labels, value in rows if label in labels]
        assert values, f"no metric vllm:{name} {label}"
        return sum(values)

    def wait_until_quiet(self, timeout: float = 120) -> None:
        """No running or waiting request and no page in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.monotonic() + timeout
        while (found := {name: self.metric(name) for name in names}) != dict.fromkeys(names, 0.0):
            assert time.monotonic() < deadline, found
            time.sleep(0.5)

    def post(self, path: str, body: bytes) -> int:
        """HTTP status of a raw request."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=120).status
        except urllib.error.HTTPError as error:
            return error.code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(log: Path, *options: str, port: int | None = None, seconds: float = 400, **env: str):
    """A server of the demo model as ``demo``, ready; its output goes to ``log``. Ended at the end, if it still runs."""
    port = port or free_port()
    command = [
        VLLM, "serve", str(MODEL), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--kv-cache-memory-bytes", str(1 << 30), "--enforce-eager", *options,
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", **env)
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        deadline = time.monotonic() + seconds
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(server.url + "/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield server
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # its engine would outlive it
            for child in [*children, process]:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    child.kill()


def recall(server: Server) -> dict[str, str]:
    """Answers about facts that lie about 2,000 tokens back."""
    lines = inspect.getsource(argparse).split("\n")[:260]
    for place, (name, code) in zip((5, 60, 120), FACTS.items()):
        lines.insert(place, f"\nRemember: the code of {name} is {code}.\n")
    text = "\n".join(lines)
    answers = {}
    for name in FACTS:
        reply = server.complete(f"{text}\nThe code of {name} is", max_tokens=9)
        assert reply.usage.prompt_tokens > 2000
        answers[name] = re.match(r"\s*(\d*)", reply.choices[0].text).group(1)
    return answers
