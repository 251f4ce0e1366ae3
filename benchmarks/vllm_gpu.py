# SPDX-License-Identifier: Apache-2.0
"""vLLM end to end on a GPU: is it right, how fast is a decode step, how much is served.

    python benchmarks/vllm_gpu.py check
    python benchmarks/vllm_gpu.py drafts --jobs 6
    python benchmarks/vllm_gpu.py offload --json benchmarks/results/vllm-offload-h100.json
    python benchmarks/vllm_gpu.py speed --json benchmarks/results/vllm-h200.json
    python benchmarks/vllm_gpu.py prefix --json benchmarks/results/vllm-prefix-h100.json

``check`` uses the demo model: with the lossless codec, logprobs are those of ``auto``, within bf16 rounding;
with INT2, the facts of its recall prompts come back: eager, with full and piecewise
CUDA graphs, under both model runners, with n-gram speculation and, on request, on several GPUs.
``drafts`` drafts for the demo model with itself and with an EAGLE made from its weights, in OScaR pages, and
compares how many drafted tokens are accepted with ``auto``, under both runners, with piecewise and full CUDA graphs.
``offload`` fills the cache on the GPU with NaN, so that prefixes come back from host memory, and compares.
``speed`` uses a model of a published shape with dummy weights (speed and memory are
real, text means nothing). Each engine runs in a process of its own; ``check`` can run several
at a time (``--jobs``), ``speed`` can run all in its own process, one after the other (``--one-process``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # instead of this folder, whose kernels.py would hide a package that transformers looks for

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vllm_oscar.tools.bench.scrape import commit  # noqa: E402
from vllm_oscar.tools.bench.shapes import SHAPES  # noqa: E402

QWEN3_8B = SHAPES["qwen3-8b"]
Model = Annotated[Path, typer.Option()]
Timeout = Annotated[float, typer.Option(help="Seconds per engine.")]
Jobs = Annotated[int, typer.Option(help="Engines that run at a time.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Where the record goes.")]
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(width=120)


# ---- what runs inside an engine's process --------------------------------------
def _logprobs(llm, prompts, max_tokens: int):
    from vllm import SamplingParams

    outputs = llm.generate(
        prompts, SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=1, ignore_eos=True), use_tqdm=False
    )
    return [
        {
            "tokens": list(out.outputs[0].token_ids),
            "logprobs": [step[token].logprob for step, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)],
            "text": out.outputs[0].text,
        }
        for out in outputs
    ]


def job_check(llm) -> dict:
    """Greedy continuations of block-edge lengths, twice (prefix hits), and recall."""
    from vllm_oscar.tools.recall import FACTS, long_prompt, question

    tokenizer, prompt = llm.get_tokenizer(), long_prompt(380)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    lengths = (1, 5, 127, 128, 129, 300, 640, 2000)
    prompts = [{"prompt_token_ids": [0, *ids[: n - 1]]} for n in lengths]
    rounds = [_logprobs(llm, prompts, 24) for _ in range(2)]
    questions = [
        {"prompt_token_ids": tokenizer("<|bos|>" + question(prompt, name), add_special_tokens=False).input_ids}
        for name in FACTS
    ]
    answers = [answer["text"].strip()[:7] for answer in _logprobs(llm, questions, 9)]
    right = sum(answer == code for answer, code in zip(answers, FACTS.values()))
    return {"rounds": rounds, "recalled": right, "facts": len(FACTS)}


def _forget_the_device(llm) -> None:
    """Fill the whole cache on the GPU with NaN and forget what it held, once all copies to the host have ended."""
    import torch

    for _ in range(3):  # steps in which copies are started and seen to have ended
        _logprobs(llm, [{"prompt_token_ids": [0, 5, 6]}], 4)
        torch.cuda.synchronize()
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)]
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches}
    for storage in storages.values():
        torch.tensor([], dtype=torch.uint8, device=caches[0].device).set_(storage).fill_(0xFF)
    torch.cuda.synchronize()
    llm.reset_prefix_cache()


def job_offload(llm) -> dict:
    """Greedy continuations in three rounds; with offloading, the GPU's cache is NaN before the second and third."""
    from vllm.v1.metrics.reader import Counter

    from vllm_oscar.tools.recall import long_prompt

    ids = llm.get_tokenizer()(long_prompt(380), add_special_tokens=False).input_ids
    prompts = [{"prompt_token_ids": [0, *ids[: n - 1]]} for n in (5, 127, 128, 129, 256, 384, 640, 2000, 2048)]
    # Others that share nothing, so that blocks change hands while they are copied.
    prompts += [{"prompt_token_ids": [0, *ids[37 * n : 37 * n + 250 + 50 * n]]} for n in range(1, 9)]
    offloads = llm.llm_engine.vllm_config.kv_transfer_config is not None
    rounds, seconds = [], []
    for number in range(3):
        if number and offloads:
            _forget_the_device(llm)
        start = time.perf_counter()
        rounds.append(_logprobs(llm, prompts, 24))
        seconds.append(time.perf_counter() - start)
    counters = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
    hits = {name: counters.get(f"vllm:{name}", 0) for name in ("external_prefix_cache_hits", "num_preemptions")}
    return {"rounds": rounds, "seconds": seconds, **hits}


def job_drafts(llm) -> dict:
    """Greedy continuations of block-edge lengths, twice (prefix hits): how many drafted tokens were accepted."""
    from vllm_oscar.tools.recall import long_prompt

    ids = llm.get_tokenizer()(long_prompt(380), add_special_tokens=False).input_ids
    lengths = (5, 127, 128, 129, 300, 640, 1000, 2000)
    prompts = [{"prompt_token_ids": [0, *ids[n : 2 * n - 1]]} for n in lengths]
    rounds = [_logprobs(llm, prompts, 64) for _ in range(2)]
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    names = ("accepted", "draft")
    return {"rounds": rounds} | {name: counted[f"vllm:spec_decode_num_{name}_tokens"] for name in names}


def job_speed(llm, context: int, prefill: int, length: int, requests: int, output: int) -> dict:
    """One request's prefill and decode step, then a batch of requests that do not all fit."""
    import torch
    from vllm import SamplingParams

    def seconds(prompts: list, tokens: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    def prompts(tokens: int, count: int = 1) -> list:
        return [{"prompt_token_ids": torch.randint(10, 150000, (tokens,)).tolist()} for _ in range(count)]

    seconds(prompts(prefill), 1)
    result = {"prefill_s": min(seconds(prompts(prefill), 1) for _ in range(2))}
    one = prompts(context)
    result["long_prefill_s"] = seconds(one, 1)  # later calls find the prompt in the prefix cache
    seconds(one, 8)
    short, long = (min(seconds(one, n) for _ in range(2)) for n in (8, 136))
    result["step_ms"] = (long - short) / 128 * 1e3
    llm.reset_prefix_cache()
    elapsed = seconds(prompts(length, requests), output)
    return result | {"throughput_s": elapsed, "output_tokens_per_s": requests * output / elapsed}


def job_prefix(llm, shared: int, own: int, requests: int) -> dict:
    """One step of requests that hit a cached prefix of ``shared`` tokens and bring ``own`` more each."""
    import torch
    from vllm import SamplingParams

    one_token = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)

    def ids(count: int) -> list[int]:
        return torch.randint(10, 150000, (count,)).tolist()

    def seconds(prompts: list[list[int]]) -> float:
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], one_token, use_tqdm=False)
        return time.perf_counter() - start

    prefix = ids(shared)
    seconds([prefix + ids(1)])
    times = [seconds([prefix + ids(own) for _ in range(requests)]) for _ in range(6)]
    return {"step_s": sorted(times[1:])[2], "all_s": times}


JOBS = {"check": job_check, "drafts": job_drafts, "offload": job_offload, "speed": job_speed, "prefix": job_prefix}


def run_job(spec: dict) -> None:
    """Entry of an engine's process: build the engine, run the job, write its result."""
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(**spec["engine"])
    started = time.perf_counter() - start
    result = JOBS[spec["job"]](llm, **spec["arguments"])
    result["start_s"] = started
    result["kv_tokens"] = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    Path(spec["result"]).write_text(json.dumps(result))


def settings(environment: dict | None) -> dict[str, str]:
    """Environment of an engine: this one, without what an earlier engine or a shell may have chosen."""
    chosen = ("VLLM_OSCAR_CODEC", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_SIMPLE_KV_OFFLOAD")
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    return {**kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environment or {})}  # a process is the engine's own


def engine(job: str, arguments: dict, timeout: float, environment: dict | None = None, **options) -> dict | None:
    """Run ``job`` in a fresh engine; None, with the end of its log, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {"job": job, "arguments": arguments, "engine": options, "result": f"{folder}/result.json"}
        environment = settings(environment)
        environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
        with open(f"{folder}/log", "w") as log:
            try:
                subprocess.run(
                    [sys.executable, __file__, "job", json.dumps(spec)],
                    env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=timeout,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                print("timed out")
        if os.path.exists(spec["result"]):
            return json.loads(Path(spec["result"]).read_text())
        lines = Path(f"{folder}/log").read_text().splitlines()
        wanted = [line for line in lines if "Error" in line or "oscar" in line.lower()]
        print(*(line[:300] for line in [*wanted[-25:], *lines[-5:]]), sep="\n")
        return None


def engine_here(job: str, arguments: dict, environment: dict | None = None, **options) -> dict | None:
    """The same in this process; None, with the traceback, if it fails."""
    import gc
    import traceback

    import torch

    environment = settings(environment)
    os.environ.clear()
    os.environ.update(environment)
    from vllm import LLM, envs

    envs.disable_envs_cache()
    llm = None
    start = time.perf_counter()
    try:
        llm = LLM(**options)
        started = time.perf_counter() - start
        tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        return {**JOBS[job](llm, **arguments), "start_s": started, "kv_tokens": tokens}
    except Exception:
        print(traceback.format_exc()[-2500:], flush=True)
        return None
    finally:
        del llm
        gc.collect()
        torch.accelerator.memory.empty_cache() if torch.accelerator.is_available() else None


# ---- commands ----------------------------------------------------------------------
@app.command(hidden=True)
def job(spec: str) -> None:
    run_job(json.loads(spec))


def worst_difference(a: dict, b: dict) -> float:
    """Largest logprob difference up to and including the first differing token."""
    worst = 0.0
    for left, right in zip(sum(a["rounds"], []), sum(b["rounds"], [])):
        for token, other, x, y in zip(left["tokens"], right["tokens"], left["logprobs"], right["logprobs"]):
            worst = max(worst, abs(x - y))
            if token != other:
                break
    return worst


def stamp() -> dict:
    """What a record needs to be believed: device, versions, commit and date."""
    import torch
    import vllm

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


@app.command()
def check(
    model: Model = ROOT / "examples" / "demo_model",
    timeout: Timeout = 150,
    jobs: Jobs = 1,
    ranks: Annotated[int, typer.Option(help="Tensor-parallel ranks of two further runs.")] = 1,
    kernels: Annotated[str, typer.Option(help="VLLM_OSCAR_KERNELS of the INT2 runs; empty: the best.")] = "",
    json_file: JsonFile = None,
) -> None:
    """Correctness through vLLM on this GPU; fails if a run fails or a fact does not come back."""
    common = dict(model=str(model), max_model_len=4096, kv_cache_memory_bytes=1 << 30, max_num_seqs=16,
                  gpu_memory_utilization=0.2)  # fmt: skip
    oscar = dict(kv_cache_dtype="oscar")
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    runs = {
        "auto": dict(enforce_eager=True),
        "oscar lossless": dict(oscar, environment={"VLLM_OSCAR_CODEC": "lossless"}, enforce_eager=True),
        "oscar eager": dict(oscar, enforce_eager=True),
        "oscar graphs": dict(oscar),
        "oscar V1 runner, piecewise graphs": dict(
            oscar, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}, compilation_config={"cudagraph_mode": "PIECEWISE"}
        ),
        "oscar n-gram drafts": dict(oscar, speculative_config=drafts, enforce_eager=True),
    }
    for name, options in runs.items():
        if kernels and name not in ("auto", "oscar lossless"):
            options["environment"] = {"VLLM_OSCAR_KERNELS": kernels, **options.get("environment", {})}
    if ranks > 1:
        runs |= {f"{name}, {ranks} ranks": dict(runs[name], tensor_parallel_size=ranks)
                 for name in ("oscar lossless", "oscar graphs")}  # fmt: skip
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(engine, "check", {}, timeout, **common, **options) for options in runs.values()]
        results = {name: future.result() for name, future in zip(runs, futures)}
    table = Table("run", "recalled", "worst logprob difference to auto", "tokens in cache", "start s")
    record = {**stamp(), "kernels": kernels or "best", "runs": {}}
    for name, result in results.items():
        if result is None:
            table.add_row(name, "failed", "", "", "")
            record["runs"][name] = {"failed": True}
            continue
        difference = worst_difference(results["auto"], result) if results["auto"] else float("nan")
        table.add_row(
            name, f"{result['recalled']}/{result['facts']}", f"{difference:.4f}",
            f"{result['kv_tokens']:,}", f"{result['start_s']:.0f}",
        )  # fmt: skip
        kept = {key: result[key] for key in ("recalled", "facts", "kv_tokens", "start_s")}
        record["runs"][name] = {**kept, "worst_logprob_difference_to_auto": difference}
    console.print(table)
    if json_file:
        write_json(json_file, record)
    if not all(result and result["recalled"] == result["facts"] for result in results.values()):
        raise typer.Exit(1)


@app.command()
def offload(
    model: Model = ROOT / "examples" / "demo_model",
    host: Annotated[float, typer.Option(help="GiB of host memory that each engine may take.")] = 1,
    limit: Annotated[float, typer.Option(help="Largest logprob difference that passes, in bf16.")] = 0.1,
    timeout: Timeout = 150,
    jobs: Jobs = 1,
    json_file: JsonFile = None,
) -> None:
    """Prefixes that come back from host memory: as ``auto`` with the lossless codec, else as those that stayed."""
    common = dict(model=str(model), max_model_len=4096, kv_cache_memory_bytes=1 << 30, max_num_seqs=16,
                  gpu_memory_utilization=0.2, disable_log_stats=False)  # fmt: skip
    oscar, host_memory = dict(kv_cache_dtype="oscar"), dict(kv_offloading_size=host)
    lossless, simple = {"VLLM_OSCAR_CODEC": "lossless"}, {"VLLM_USE_SIMPLE_KV_OFFLOAD": "1"}
    few = dict(num_gpu_blocks_override=80)  # blocks change hands
    runs = {
        "auto": dict(enable_prefix_caching=False, enforce_eager=True),
        "oscar, stays on the GPU": dict(oscar, enforce_eager=True),
        "oscar, graphs, stays on the GPU": dict(oscar),  # compiled code rounds elsewhere than eager code
        "lossless": dict(oscar, **host_memory, environment=lossless, enforce_eager=True),
        "lossless, few blocks": dict(oscar, **host_memory, **few, environment=lossless, enforce_eager=True),
        "lossless, simple": dict(oscar, **host_memory, environment=lossless | simple, enforce_eager=True),
        "oscar": dict(oscar, **host_memory, enforce_eager=True),
        "oscar, graphs": dict(oscar, **host_memory),
        "oscar, V1 runner": dict(oscar, **host_memory, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
        "oscar, simple": dict(oscar, **host_memory, environment=simple, enforce_eager=True),
    }
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(engine, "offload", {}, timeout, **common, **options) for options in runs.values()]
        results = {name: future.result() for name, future in zip(runs, futures)}
    table = Table("run", "compared with", "worst logprob difference", "from the host", "preemptions", "rounds, s")
    record, failed = {**stamp(), "host_gib": host, "limit": limit, "runs": {}}, False
    for name, result in results.items():
        compiled = not runs[name].get("enforce_eager")
        base = "auto" if name.startswith(("auto", "lossless")) else f"oscar{', graphs' * compiled}, stays on the GPU"
        passed = bool(result and results[base])
        if passed:
            difference = worst_difference(results[base], result)
            hits = result["external_prefix_cache_hits"]
            passed = difference <= limit and (hits > 0) == ("kv_offloading_size" in runs[name])
            table.add_row(
                name, base, f"{difference:.4f}", f"{hits:,.0f}", f"{result['num_preemptions']:.0f}",
                ", ".join(f"{s:.2f}" for s in result["seconds"]),
            )  # fmt: skip
            kept = {key: value for key, value in result.items() if key != "rounds"}
            record["runs"][name] = {**kept, "compared_with": base, "worst_logprob_difference": difference}
        else:
            table.add_row(name, base, "failed", "", "", "")
            record["runs"][name] = {"failed": True}
        failed |= not passed
    console.print(table)
    if json_file:
        write_json(json_file, record)
    if failed:
        raise typer.Exit(1)


V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
PIECEWISE = {"cudagraph_mode": "PIECEWISE"}
DRAFT_MODES = {
    "V1 eager": dict(environment=V1, enforce_eager=True),
    "V1 piecewise": dict(environment=V1, compilation_config=PIECEWISE),
    "V1 full": dict(environment=V1),
    "V2 eager": dict(environment=V2, enforce_eager=True),
    "V2 piecewise": dict(environment=V2, compilation_config=PIECEWISE),
    "V2 full": dict(environment=V2),
}


@app.command()
def drafts(
    kinds: Annotated[str, typer.Option(help="Drafters: same (the target), noisy, eagle, eagle3, mtp.")] = "same,eagle",
    modes: Annotated[str, typer.Option(help="Model runners and CUDA graphs.")] = ",".join(DRAFT_MODES),
    tokens: Annotated[int, typer.Option(help="Drafted at a time.")] = 4,
    timeout: Timeout = 150,
    jobs: Jobs = 1,
    json_file: JsonFile = None,
) -> None:
    """Drafters in OScaR pages: fails if a run fails or accepts less than 95 % of what auto does, 98 % if lossless."""
    from benchmarks import drafters

    common = dict(max_model_len=4096, kv_cache_memory_bytes=1 << 30, max_num_seqs=16, gpu_memory_utilization=0.15,
                  model=str(drafters.MODEL), disable_log_stats=False)  # fmt: skip
    dtypes = {
        "auto": dict(kv_cache_dtype="auto"),
        "oscar lossless": dict(kv_cache_dtype="oscar", environment={"VLLM_OSCAR_CODEC": "lossless"}),
        "oscar": dict(kv_cache_dtype="oscar"),
    }
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, mode, dtype in product(kinds.split(","), modes.split(","), dtypes):
            if dtype != "oscar lossless" or mode.endswith("eager"):  # that codec has no CUDA graphs
                options = {**DRAFT_MODES[mode], **dtypes[dtype], **drafters.options(kind, Path(folder), tokens)}
                both = (DRAFT_MODES[mode], dtypes[dtype])
                options["environment"] = {k: v for part in both for k, v in part.get("environment", {}).items()}
                runs[kind, mode, dtype] = options
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(engine, "drafts", {}, timeout, **common, **options) for options in runs.values()]
            results = {name: future.result() for name, future in zip(runs, futures)}
    table = Table("drafter", "mode", "dtype", "accepted", "of", "of auto's rate", "worst logprob difference", "start s")
    record, failed = {**stamp(), "drafted at a time": tokens, "runs": []}, False
    for (kind, mode, dtype), result in results.items():
        base = results[kind, mode, "auto"]
        row = {"drafter": kind, "mode": mode, "dtype": dtype}
        if result is None or base is None:
            failed = True
            table.add_row(kind, mode, dtype, "failed", "", "", "", "")
            record["runs"].append({**row, "failed": True})
            continue
        ratio = result["accepted"] / result["draft"] / (base["accepted"] / base["draft"])
        failed |= ratio < (0.98 if dtype == "oscar lossless" else 0.95)
        difference = worst_difference(base, result)
        table.add_row(kind, mode, dtype, f"{result['accepted']:.0f}", f"{result['draft']:.0f}", f"{ratio:.3f}",
                      f"{difference:.4f}", f"{result['start_s']:.0f}")  # fmt: skip
        kept = {key: result[key] for key in ("accepted", "draft", "kv_tokens", "start_s")}
        record["runs"].append({**row, **kept, "rate_of_auto": ratio, "worst_logprob_difference_to_auto": difference})
    console.print(table)
    if json_file:
        write_json(json_file, record)
    if failed:
        raise typer.Exit(1)


@app.command()
def speed(
    context: Annotated[int, typer.Option(help="Tokens of the request whose decode step is timed.")] = 131072,
    prefill: Annotated[int, typer.Option(help="Tokens of the timed prefill, in chunks of 8,192.")] = 32768,
    length: Annotated[int, typer.Option(help="Input tokens of a request of the throughput run.")] = 8192,
    output: Annotated[int, typer.Option(help="Output tokens of such a request.")] = 512,
    requests: Annotated[int, typer.Option(help="Requests of the throughput run.")] = 64,
    memory: Annotated[float, typer.Option(help="GiB of KV cache, the same for every dtype.")] = 24,
    shape: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SHAPES)}.")] = "qwen3-8b",
    layers: Annotated[int | None, typer.Option(help="Fewer than the shape has start faster and leave memory.")] = None,
    dtypes: Annotated[str, typer.Option()] = "auto,oscar,fp8",
    json_file: JsonFile = None,
    timeout: Timeout = 240,
    one_process: Annotated[bool, typer.Option(help="All engines in this process: faster, less separate.")] = False,
) -> None:
    """Prefill, decode step and throughput at equal KV memory, beside auto and fp8."""
    table = Table("dtype", "tokens in cache", "prefill s", "step ms", "output tokens/s", "start s")
    records = []
    sizes = {"context": context, "prefill": prefill, "length": length, "requests": requests, "output": output}
    config = SHAPES[shape]
    layers = layers or config["num_hidden_layers"]
    common = {**stamp(), "model": shape, "layers": layers, "kv_gib": memory, **sizes}
    with tempfile.TemporaryDirectory() as model:
        if "layer_types" in config:
            config = config | {"layer_types": config["layer_types"][:layers]}
        (Path(model) / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        for dtype in dtypes.split(","):
            run = engine_here if one_process else partial(engine, timeout=timeout)
            result = run(
                "speed", sizes, model=model, load_format="dummy", skip_tokenizer_init=True,
                kv_cache_dtype=dtype, kv_cache_memory_bytes=int(memory * 2**30), max_model_len=context + 256,
                max_num_seqs=requests, max_num_batched_tokens=8192, gpu_memory_utilization=0.6,
                compilation_config={"cudagraph_capture_sizes": [1, 8, 16, 24, 32, 48, 64]},
            )  # fmt: skip
            records.append({"dtype": dtype, **common, **(result or {"failed": True})})
            print(json.dumps(records[-1]), flush=True)
            if json_file:  # after every engine: a run that is cut short keeps its numbers
                write_json(json_file, records)
            if result:
                table.add_row(
                    dtype, f"{result['kv_tokens']:,}", f"{result['prefill_s']:.2f}", f"{result['step_ms']:.2f}",
                    f"{result['output_tokens_per_s']:.0f}", f"{result['start_s']:.0f}",
                )  # fmt: skip
            else:
                table.add_row(dtype, "failed", "", "", "", "")
    console.print(table)


@app.command()
def prefix(
    shared: Annotated[int, typer.Option(help="Tokens of the cached prefix.")] = 16384,
    own: Annotated[int, typer.Option(help="Tokens that each request brings.")] = 128,
    requests: Annotated[int, typer.Option()] = 64,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 36,
    dtypes: Annotated[str, typer.Option()] = "auto,oscar",
    json_file: JsonFile = None,
) -> None:
    """The step of many requests that share a cached prefix, eager, beside auto; median of five."""
    table = Table("dtype", "step s", "ratio to the first")
    sizes, records = {"shared": shared, "own": own, "requests": requests}, []
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps({**QWEN3_8B, "num_hidden_layers": layers}))
        for dtype in dtypes.split(","):
            result = engine_here(
                "prefix", sizes, model=model, load_format="dummy", skip_tokenizer_init=True, kv_cache_dtype=dtype,
                kv_cache_memory_bytes=24 << 30, max_model_len=shared + 512, max_num_seqs=requests,
                max_num_batched_tokens=requests * own, gpu_memory_utilization=0.6, enforce_eager=True,
            )  # fmt: skip
            records.append({"dtype": dtype, **stamp(), "layers": layers, **sizes, **(result or {"failed": True})})
            if json_file:
                write_json(json_file, records)
            if result:
                base = records[0].get("step_s", float("nan"))
                table.add_row(dtype, f"{result['step_s']:.3f}", f"{result['step_s'] / base:.3f}")
    console.print(table)


if __name__ == "__main__":
    app()
