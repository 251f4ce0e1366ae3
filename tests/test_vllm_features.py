# SPDX-License-Identifier: Apache-2.0
"""vLLM's other features, one short test each: with the lossless codec as with ``auto``."""

from __future__ import annotations

import pytest
from test_vllm_lossless import LOSSLESS, assert_same, difference

pytestmark = pytest.mark.slow

SMALL = {"max_model_len": 512}
CACHED = {"enable_prefix_caching": True, "max_num_batched_tokens": 200}


@pytest.fixture(scope="module")
def prompts(text) -> list[list[int]]:
    base = text(300, at=3000)
    return [text(1), text(127, at=50), text(129, at=90), text(370, at=700), base, base[:260] + text(50, at=8000)[1:]]


def both(host, prompts: list, rounds: int = 2, run: dict | None = None, ours: dict = CACHED, **options) -> list:
    """The same requests with ``auto`` and then twice with ours, which must not differ; our last answers."""
    run = {"max_tokens": 6} | (run or {})
    host.start("auto", enable_prefix_caching=False, **SMALL | options)
    auto = host.run(prompts, **run)
    info = host.start("oscar", env=LOSSLESS, **SMALL | options | ours)
    for _ in range(rounds):
        found = host.run(prompts, **run)
        assert_same(auto, found)
    if "distributed_executor_backend" not in options:
        assert host.state()["free"] == info["free"]
    return found


@pytest.mark.parametrize("model", ["mixture_of_experts", "ignored_windows"])
def test_models(engine_host, prompts, tmp_path, model):
    engine_host.call("engine_features", model, str(tmp_path))
    both(engine_host, prompts, model=str(tmp_path))


def test_lora(engine_host, prompts, tmp_path):
    """With and without an adapter, whose pages are not each other's. One at a time: in steps with both, vLLM's CPU
    build gives other answers for other chunks, with ``auto``, too."""
    engine_host.call("engine_features", "adapter", str(tmp_path))
    asked = prompts[2:] + [{"ids": prompt, "lora": str(tmp_path)} for prompt in prompts[2:]]
    found = both(engine_host, asked, enable_lora=True, max_lora_rank=8, max_num_seqs=1)
    count = len(asked) // 2
    with pytest.raises(AssertionError):
        difference(found[:count], found[count:])


def test_prompt_embeddings(engine_host):
    asked = [{"embeds": [tokens, 256, tokens]} for tokens in (1, 128, 129, 300)]
    found = both(engine_host, asked, enable_prompt_embeds=True)
    assert found[3]["cached"] == 256


def test_structured_output(engine_host, prompts):
    run = {"structured_outputs": {"regex": "(ab|ba){3,9}"}, "max_tokens": 12}
    both(engine_host, prompts, run=run)


def test_beam_search(engine_host, prompts):
    answers = []
    for dtype, env in (("auto", {}), ("oscar", LOSSLESS)):
        engine_host.start(dtype, env=env, enable_prefix_caching=True, **SMALL)
        answers.append(engine_host.inside("engine_features", "beams", prompts[1:], 3, 6))
    for auto, ours in zip(*answers):
        assert [tokens for tokens, _ in auto] == [tokens for tokens, _ in ours] and len(auto) == 3
        assert [total for _, total in auto] == pytest.approx([total for _, total in ours], abs=1e-3)


def test_priorities(engine_host, text):
    """Those of little priority come first and are preempted; who is served when is as with ``auto``."""
    asked = [{"ids": text(380 - 3 * i, at=900 * i), "priority": 9 - i} for i in range(4)]
    few = {"enable_prefix_caching": True, "num_gpu_blocks_override": 30}  # two fit until one grows
    both(engine_host, asked, run={"max_tokens": 20}, ours=few, scheduling_policy="priority")
    assert engine_host.state()["counters"]["vllm:num_preemptions"] > 0


def test_reset_in_mid_decode(engine_host, prompts):
    both(engine_host, prompts, run={"max_tokens": 20, "resets": [3, 9, 10]})
    assert engine_host.state()["counters"]["vllm:num_preemptions"] > 0


def test_events(engine_host, prompts):
    """Pages are announced, each once and with its 128 tokens; rings are not."""
    events = {"enable_kv_cache_events": True, "publisher": "null"}
    engine_host.start("oscar", env=LOSSLESS, kv_events_config=events, enable_prefix_caching=True, **SMALL)
    engine_host.inside("engine_features", "record_events")
    for _ in range(2):
        engine_host.run(prompts, max_tokens=2)
    stored = engine_host.inside("engine_features", "events")
    assert {(size, group) for size, _, group in stored} == {(128, 0)}
    pages = [tuple(ids[start : start + 128]) for _, ids, _ in stored for start in range(0, len(ids), 128)]
    whole = prompts[2:]  # prompts with whole pages; that of 127 tokens has one with its first answer
    expected = {tuple(prompt[at : at + 128]) for prompt in whole for at in range(0, len(prompt) - 127, 128)}
    assert expected < set(pages) and len(set(pages)) == len(expected) + 1
