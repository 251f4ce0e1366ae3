# SPDX-License-Identifier: Apache-2.0
"""The Ray examples with two replicas on the CPU, one of which is killed while it works."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from vllm_engine import REPO, environment

pytestmark = pytest.mark.slow
ROWS = 48


@contextmanager
def example(log: Path, name: str, *arguments: str):
    """A running example; its output goes to ``log``."""
    command = [sys.executable, str(REPO / "examples" / name), *arguments]
    env = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", OMP_NUM_THREADS="1")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            yield process
        finally:
            descendants = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            _, left = psutil.wait_procs([*descendants, psutil.Process(process.pid)] if descendants else [], 60)
            for other in left:
                other.kill()
            process.wait(30)


def engines(process: subprocess.Popen) -> list[psutil.Process]:
    """The engine processes of an example, one per replica."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "EngineCore" in " ".join(child.cmdline()) or "EngineCore" in child.name():
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            pass
    return found


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 800):
    """What ``condition`` returns as soon as it is true; fails if the example ends before or time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.2)
    raise AssertionError("nothing in time: " + log.read_text()[-4000:])


def answers(log: Path) -> list[tuple[int, str]]:
    """``(row, prompt and answer)`` of each printed row."""
    return [(int(row), text) for row, text in re.findall(r"^(\d+) ('.*' -> .*)$", log.read_text(), re.MULTILINE)]


def test_a_killed_replica_loses_no_row_of_a_batch(tmp_path):
    log = tmp_path / "log"
    arguments = ("--replicas", "2", "--rows", str(ROWS), "--tokens", "48")
    with example(log, "ray_batch.py", *arguments) as process:
        wait_for(lambda: answers(log), process, log)
        both = wait_for(lambda: len(engines(process)) >= 2 and engines(process), process, log)
        assert len(answers(log)) < ROWS
        both[0].kill()
        assert process.wait(800) == 0, log.read_text()[-4000:]
    found = answers(log)
    assert sorted(row for row, _ in found) == list(range(ROWS))
    texts = {row: text for row, text in found}
    assert len({texts[row] for row in range(0, ROWS, 6)}) == 1  # the same prompt, answered by either replica
    assert re.search("EngineDeadError|exiting actor|fatal", log.read_text(), re.IGNORECASE)  # it did die while working


def test_replicas_serve_one_address_and_a_killed_one_comes_back(tmp_path):
    pytest.importorskip("ray.serve.llm", reason="needs pip install 'vllm-oscar[serve]'")
    import openai

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    with example(log, "ray_serve.py", "--replicas", "2", "--port", str(port)) as process:
        wait_for(lambda: f"http://127.0.0.1:{port}/v1" in log.read_text(), process, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=5, timeout=120)

        def recall() -> str:
            prompt = "Remember: the code of calm-otter-17 is 8302914.\nThe code of calm-otter-17 is"
            answer = client.completions.create(model="demo_model", prompt=prompt, max_tokens=10, temperature=0)
            return answer.choices[0].text

        assert all("8302914" in recall() for _ in range(4))
        before = {engine.pid for engine in engines(process)}
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        assert all("8302914" in recall() for _ in range(8))
        wait_for(lambda: len({engine.pid for engine in engines(process)} - before) == 1, process, log)
        assert all("8302914" in recall() for _ in range(4))
