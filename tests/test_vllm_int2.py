# SPDX-License-Identifier: Apache-2.0
"""INT2 through vLLM equals the same numerics computed independently (see ``replay``)."""

from __future__ import annotations

import pytest
import torch
from replay import Replay
from vllm_engine import MODEL

from vllm_oscar.core.config import PRESETS
from vllm_oscar.ops import select

# Two float32 computations differ by about 1e-5 until a value at the edge between two codes
# is rounded to different sides. Noise of 3e-7 (relative) on the replay's own keys and
# values flips codes in most requests: single logprobs then differ by up to 5e-3, but the
# median of a request by 2e-4 at most (4e-5 was seen here). Reading one token from the
# codec instead of the ring moves the median by 5e-4 to 1.5e-3.
WORST, MEDIAN = 1e-2, 3e-4

# The scale or zero of a key group on such an edge changes 64 keys by up to 6 % (e4m3), and
# logprobs by 3e-2. Then a replay must agree whose keys differ by as little as the two
# computations do, here 1e-5 in the deeper layers: some of these round it to the other side.
NOISE, NOISY_REPLAYS = 1e-5, 8


def differences(replay: Replay, prompts: list[list[int]], results: list[dict], donors: dict | None = None):
    """Logprob differences of each request, over 10 logprobs of every output token, and the states."""
    errors, states = [], []
    for number, (prompt, result) in enumerate(zip(prompts, results)):
        sample = result["outputs"][0]
        assert len(sample["tokens"]) == len(sample["logprobs"])
        for seed in range(1 + NOISY_REPLAYS):
            replay.add_noise(NOISE if seed else 0.0, seed)
            rows, state = replay.request(prompt + sample["tokens"], result["chunks"], (donors or {}).get(number))
            request = []
            for step, found in enumerate(sample["logprobs"]):
                ids = torch.tensor([int(token) for token in found])
                request.append((rows[len(prompt) - 1 + step][ids] - torch.tensor(list(found.values()))).abs())
            error = torch.cat(request)
            print(replay.fmt.config.name, number, seed, f"{error.max():.1e} (median {error.median():.1e})")
            if close([error]):
                break
        errors.append(error)
        states.append(state)
    return errors, states


def close(errors: list[torch.Tensor]) -> bool:
    return all(x.max() < WORST and x.median() < MEDIAN for x in errors)


def kernels() -> list[str]:
    return [kind for kind in ("reference", "cpu") if select.load(kind)[0] is not None]


def cases() -> list:
    """Every preset with the native kernels; with the reference, which takes twice as long, others than the default
    only when slow tests are asked for."""
    return [
        pytest.param(kind, preset, marks=pytest.mark.slow if kind == "reference" and preset != "oscar" else ())
        for kind in kernels()
        for preset in PRESETS
    ]


@pytest.mark.parametrize("kind, preset", cases())
def test_chunks_decode_and_prefix_hits(engine_host, text, preset, kind):
    engine_host.start(
        preset, env={"VLLM_OSCAR_KERNELS": kind}, enable_prefix_caching=True, max_num_batched_tokens=200
    )
    replay = Replay(MODEL, preset)

    edges = [text(n, at=300 * i) for i, n in enumerate((127, 128, 129, 384, 500))]
    found = engine_host.run(edges, max_tokens=6)
    assert any(context % 128 and tokens > 1 for result in found for context, tokens in result["chunks"])
    errors, states = differences(replay, edges, found)
    assert close(errors)

    growing = [text(n, at=5000 + 300 * i) for i, n in enumerate((5, 250))]
    found = engine_host.run(growing, max_tokens=135)  # each completes a block or two while it decodes
    errors, _ = differences(replay, growing, found)
    assert close(errors)

    shared = [edges[4][:n] + text(90, at=9000)[1:] for n in (131, 384, 499)]
    found = engine_host.run(shared, max_tokens=10)
    assert [result["cached"] for result in found] == [128, 384, 384]
    errors, _ = differences(replay, shared, found, dict.fromkeys(range(3), states[4]))
    assert close(errors)


@pytest.mark.parametrize("budget", [64, 4096])
def test_other_chunk_sizes(engine_host, text, budget):
    engine_host.start("oscar", enable_prefix_caching=False, max_num_batched_tokens=budget)
    prompts = [text(n, at=700 * i) for i, n in enumerate((64, 256, 900))]
    found = engine_host.run(prompts, max_tokens=6)
    assert max(tokens for result in found for _, tokens in result["chunks"]) == min(budget, 900)
    errors, _ = differences(Replay(MODEL, "oscar"), prompts, found)
    assert close(errors)


def test_the_comparison_has_teeth(engine_host, text):
    """Were the window one token shorter, or the attention exact, or the window ignored, it would show."""
    engine_host.start("oscar", enable_prefix_caching=True, max_num_batched_tokens=200)
    prompts = [text(n, at=1000 + 700 * i) for i, n in enumerate((230, 300))]
    found = engine_host.run(prompts, max_tokens=12)
    replay = Replay(MODEL, "oscar")
    errors, _ = differences(replay, prompts, found)
    assert close(errors)
    for wrong in (lambda: max(replay.context - 127, 0), lambda: 0, lambda: replay.context // 128 * 128):
        replay._ring_start = wrong
        errors, _ = differences(replay, prompts, found)
        assert not close(errors)
