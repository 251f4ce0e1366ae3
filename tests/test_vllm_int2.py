# SPDX-License-Identifier: Apache-2.0
"""INT2 through vLLM equals the same numerics computed independently (see ``replay``)."""

from __future__ import annotations

import pytest
import tolerances
import torch
from replay import Replay
from vllm_engine import MODEL

from vllm_oscar.core.config import PRESETS
from vllm_oscar.ops import select

# Some request has values on edges: a bit of an int8 token in the ring here and there, or the
# scale of a key group, which changes 64 keys by up to 6 % (e4m3). What that may do is measured:
# replays whose keys and values differ by a tenth of what the two computations do, and by as
# much. Either one of them agrees, or they differ among each other as much as the engine
# differs from them.
NOISES, NOISY_REPLAYS = (1e-7, 1e-6), 8


class Comparison:
    """Logprob differences of a request, over 10 logprobs of every output token.

    Attributes:
        errors: between engine and replay, one tensor for each replay; the first is without noise.
        spread: between the first replay and each of the others.
    """

    def __init__(self, kind: str) -> None:
        self.worst, self.median = tolerances.INT2_LOGPROBS[kind]
        self.errors: list[torch.Tensor] = []
        self.spread: list[torch.Tensor] = []

    @property
    def agrees(self) -> bool:
        if any(error.max() < self.worst and error.median() < self.median for error in self.errors):
            return True
        return all(
            bool(self.spread) and measure(self.errors[0]) <= max(map(measure, self.spread))
            for measure in (torch.max, torch.median)
        )


def compare(kind: str, replay: Replay, prompts: list[list[int]], results: list[dict], donors: dict | None = None):
    """A comparison for each request, and the states of the last replays."""
    comparisons, states = [], []
    for number, (prompt, result) in enumerate(zip(prompts, results)):
        sample, comparison, first = result["outputs"][0], Comparison(kind), None
        assert len(sample["tokens"]) == len(sample["logprobs"])
        for seed in range(1 + NOISY_REPLAYS):
            replay.add_noise(NOISES[seed % len(NOISES)] if seed else 0.0, seed)
            rows, state = replay.request(prompt + sample["tokens"], result["chunks"], (donors or {}).get(number))
            mine, found = [], []
            for step, logprobs in enumerate(sample["logprobs"]):
                mine.append(rows[len(prompt) - 1 + step][torch.tensor([int(token) for token in logprobs])])
                found.append(torch.tensor(list(logprobs.values())))
            mine, found = torch.cat(mine), torch.cat(found)
            first = mine if first is None else first
            comparison.errors.append((mine - found).abs())
            if seed:
                comparison.spread.append((mine - first).abs())
            shown = [f"{x.max():.1e} (median {x.median():.1e})" for x in (comparison.errors[-1], (mine - first).abs())]
            print(replay.fmt.config.name, number, seed, *shown)
            if comparison.agrees:
                break
        comparisons.append(comparison)
        states.append(state)
    return comparisons, states


def engine_donors(engine_host, replay: Replay, state: list[dict], prompts: list[list[int]]) -> dict[int, list[dict]]:
    """For each prompt that will hit, ``state`` with the pages that the engine has, which must be nearly the same."""
    donors = {}
    for number, prompt in enumerate(prompts):
        pages = engine_host.inside("engine_pages", "of_prefix", prompt)
        donors[number], difference = replay.with_pages(state, pages)
        print("pages", number, f"{difference:.1e}")
        assert difference < tolerances.INT2_PAGES
    return donors


def close(comparisons: list[Comparison]) -> bool:
    return all(comparison.agrees for comparison in comparisons)


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
    comparisons, states = compare(kind, replay, edges, found)
    assert close(comparisons)

    # While they decode, the longer two complete a block, and the last one goes round its ring.
    growing = [text(n, at=5000 + 300 * i) for i, n in enumerate((5, 120, 250))]
    found = engine_host.run(growing, max_tokens=30)
    comparisons, _ = compare(kind, replay, growing, found)
    assert close(comparisons)

    shared = [edges[4][:n] + text(90, at=9000)[1:] for n in (131, 384, 499)]
    donors = engine_donors(engine_host, replay, states[4], shared)
    found = engine_host.run(shared, max_tokens=10)
    assert [result["cached"] for result in found] == [128, 384, 384]
    comparisons, _ = compare(kind, replay, shared, found, donors)
    assert close(comparisons)


@pytest.mark.parametrize("budget", [64, 4096])
def test_other_chunk_sizes(engine_host, text, budget):
    engine_host.start("oscar", enable_prefix_caching=False, max_num_batched_tokens=budget)
    prompts = [text(n, at=700 * i) for i, n in enumerate((64, 256, 900))]
    found = engine_host.run(prompts, max_tokens=6)
    assert max(tokens for result in found for _, tokens in result["chunks"]) == min(budget, 900)
    comparisons, _ = compare(kernels()[-1], Replay(MODEL, "oscar"), prompts, found)
    assert close(comparisons)


def test_the_comparison_has_teeth(engine_host, text):
    """Were the window one token shorter, or the attention exact, or the window ignored, it would show."""
    engine_host.start(
        "oscar", env={"VLLM_OSCAR_KERNELS": "reference"}, enable_prefix_caching=True, max_num_batched_tokens=200
    )
    prompts = [text(n, at=1000 + 700 * i) for i, n in enumerate((380, 450))]
    found = engine_host.run(prompts, max_tokens=12)
    replay = Replay(MODEL, "oscar")
    comparisons, _ = compare("reference", replay, prompts, found)
    assert close(comparisons)
    window = replay.fmt.config.window
    for wrong in (lambda: max(replay.context - window + 1, 0), lambda: 0, lambda: replay.context // 128 * 128):
        replay._ring_start = wrong
        comparisons, _ = compare("reference", replay, prompts, found)
        assert not close(comparisons)
