# SPDX-License-Identifier: Apache-2.0
"""Standard suites do not report "no loss" where their scores could not show one."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
import typer
from vllm_engine import MODEL, REPO, environment

pytest.importorskip("vllm")
pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from benchmarks.harness import cli  # noqa: E402
from benchmarks.harness.cli import engine_options  # noqa: E402
from benchmarks.harness.model import WatchedVLLM  # noqa: E402
from benchmarks.harness.suites import NoLossSeen  # noqa: E402
from benchmarks.history import history  # noqa: E402


@pytest.mark.parametrize("chunk", [1, 32, 128, 1000])
@pytest.mark.parametrize("window", [0, 128, 256])
def test_the_rule_holds_wherever_a_chunk_begins(chunk, window):
    """Against steps counted one by one: never more than they read, and as much where the step begins earliest."""
    position = torch.arange(1500)
    promised = history(position, chunk, window).tolist()
    smallest = [1 << 30] * 1500
    for offset in range(chunk):  # tokens of the first step, less than a chunk if others share the budget
        for p in range(1500):
            context = 0 if p < offset else offset + (p - offset) // chunk * chunk
            read = max(context - window, 0) if window else context // 128 * 128
            smallest[p] = min(smallest[p], read)
    assert promised == smallest


def watched(window: int | None, chunk: int) -> WatchedVLLM:
    """The model without its engine; a token is a character."""

    class Model(WatchedVLLM):
        tok_encode = staticmethod(list)
        max_length = 4096

    model = Model.__new__(Model)
    model.window, model.shares = window, {}
    model.__dict__["model"] = type("LLM", (), {})()
    model.model.llm_engine = type("Engine", (), {})()
    model.model.llm_engine.vllm_config = type("Config", (), {})()
    model.model.llm_engine.vllm_config.scheduler_config = type("Config", (), {"max_num_batched_tokens": chunk})()
    return model


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, a, i, ("quiz", i, 1)) for i, a in enumerate(arguments)]


def test_scores_within_chunk_and_window_are_refused():
    model = watched(256, 128)
    with pytest.raises(NoLossSeen, match="quiz: .*chunk of 128 .*window of 256.*--chunk"):
        model._watch(requests("loglikelihood", ("x" * 300, "y" * 84)), model._continuation)
    with pytest.raises(NoLossSeen):
        model._watch(requests("loglikelihood_rolling", ("x" * 384,)), model._whole)
    model._watch(requests("loglikelihood", ("x" * 300, "y" * 10), ("x" * 300, "y" * 86)), model._continuation)
    assert 0 < model.shares["quiz"] < 0.01  # one query of one prompt reads one token
    watched(None, 128)._watch(requests("loglikelihood", ("x", "y")), model._continuation)  # no preset


def test_little_of_the_loss_is_warned_about(caplog):
    model = watched(256, 128)
    with caplog.at_level(logging.WARNING):
        model._watch(requests("generate_until", ("x" * 100, {})), model._generated)
        assert "quiz: only 0% of the tokens" in caplog.text
        caplog.clear()
        model._watch(requests("generate_until", ("x" * 500, {})), model._generated)
        assert "quiz: only 49% of the tokens" in caplog.text
        caplog.clear()
        model._watch(requests("generate_until", ("x" * 520, {})), model._generated)
        model._watch(requests("loglikelihood", ("x" * 1000, "y")), model._continuation)
    assert not caplog.text
    assert model.shares["quiz"] == pytest.approx((1000 - 128 - 256) / 999)


def test_the_chunk_bounds_what_a_step_computes():
    """By ``max_num_batched_tokens``, and no more requests than that; nothing is set where vLLM's own is asked for."""
    engine = engine_options(["max_model_len=4096"], None)
    assert engine == {
        "max_model_len": 4096, "enable_chunked_prefill": True, "max_num_batched_tokens": 128, "max_num_seqs": 128,
    }  # fmt: skip
    assert engine_options(["max_num_seqs=4"], 32)["max_num_seqs"] == 4
    assert engine_options(["max_num_batched_tokens=4096"], 0) == {"max_num_batched_tokens": 4096}
    with pytest.raises(typer.BadParameter, match="--chunk"):
        engine_options(["max_num_batched_tokens=4096"], None)


_SCORE = """
import argparse, gc, json, sys
from lm_eval.api.instance import Instance
from vllm.distributed import cleanup_dist_env_and_memory
from benchmarks.harness.cli import engine_options
from benchmarks.harness.model import WatchedVLLM
from benchmarks.harness.suites import NoLossSeen

text = open(argparse.__file__).read()[:5000]
found = {}
for chunk in (0, 128):
    for dtype in ("auto", "oscar"):
        own = ["max_num_batched_tokens=4096"] if not chunk else []
        lm = WatchedVLLM(pretrained=sys.argv[1], kv_cache_dtype=dtype, window=None, batch_size="auto", seed=0,
                         dtype="float32", enforce_eager=True, max_model_len=4096, kv_cache_memory_bytes=128 << 20,
                         **engine_options(own, chunk))
        score = lambda: lm.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (text,), 0, ("argparse", 0, 1))], disable_tqdm=True)[0]
        found[f"{dtype} {chunk}"] = score()
        lm.window = 256
        try:
            score()
            found[f"{dtype} {chunk} share"] = lm.shares["argparse"]
        except NoLossSeen as error:
            found[f"{dtype} {chunk} refused"] = str(error)
        lm.model.llm_engine.engine_core.shutdown()
        del lm
        cleanup_dist_env_and_memory()
        gc.collect()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_text_scored_in_one_chunk_is_refused_and_in_small_chunks_shows_its_loss():
    command = [sys.executable, "-c", _SCORE, str(MODEL)]
    run = subprocess.run(
        command, env=environment(PYTHONPATH=str(REPO)), cwd=REPO, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # In one chunk the preset scores as `auto`, so that is refused, already in the column of `auto`.
    assert found["oscar 0"] == pytest.approx(found["auto 0"], abs=1e-2)
    assert all("chunk of 4096 tokens" in found[f"{dtype} 0 refused"] for dtype in ("auto", "oscar"))
    # In chunks `auto` scores as before, and the preset does not.
    assert found["auto 128"] == pytest.approx(found["auto 0"], abs=1e-2)
    assert abs(found["oscar 128"] - found["auto 128"]) > 0.5
    assert 0.2 < found["oscar 128 share"] < 0.8


def refusing(suite, model, dtype, window, *_):
    raise NoLossSeen(f"{suite} {dtype} {window}")


def test_a_refusal_ends_the_comparison_in_one_sentence(monkeypatch, tmp_path):
    """Through the process that evaluates, with the widest window of the presets compared."""
    monkeypatch.setattr(cli, "evaluate", refusing)
    with pytest.raises(typer.BadParameter, match="lm-eval auto 256"):
        cli.compare("lm-eval", "m", "auto,oscar_paper,oscar", tmp_path, None, None, None, tasks=["quiz"])
    assert not list(tmp_path.iterdir())
