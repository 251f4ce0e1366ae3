# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --kv-cache-dtype oscar`` as a user meets it: a process, HTTP, the openai client."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess

import openai
import pytest
from vllm_engine import MODEL, environment
from vllm_server import FACTS, VLLM, recall, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--kv-cache-dtype", "oscar", "--max-model-len", "4096", "--num-gpu-blocks-override", "200")
    with serving(tmp_path_factory.mktemp("server") / "log", *options, "--max-num-seqs", "24") as server:
        yield server
        assert server.process.poll() is None, server.log.read_text()[-4000:]  # nothing has killed it


def test_recall(server):
    assert recall(server) == FACTS


def test_completion_and_streaming(server):
    prompt = "class Point:\n    def __init__(self, x, y):\n        self.x ="
    reply = server.complete(prompt, max_tokens=40)
    assert "self." in reply.choices[0].text
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 40)
    chunks = list(server.complete(prompt, max_tokens=40, stream=True))
    assert len(chunks) > 10
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text


def test_chat(server):
    messages = [{"role": "user", "content": "import os\nimport sys\n\nclass Config:\n    def __init__(self"}]
    options = {"model": "demo", "messages": messages, "max_tokens": 24, "temperature": 0}
    reply = server.client.chat.completions.create(**options)
    stream = server.client.chat.completions.create(**options, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text and text == reply.choices[0].message.content


def test_samples_and_logprobs(server):
    reply = server.complete("def add(a, b):\n", max_tokens=12, n=2, temperature=1.0, seed=3, logprobs=3)
    assert len(reply.choices) == 2
    assert reply.choices[0].text != reply.choices[1].text
    for choice in reply.choices:
        assert len(choice.logprobs.token_logprobs) == 12
        assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
        assert all(3 <= len(top) <= 4 for top in choice.logprobs.top_logprobs)
    greedy = server.complete("def add(a, b):\n", logprobs=2).choices[0].logprobs
    for logprob, top in zip(greedy.token_logprobs, greedy.top_logprobs):
        assert logprob == max(top.values())


def test_64_streams_with_random_aborts(server, text):
    """More requests than fit, half of them abandoned at random; then nothing is left of them."""
    rng = random.Random(7)
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=600, max_retries=0)

    async def one(number: int) -> str:
        prompt = text(rng.randint(2, 400), at=100 * (number % 8))  # every eighth shares a prefix
        abort_after = rng.randint(1, 15) if number % 2 else None
        await asyncio.sleep(rng.random() * 2)
        stream = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=40, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        seen = 0
        async for chunk in stream:
            seen += 1
            if seen == abort_after:
                await stream.close()
                return "aborted"
            if chunk.choices[0].finish_reason:
                return chunk.choices[0].finish_reason
        return "cut"

    async def everything() -> list[str]:
        return await asyncio.gather(*(one(number) for number in range(64)))

    ends = asyncio.run(everything())
    # A busy server may put several tokens into one chunk and be done before the abort.
    assert ends.count("length") + ends.count("aborted") == 64
    assert ends.count("length") >= 32 and ends.count("aborted") >= 16
    server.wait_until_quiet()
    assert recall(server) == FACTS


MALFORMED = {
    "no JSON": ("/v1/completions", b"{"),
    "no prompt": ("/v1/completions", {"model": "demo"}),
    "unknown model": ("/v1/completions", {"model": "other", "prompt": "a"}),
    "too long": ("/v1/completions", {"model": "demo", "prompt": [5] * 5000}),
    "token out of range": ("/v1/completions", {"model": "demo", "prompt": [9000]}),
    "negative token": ("/v1/completions", {"model": "demo", "prompt": [-1]}),
    "negative length": ("/v1/completions", {"model": "demo", "prompt": "a", "max_tokens": -4}),
    "negative temperature": ("/v1/completions", {"model": "demo", "prompt": "a", "temperature": -1}),
    "too many logprobs": ("/v1/completions", {"model": "demo", "prompt": "a", "logprobs": 100000}),
    "no samples": ("/v1/completions", {"model": "demo", "prompt": "a", "n": 0}),
    "wrong type": ("/v1/chat/completions", {"model": "demo", "messages": "hello"}),
    "no such path": ("/v1/nothing", {"model": "demo"}),
}


def test_malformed_requests_change_nothing(server):
    server.wait_until_quiet()
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    before = {name: server.metric(name) for name in names}
    for label, (path, body) in MALFORMED.items():
        status = server.post(path, body if isinstance(body, bytes) else json.dumps(body).encode())
        assert 400 <= status < 500, (label, status)
    server.wait_until_quiet()
    assert {name: server.metric(name) for name in names} == before
    assert recall(server) == FACTS


def test_bench_serve(server):
    command = [
        VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", "demo",
        "--tokenizer", str(MODEL), "--dataset-name", "random", "--random-input-len", "200",
        "--random-output-len", "16", "--num-prompts", "8", "--ignore-eos",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert re.search(r"Successful requests: +8\b", result.stdout)
    assert re.search(r"Failed requests: +0\b", result.stdout)
    assert re.search(r"Total generated tokens: +128\b", result.stdout)
    server.wait_until_quiet()
