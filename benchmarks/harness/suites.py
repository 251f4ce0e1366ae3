# SPDX-License-Identifier: Apache-2.0
"""The suites as lm-eval tasks. With a data folder they read the suite's own files and no network.

==============  =================================================================
gsm8k           ``test.jsonl`` and, for few-shot prompts, ``train.jsonl``
                (github.com/openai/grade-school-math)
longbench_e     ``qasper_e.jsonl`` and so on (LongBench's ``data.zip``); those present run
ruler           ``<task>/validation.jsonl`` as written by NVIDIA/RULER's ``prepare.py``
needle          any folder of ``.txt``, ``.md``, ``.rst`` or ``.py`` files: facts are put into it
==============  =================================================================

Without a folder gsm8k, longbench_e and ruler are lm-eval's own tasks, which download their data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean

Row = dict
Task = str | dict
NEEDLE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class NoLossSeen(ValueError):
    """The scores of a task would be those of an unquantized cache."""


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _dataset(**splits: list[Row]) -> Callable:
    """What lm-eval calls instead of downloading."""

    def load(**_):
        from datasets import Dataset

        return {name: Dataset.from_list(rows) for name, rows in splits.items()}

    return load


def _changed(group: str, tasks: list[dict]) -> list[Task]:
    """lm-eval's own tasks with other data: only members of a group inherit a registered task."""
    return [{"group": group, "task": tasks}] if tasks else []


def gsm8k(data: Path | None) -> list[Task]:
    if data is None:
        return ["gsm8k"]
    train = data / "train.jsonl"
    splits = {"test": _rows(data / "test.jsonl")} | ({"train": _rows(train)} if train.exists() else {})
    task = {"task": "gsm8k", "custom_dataset": _dataset(**splits)}
    if not train.exists():
        task |= {"num_fewshot": 0, "training_split": None, "fewshot_split": None}
    return _changed("gsm8k_local", [task])


def longbench_e(data: Path | None) -> list[Task]:
    if data is None:
        return ["longbench_e"]
    tasks = []
    for path in sorted(data.glob("*_e.jsonl")):
        rows = [row | {"question": row.get("question", row.get("input", ""))} for row in _rows(path)]
        tasks.append({"task": f"longbench_{path.stem}", "custom_dataset": _dataset(test=rows)})
    return _changed("longbench_e_local", tasks)


def found_all(doc: Row, results: list[str]) -> dict[str, float]:
    """RULER's metric: the fraction of the references that the answer holds."""
    return {"found": mean(reference.lower() in results[0].lower() for reference in doc["outputs"])}


def _retrieval(name: str, rows: list[Row], tokens: int) -> Task:
    return {
        "task": name,
        "custom_dataset": _dataset(test=rows),
        "dataset_path": "",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "process_results": found_all,
        "metric_list": [{"metric": "found", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"do_sample": False, "temperature": 0.0, "max_gen_toks": tokens, "until": ["\n\n"]},
    }


def ruler(data: Path | None) -> list[Task]:
    if data is None:
        return ["ruler"]
    paths = sorted(data.glob("**/validation.jsonl"))
    return [_retrieval(f"ruler_{path.parent.name}", _rows(path), 128) for path in paths]


def needle(data: Path | None, tokenizer, lengths: list[int], samples: int, seed: int = 0) -> list[Task]:
    """A fact at every depth of texts of every length, one task for each pair."""
    if data is None:
        raise ValueError("the needle suite needs --data: a folder of text files")
    paths = sorted(p for p in data.rglob("*") if p.suffix in (".txt", ".md", ".py", ".rst"))
    text = "\n".join(p.read_text("utf-8", errors="ignore") for p in paths)
    if not text:
        raise ValueError(f"no .txt, .md, .py or .rst files in {data}")
    tasks = []
    for length in lengths:
        for depth in NEEDLE_DEPTHS:
            rng = random.Random(f"{seed}/{length}/{depth}")
            rows = [needle_document(text, tokenizer, length, depth, rng) for _ in range(samples)]
            tasks.append(_retrieval(f"needle_{length}_{round(100 * depth)}", rows, 16))
    return tasks


def needle_document(text: str, tokenizer, length: int, depth: float, rng: random.Random) -> Row:
    """A prompt of about ``length`` tokens: text, the fact at ``depth``, the question."""
    first, second = rng.choice(("calm", "brave", "quick", "silver")), rng.choice(("otter", "falcon", "badger"))
    name = f"{first}-{second}-{rng.randrange(100)}"
    code = str(rng.randrange(10_000, 10_000_000))
    fact, question = f"\nRemember: the code of {name} is {code}.\n", f"\nThe code of {name} is"
    room = length - len(tokenizer(fact + question).input_ids)
    start = rng.randrange(max(1, len(text) - 8 * room))
    ids = tokenizer(text[start : start + 8 * room], add_special_tokens=False, verbose=False).input_ids[:room]
    cut = round(depth * len(ids))
    return {"input": tokenizer.decode(ids[:cut]) + fact + tokenizer.decode(ids[cut:]) + question, "outputs": [code]}
