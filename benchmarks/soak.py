# SPDX-License-Identifier: Apache-2.0
"""Thousands of requests, with everything that a scheduler can do to them: is every token right, is anything lost?

    python benchmarks/soak.py --requests 10000 --json benchmarks/results/soak-cpu.json

A tiny random model answers a set of prompts with ``auto``. Then requests for these prompts, of random lengths and
priorities, are sent to engines with the lossless codec: with and without n-gram drafts, with and without offloading
to host memory. They share prefixes, are chunked, preempted by others, aborted, and preempted all at once by resets
of the prefix cache. Each token is compared. A token counts as wrong unless ``auto`` finds it as probable as its own,
within ``TIE``: rounding may turn such a tie. When an engine is idle again, all of its blocks must be free. Between
the first third of the requests and the end, its resident memory must not grow more than that of an engine with
``auto`` under the same load, which grows, too.

Without a GPU, ``tests/offload_on_cpu.py`` stands in for the copies to host memory, which vLLM's CPU build lacks.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TIE = 1e-3  # nats
MAX_TOKENS = 24
CONTEXT = 704
VOCABULARY = 512
BLOCKS = {False: 72, True: 90}  # with drafts the rings are longer
GROWTH_MIB = 24  # more than with auto, of resident memory: what an allocator may keep

app = typer.Typer(add_completion=False, help=__doc__)
console = Console()


def write_model(folder: Path) -> None:
    """Two layers of two KV heads, random weights, so large that each token shows in the logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT, initializer_range=0.15,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)


def make_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 1 to 640 tokens; two thirds begin like others, and some repeat themselves, which drafts like."""
    source = random.Random(seed)

    def words(length: int) -> list[int]:
        return [source.randrange(3, VOCABULARY) for _ in range(length)]

    bases = [words(512) for _ in range(6)]
    prompts = []
    for _ in range(count):
        kind = source.randrange(6)
        if kind == 0:
            prompt = words(source.choice((1, 2, 127, 128, 129, 256, 384)))
        elif kind == 1:
            prompt = words(source.choice((1, 2, 5, 40))) * source.randrange(4, 16)
        else:
            prompt = source.choice(bases)[: source.randrange(1, 513)] + words(source.randrange(1, 120))
        prompts.append(prompt[:640])
    return prompts


def build(model: str, **options):
    """An engine in this process, and its scheduler."""
    from vllm import LLM

    llm = LLM(
        model=model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=CONTEXT, seed=0,
        kv_cache_memory_bytes=1 << 28, disable_log_stats=False, **options,
    )  # fmt: skip
    return llm, llm.llm_engine.engine_core.engine_core.scheduler


def parameters(tokens: int):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, detokenize=False)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# ---- what runs in a process of its own ---------------------------------------------
def reference(spec: dict) -> list:
    """What ``auto`` answers to every prompt: ``[token, logprobs of the five best]`` per step."""
    llm, _ = build(spec["model"], enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in make_prompts(spec["prompts"], spec["seed"])]
    outputs = llm.generate(prompts, parameters(MAX_TOKENS), use_tqdm=False)
    return [
        [
            [token, {t: x.logprob for t, x in row.items()}]
            for token, row in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)
        ]
        for o in outputs
    ]


def wrong(expected: list, tokens: list[int]) -> bool:
    """Whether the first token that differs is more than a tie away from the one expected."""
    for (token, best), found in zip(expected, tokens):
        if token != found:
            return best[str(token)] - best.get(str(found), float("-inf")) > TIE
    return False


def soak(spec: dict) -> dict:
    """Send ``spec["requests"]`` requests to one engine and count what goes wrong."""
    os.environ["VLLM_OSCAR_CODEC"] = "lossless"
    import torch

    options = {"kv_cache_dtype": "oscar", "num_gpu_blocks_override": BLOCKS[spec["drafts"]]}
    if spec["dtype"] == "auto":
        options = {"kv_cache_dtype": "auto", "num_gpu_blocks_override": 24, "block_size": 128}
    if spec["drafts"]:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        }
    if spec["offload"]:
        extra = {"cpu_bytes_to_use": 32 << 20, "offload_prompt_only": False}
        options["kv_transfer_config"] = {
            "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra,
        }  # fmt: skip
        if not torch.cuda.is_available():
            sys.path.insert(0, str(ROOT / "tests"))
            import offload_on_cpu

            offload_on_cpu.install()
    llm, scheduler = build(
        spec["model"], enable_prefix_caching=True, scheduling_policy="priority",
        max_num_batched_tokens=256, max_num_seqs=12, **options,
    )  # fmt: skip
    engine, source = llm.llm_engine, random.Random(spec["seed"] + 1)
    prompts, expected = make_prompts(spec["prompts"], spec["seed"]), json.loads(Path(spec["expected"]).read_text())
    pool = scheduler.kv_cache_manager.block_pool
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    free, running, sent, done = pool.get_num_free_blocks(), {}, 0, 0
    count = {"wrong": 0, "tokens": 0, "aborted": 0, "resets": 0, "unfinished": 0}
    memory, start = [], time.perf_counter()
    while sent < spec["requests"] or running:
        while sent < spec["requests"] and len(running) < source.randrange(4, 20):
            index, tokens = source.randrange(len(prompts)), source.randrange(1, MAX_TOKENS + 1)
            abort = source.randrange(tokens) if source.random() < 0.08 else None
            running[str(sent)] = index, tokens, abort
            prompt = {"prompt_token_ids": prompts[index]}
            engine.add_request(str(sent), prompt, parameters(tokens), priority=source.randrange(4))
            sent += 1
        for output in engine.step():
            index, tokens, abort = running[output.request_id]
            found = list(output.outputs[0].token_ids)
            if output.finished or (abort is not None and len(found) > abort):
                del running[output.request_id]
                done += 1
                count["wrong"] += wrong(expected[index], found)
                count["tokens"] += len(found)
                if not output.finished:
                    engine.abort_request([output.request_id])
                    count["aborted"] += 1
                else:
                    count["unfinished"] += len(found) != tokens
                if done % max(spec["requests"] // 30, 1) == 0:
                    memory.append(resident_mib())
        # vLLM cannot reset while a request holds blocks that does not run, but waits for a prefix from the host or to
        # run with it. Nor can vLLM load one in the step after for a request that the reset preempted: so the host
        # forgets, too.
        holders = {request for manager in managers for request in manager.req_to_blocks}
        loading = holders - {request.request_id for request in scheduler.running}
        if source.random() < 0.02 and not loading:
            engine.reset_prefix_cache(reset_running_requests=True, reset_connector=spec["offload"])
            count["resets"] += 1
    seconds = time.perf_counter() - start
    for _ in range(3):  # copies to the host may hold blocks a little longer
        llm.generate({"prompt_token_ids": [5]}, parameters(2), use_tqdm=False)
    counters = {
        metric.name.removeprefix("vllm:"): metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    for name in (
        "num_preemptions",
        "prefix_cache_hits",
        "external_prefix_cache_hits",
        "spec_decode_num_accepted_tokens",
    ):
        count[name] = counters.get(name, 0)
    count["leaked_blocks"] = free - pool.get_num_free_blocks()
    count["leaked_requests"] = len(scheduler.requests) + sum(len(manager.req_to_blocks) for manager in managers)
    third = memory[len(memory) // 3 :]
    return {
        "dtype": spec["dtype"], "requests": sent, "drafts": spec["drafts"], "offload": spec["offload"], **count,
        "resident_mib": [round(third[0]), round(third[-1])],
        "seconds": round(seconds),
    }  # fmt: skip


def growth(result: dict) -> int:
    """MiB of resident memory after the first third of the requests."""
    first, last = result["resident_mib"]
    return last - first


def problems(result: dict) -> list[str]:
    """What is wrong with a result of :func:`soak`, or did not happen although it should be tried."""
    found = [
        f"{result[name]} {name}" for name in ("wrong", "unfinished", "leaked_blocks", "leaked_requests") if result[name]
    ]
    if growth(result) - result["auto_growth_mib"] > GROWTH_MIB:
        found.append(f"resident memory grew by {growth(result)} MiB, with auto by {result['auto_growth_mib']}")
    tried = ["aborted", "resets", "num_preemptions", "prefix_cache_hits"]
    tried += ["external_prefix_cache_hits"] if result["offload"] else []
    tried += ["spec_decode_num_accepted_tokens"] if result["drafts"] else []
    return found + [f"no {name}" for name in tried if not result[name]]


# ---- commands ----------------------------------------------------------------------
def in_a_process(job: str, spec: dict):
    """The answer of ``reference`` or ``soak`` in a fresh process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_OSCAR_")}
    env |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    env["NUMBA_NUM_THREADS"] = "1"  # n-grams are looked up by numba, whose threads would only wait for each other
    env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [sys.executable, __file__, "--job", json.dumps([job, spec, answer.name])]
        result = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise RuntimeError(f"{job} failed\n{result.stdout[-4000:]}")
        return json.loads(Path(answer.name).read_text())


def run(requests: int, seed: int, cases: list[tuple[bool, bool]]):
    """Results of :func:`soak`, one after the other, for ``(drafts, offload)``; ``requests`` in all."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        each = requests // len(cases)
        spec = {"model": f"{folder}/model", "prompts": max(40, each // 5), "seed": seed, "requests": each}
        spec["expected"] = f"{folder}/expected.json"
        Path(spec["expected"]).write_text(json.dumps(in_a_process("reference", spec)))
        auto = in_a_process("soak", spec | {"dtype": "auto", "drafts": False, "offload": False})
        for drafts, offload in cases:
            result = in_a_process("soak", spec | {"dtype": "oscar", "drafts": drafts, "offload": offload})
            yield result | {"auto_growth_mib": growth(auto)}


@app.command()
def main(
    requests: Annotated[int, typer.Option(help="In all, a quarter for each engine.")] = 10000,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the record goes.")] = None,
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Soak four engines; fails if a token is wrong, a block is lost or memory grows."""
    if job:
        name, spec, answer = json.loads(job)
        Path(answer).write_text(json.dumps({"reference": reference, "soak": soak}[name](spec)))
        return
    sys.path.insert(0, str(ROOT))
    from vllm_oscar.tools.bench import scrape

    where = {"device": scrape.device(), **scrape.stamp()}
    results, failed = [], False
    for result in run(requests, seed, [(drafts, offload) for offload in (False, True) for drafts in (False, True)]):
        results.append(where | result)
        found = problems(result)
        failed |= bool(found)
        console.print_json(json.dumps(result | {"problems": found}))
        if json_file:
            json_file.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(
        "drafts", "offload", "requests", "tokens", "wrong", "leaked blocks", "preemptions", "resets", "resident MiB"
    )
    for r in results:
        cells = (r["drafts"], r["offload"], r["requests"], r["tokens"], r["wrong"], r["leaked_blocks"])
        table.add_row(*map(str, (*cells, r["num_preemptions"], r["resets"], " to ".join(map(str, r["resident_mib"])))))
    console.print(table)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
