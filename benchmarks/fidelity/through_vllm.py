# SPDX-License-Identifier: Apache-2.0
"""The same measures through vLLM, so that the numbers are those that users get.

Prompts are prefilled in small chunks, so that every chunk reads the history from the
quantized cache. A hook on the model keeps the last hidden states; divergence, loss and
recall are then computed from them as for transformers models.
"""

from __future__ import annotations

import gc
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vllm_oscar.core.config import PRESETS

from . import measures, methods
from .records import Records
from .tasks import Tasks


@dataclass(frozen=True)
class Plan:
    documents: int
    length: int
    seeds: int
    chunk: int


def start(path: str, dtype: str, plan: Plan, **options):
    """A vLLM engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(path, dtype="bfloat16", kv_cache_dtype=dtype, max_model_len=plan.length + 128, enforce_eager=True,
               kv_cache_memory_bytes=1 << 30, seed=0, **options)  # fmt: skip


def stop(llm) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def new_record(path: str, dtype: str, llm, measure: str, settings: dict) -> dict:
    """``dtype``: a KV-cache dtype of vLLM's or a preset."""
    method = methods.registry()[dtype] if dtype in PRESETS else None
    head_dim = llm.llm_engine.vllm_config.model_config.get_head_size()
    record = Records.new(Path(path).name, method, head_dim, f"{measure} through vLLM", settings)
    return record if method else record | {"method": dtype}


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
                records.add(new_record(path, dtype, engine.llm, measure, asdict(plan) | extra), values)
            engine.close()
            bar.advance(task_bar)


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
                settings = {"length": plan.length, "seeds": plan.seeds, "task": task, "served": True}
                records.add(new_record(path, dtype, llm, "recall", settings), values)
            stop(llm)
            del llm
