# SPDX-License-Identifier: Apache-2.0
"""The other ways into vLLM: ``LLM.generate``, ``LLM.chat``, ``vllm bench`` and Ray Data.

Each is a process with a real engine process. Most of their time is one thread's start-up, so two run at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from vllm_engine import MODEL, REPO, environment

VLLM = str(Path(sys.executable).with_name("vllm"))
SMALL = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager"]

SCRIPT = f"""
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        {str(MODEL)!r}, kv_cache_dtype="oscar", max_model_len=1024, kv_cache_memory_bytes=1 << 28, enforce_eager=True
    )
    greedy = SamplingParams(temperature=0, max_tokens=10)
    prompts = ["Remember: the code of calm-otter-17 is 8302914.\\nThe code of calm-otter-17 is", "import os\\n"]
    for output in llm.generate(prompts, greedy):
        print("GENERATE", repr(output.outputs[0].text))
    chats = [[{{"role": "user", "content": prompt}}] for prompt in prompts]
    for output in llm.chat(chats, greedy):
        print("CHAT", repr(output.outputs[0].text))
"""


def run(*command: str, cwd=None) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=800,
        cwd=cwd,
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("entrypoints")


@pytest.fixture(scope="module")
def output(request, folder) -> dict[str, Future[str]]:
    """What the commands of the selected tests print, or why they fail, by test."""
    (folder / "script.py").write_text(SCRIPT)
    # `vllm bench latency` draws token ids below 10,000 whatever the vocabulary: hence random weights for that many.
    random_model = folder / "random_model"
    random_model.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | {"vocab_size": 10000}
    (random_model / "config.json").write_text(json.dumps(config))
    oscar = ["--kv-cache-dtype", "oscar", *SMALL]
    commands = {
        "test_generate_and_chat": [sys.executable, str(folder / "script.py")],
        "test_bench_throughput": [
            VLLM, "bench", "throughput", "--model", str(MODEL), *oscar, "--dataset-name", "random",
            "--random-input-len", "200", "--random-output-len", "16", "--num-prompts", "8",
            "--output-json", str(folder / "throughput.json"),
        ],
        "test_bench_latency": [
            VLLM, "bench", "latency", "--model", str(random_model), "--load-format", "dummy", "--skip-tokenizer-init",
            *oscar, "--input-len", "200", "--output-len", "16", "--batch-size", "4", "--num-iters-warmup", "1",
            "--num-iters", "2", "--output-json", str(folder / "latency.json"),
        ],
        "test_ray_data": [sys.executable, str(REPO / "examples" / "ray_batch.py")],
    }  # fmt: skip
    selected = {item.name for item in request.session.items}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, *command, cwd=folder) for name, command in commands.items() if name in selected}


def test_generate_and_chat(output):
    lines = output["test_generate_and_chat"].result().splitlines()
    for label in ("GENERATE", "CHAT"):
        found = [line for line in lines if line.startswith(label)]
        assert len(found) == 2
        assert "8302914" in found[0]


@pytest.mark.slow  # the server's tests run `vllm bench serve` every day
def test_bench_throughput(output, folder):
    output["test_bench_throughput"].result()
    found = json.loads((folder / "throughput.json").read_text())
    assert found["num_requests"] == 8
    assert found["total_num_tokens"] >= 8 * 200


@pytest.mark.slow
def test_bench_latency(output, folder):
    output["test_bench_latency"].result()
    found = json.loads((folder / "latency.json").read_text())
    assert len(found["latencies"]) == 2 and min(found["latencies"]) > 0


@pytest.mark.slow
def test_ray_data(output):
    lines = output["test_ray_data"].result().splitlines()
    answers = sorted(line for line in lines if line[:1].isdigit() and " -> " in line)
    assert [line.split(" ")[0] for line in answers] == list("012345")
    assert answers[0].startswith("0 " + repr("import os\n"))
    assert all(len(line.split(" -> ")[1]) > 10 for line in answers)
