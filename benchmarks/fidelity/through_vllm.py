# SPDX-License-Identifier: Apache-2.0
"""The same measures through vLLM, so that the numbers are those that users get.

Prompts are prefilled in small chunks, so that every chunk reads the history from the
quantized cache (``benchmarks.history`` has the rule). A hook on the model keeps the last
hidden states; divergence, loss and recall are then computed from them as for transformers
models. Greedy texts and quizzes are generated.
"""

from __future__ import annotations

import gc
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from vllm_oscar.core.config import PAGE_TOKENS, PRESETS
from vllm_oscar.tools.bench.scrape import commit

from . import measures, methods, quiz
from .records import Records
from .tasks import Tasks


@dataclass(frozen=True)
class Plan:
    documents: int
    length: int
    seeds: int
    chunk: int
    text: str = ""  # its name, if it is not the default


def start(path: str, dtype: str, plan: Plan, **options):
    """A vLLM engine in this process. ``dtype``: see :func:`new_record`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    if dtype == methods.SKIP_WINDOWS:
        dtype, options["kv_cache_dtype_skip_layers"] = "oscar", ["sliding_window"]
    return LLM(path, dtype="bfloat16", kv_cache_dtype=dtype, max_model_len=plan.length + 128, enforce_eager=True,
               kv_cache_memory_bytes=1 << 30, seed=0, **options)  # fmt: skip


def stop(llm) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def chosen(plan: Plan | Generation, *names: str) -> dict:
    """The settings of a record: these of the plan, and the text if it is not the default."""
    return {name: getattr(plan, name) for name in names} | ({"text": plan.text} if plan.text else {})


def new_record(path: str, dtype: str, llm, measure: str, settings: dict) -> dict:
    """``dtype``: a KV-cache dtype of vLLM's, a preset, or the one of :data:`methods.SKIP_WINDOWS`."""
    method = methods.known()[dtype] if dtype in (*PRESETS, methods.SKIP_WINDOWS, "fp8") else None
    head_dim = llm.llm_engine.vllm_config.model_config.get_head_size()
    record = Records.new(Path(path).name, method, head_dim, f"{measure} through vLLM", settings) | {"origin": origin()}
    return record if method else record | {"method": dtype}


def origin() -> dict:
    """Where a number is from."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "command": shlex.join(["python", "-m", "benchmarks.fidelity", *map(_without_folders, sys.argv[1:])]),
        "device": device,
        "versions": {"vllm": version("vllm"), "torch": version("torch"), "python": platform.python_version()},
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def _without_folders(argument: str) -> str:
    """An absolute path is the machine's business: its last part says what it was."""
    return Path(argument).name if argument.startswith("/") else argument


def _processor() -> str:
    """Its name and how many of its threads there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} threads"


def with_auto(dtypes: list[str]) -> list[str]:
    """``auto`` first, as the reference."""
    return ["auto", *(d for d in dtypes if d != "auto")]


class Engine:
    """A vLLM engine whose last hidden states can be read."""

    def __init__(self, path: str, dtype: str, plan: Plan):
        self.llm = start(path, dtype, plan, max_num_seqs=1, max_num_batched_tokens=plan.chunk,
                         enable_chunked_prefill=True, enable_prefix_caching=False)  # fmt: skip
        self.tokenizer = self.llm.get_tokenizer()
        self._rows: list[torch.Tensor] = []
        self.llm.apply_model(self._attach)

    def _attach(self, model) -> None:
        self._model = model
        model.register_forward_hook(lambda module, args, out: self._rows.append(out.detach().clone()))

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states of one prompt: ``[T, hidden]``."""
        from vllm import SamplingParams

        self._rows.clear()
        prompt = {"prompt_token_ids": tokens.tolist()}
        self.llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
        return torch.cat(self._rows)[: len(tokens)].cpu()

    @property
    def device(self) -> torch.device:
        return self._model.lm_head.weight.device

    @torch.no_grad()
    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self._model.lm_head.weight
        return (hidden.to(weight.device).float() @ weight.float().T).log_softmax(-1)

    def close(self) -> None:
        self._model = None
        stop(self.llm)
        del self.llm


def measure(
    models: list[str], dtypes: list[str], forms: list[str], plan: Plan, texts: list[str], records: Records, bar
) -> None:
    """Text and recall of every dtype on every model."""
    dtypes = with_auto(dtypes)
    for path in models:
        exact: dict[str, torch.Tensor] = {}
        task_bar = bar.add_task(Path(path).name, total=len(dtypes))
        for dtype in dtypes:
            bar.update(task_bar, description=f"{Path(path).name} through vLLM: {dtype}")
            engine = Engine(path, dtype, plan)
            tasks = Tasks(engine.tokenizer, texts)
            documents = tasks.documents(plan.documents, plan.length)
            prompts = {("text", str(i)): (tokens, []) for i, tokens in enumerate(documents)}
            for task in forms:
                for seed in range(plan.seeds):
                    prompts[task, str(seed)] = tasks.recall(seed, plan.length, task)
            found: dict[str, list] = {}
            for (task, name), (tokens, questions) in prompts.items():
                hidden = engine.hidden(tokens)
                if task == "text":
                    tokens = tokens.to(engine.device)
                    values = measures.compare(engine.log_probs, tokens, exact.setdefault(name, hidden), hidden)
                else:
                    values = measures.right_answers(engine.log_probs, hidden, tokens, questions)
                found.setdefault(task, []).append(values)
            for task, values in found.items():
                measure, extra = ("text", {}) if task == "text" else ("recall", {"task": task})
                settings = chosen(plan, "documents", "length", "seeds", "chunk") | extra
                records.add(new_record(path, dtype, engine.llm, measure, settings), values)
            engine.close()
            bar.advance(task_bar)


@dataclass(frozen=True)
class Generation:
    """``texts`` greedy continuations of ``generated`` tokens after ``prompt`` tokens, and ``quizzes`` of
    ``items`` questions each after examples of ``examples`` tokens, whole pages."""

    texts: int
    prompt: int
    generated: int
    quizzes: int
    items: int
    examples: int
    chunk: int
    text: str = ""


def measure_generation(
    models: list[str], dtypes: list[str], plan: Generation, texts: list[str], records: Records, bar
) -> None:
    """Greedy continuations against those of ``auto``, and right answers of quizzes.

    A quiz's examples are prefilled in chunks, and its questions then find them in the prefix cache:
    all of them are read from quantized pages, window or not.
    """
    if plan.examples % PAGE_TOKENS:
        raise ValueError(f"the examples of a quiz must be whole pages of {PAGE_TOKENS} tokens, not {plan.examples}")
    dtypes = with_auto(dtypes)
    length = max(plan.prompt + plan.generated, plan.examples)
    for path in models:
        task_bar = bar.add_task(Path(path).name, total=len(dtypes))
        exact: torch.Tensor | None = None
        for dtype in dtypes:
            bar.update(task_bar, description=f"{Path(path).name} generates through vLLM: {dtype}")
            llm = start(path, dtype, Plan(0, length, 0, plan.chunk), max_num_seqs=min(16, plan.chunk),
                        max_num_batched_tokens=plan.chunk)  # fmt: skip
            if plan.texts:
                documents = Tasks(llm.get_tokenizer(), texts).documents(plan.texts, plan.prompt).tolist()
                found = torch.tensor(_generate(llm, documents, [plan.generated] * plan.texts))
                exact = found if exact is None else exact
                settings = chosen(plan, "texts", "prompt", "generated", "chunk")
                records.add(new_record(path, dtype, llm, "greedy", settings), measures.agreement(found, exact))
            for answers in quiz.ANSWERS if plan.quizzes else ():
                values = [_answer(llm, seed, answers, plan) for seed in range(plan.quizzes)]
                settings = {k: getattr(plan, k) for k in ("quizzes", "items", "examples", "chunk")}
                settings["answers"] = answers
                records.add(new_record(path, dtype, llm, "quiz", settings), values)
            stop(llm)
            del llm
            bar.advance(task_bar)


def _generate(llm, prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
    """Exactly so many greedy tokens after each prompt."""
    from vllm import SamplingParams

    sampling = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in tokens]
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in out]


def _answer(llm, seed: int, answers: str, plan: Generation) -> list[int]:
    """1 for every question whose whole answer is generated, else 0."""
    made = quiz.make(llm.get_tokenizer(), seed, answers, plan.examples, plan.items)
    _generate(llm, [made.examples], [1])  # alone, so that all questions hit
    given = _generate(llm, [made.examples + q for q, _ in made.items], [len(a) for _, a in made.items])
    return [int(answer == right) for answer, (_, right) in zip(given, made.items, strict=True)]


def measure_served(
    models: list[str], dtypes: list[str], forms: list[str], plan: Plan, texts: list[str], records: Records, bar
) -> None:
    """Recall by greedy generation with vLLM's own chunking, batching and prefix caching.

    A document's questions follow each other at its end, so that each prompt extends the one before.
    """
    from vllm import SamplingParams

    dtypes = with_auto(dtypes)
    for path in models:
        task_bar = bar.add_task(Path(path).name, total=len(dtypes) * len(forms) * plan.seeds)
        for dtype in dtypes:
            llm = start(path, dtype, plan, max_num_seqs=8)
            tasks = Tasks(llm.get_tokenizer(), texts)
            for task in forms:
                values = []
                for seed in range(plan.seeds):
                    bar.update(task_bar, description=f"{Path(path).name} served by vLLM: {dtype}, {task}", advance=1)
                    tokens, questions = tasks.recall(seed, plan.length, task)
                    prompts = [{"prompt_token_ids": tokens[: q.begin].tolist()} for q in questions]
                    sampling = [
                        SamplingParams(max_tokens=q.end - q.begin, temperature=0, ignore_eos=True) for q in questions
                    ]
                    answers = llm.generate(prompts, sampling, use_tqdm=False)
                    values.append(
                        {
                            f"{q.depth:g}": int(list(a.outputs[0].token_ids) == tokens[q.begin : q.end].tolist())
                            for q, a in zip(questions, answers, strict=True)
                        }
                    )
                settings = chosen(plan, "length", "seeds") | {"task": task, "served": True}
                records.add(new_record(path, dtype, llm, "recall", settings), values)
            stop(llm)
            del llm
