# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism over processes and Ray, and data parallelism: with the lossless codec as ``auto`` on one rank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from test_vllm_lossless import LOSSLESS, TOLERANCE, assert_same
from vllm_engine import EngineHost
from vllm_server import serving


@pytest.fixture(scope="module")
def prompts(text) -> list[list[int]]:
    base = text(300, at=3000)
    return [text(1), text(127, at=50), text(129, at=90), text(400, at=700), base, base[:260] + text(50, at=8000)[1:]]


@pytest.fixture(scope="module")
def auto(engine_host, prompts) -> list[dict]:
    engine_host.start("auto", enable_prefix_caching=False)
    return engine_host.run(prompts, max_tokens=6)


@pytest.mark.parametrize("backend", ["mp", pytest.param("ray", marks=pytest.mark.slow)])
def test_two_ranks(prompts, auto, backend):
    with EngineHost(VLLM_CPU_OMP_THREADS_BIND="0|1", OMP_NUM_THREADS="1") as host:
        host.start(
            "oscar",
            env=LOSSLESS,
            tensor_parallel_size=2,
            distributed_executor_backend=backend,
            enable_prefix_caching=True,
            max_num_batched_tokens=300,
            num_gpu_blocks_override=200,
        )
        for _ in range(2):  # the second time with prefix hits
            found = host.run(prompts, max_tokens=6)
            assert_same(auto, found)
        assert [result["cached"] for result in found] == [0, 0, 128, 384, 256, 256]


@pytest.mark.slow
def test_data_parallel(prompts, auto, tmp_path):
    """Two engines behind one server; one after the other they get each prompt, so both do."""
    options = ("--kv-cache-dtype", "oscar", "--dtype", "float32", "--max-model-len", "1024")
    parallel = ("--data-parallel-size", "2", "--api-server-count", "1", "--num-gpu-blocks-override", "200")
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}

    with serving(tmp_path / "log", *options, *parallel, **LOSSLESS, **cores) as server, ThreadPoolExecutor(2) as pool:

        def logprobs(prompt: list[int]) -> list[float]:
            reply = server.complete(prompt, max_tokens=6, logprobs=1, extra_body={"ignore_eos": True})
            return reply.choices[0].logprobs.token_logprobs

        answers = list(pool.map(logprobs, [prompt for prompt in prompts for _ in range(4)]))
        served = [server.metric("request_success_total", f'engine="{number}"') for number in range(2)]
    for number, found in enumerate(answers):
        (expected,) = auto[number // 4]["outputs"]
        known = [row[str(token)] for token, row in zip(expected["tokens"], expected["logprobs"])]
        assert found == pytest.approx(known, abs=TOLERANCE), number
    assert sum(served) == len(answers) and min(served) >= len(prompts), served
