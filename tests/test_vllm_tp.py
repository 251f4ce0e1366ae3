# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism over processes and over Ray: with the lossless codec equal to ``auto`` on one rank."""

from __future__ import annotations

import pytest
from test_vllm_lossless import LOSSLESS, assert_same
from vllm_engine import EngineHost


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
