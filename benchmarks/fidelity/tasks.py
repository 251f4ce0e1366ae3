# SPDX-License-Identifier: Apache-2.0
"""What models are measured on: documents of real text, and recall tasks put into it.

The recall tasks are those that ``examples/train_demo_model.py`` trains its models on. Text
is the source code and documentation of the running Python (or any folder given), of
which only the files that training holds out are used; for models that know English, it may
be the Python reference manual.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
FORMS = {"needle": ("sentence", "lookup"), "multi-key": ("multi",), "variables": ("variable1", "variable2")}
"""Task to the generator's forms: one fact, several facts in one question, assignments to follow."""

_SUFFIXES = (".py", ".md", ".rst", ".txt")


@lru_cache(maxsize=1)
def _trainer():
    """The training script as a module: it owns the generators."""
    path = Path(__file__).parents[2] / "examples" / "train_demo_model.py"
    spec = importlib.util.spec_from_file_location("train_demo_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _held_out(text: str) -> bool:
    """The training script's choice, by hash: about one file in fifty."""
    digest = hashlib.sha1(text.encode()).digest()
    return digest[0] * 256 + digest[1] < 65536 // 50


MANUAL = Path("manual")
"""In place of a folder: the sections of the Python reference manual that every Python carries."""


def manual() -> list[str]:
    """English prose, 465,000 characters in Python 3.11, in a fixed order."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def read_texts(folders: list[Path] | None, characters: int = 1_000_000) -> list[str]:
    """Held-out files of ``folders`` (default: the running Python's library), in a fixed order.

    A folder of the user's own text is taken whole. ``[MANUAL]``: see there.
    """
    if folders == [MANUAL]:
        return manual()
    roots = folders or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    paths = sorted({Path(at, name) for root in roots for at, _, names in os.walk(root) for name in names
                    if name.endswith(_SUFFIXES)})
    random.Random(0).shuffle(paths)
    texts, seen = [], set()
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        long_lines = len(text) / (text.count("\n") + 1) >= 120
        if len(text) <= 200 or text in seen or not folders and (long_lines or not _held_out(text[:200_000])):
            continue
        seen.add(text)
        texts.append(text[:200_000])
        characters -= len(texts[-1])
        if characters <= 0:
            break
    return texts


@dataclass(frozen=True)
class Question:
    """One answer inside a recall document: tokens ``begin .. end - 1`` are to be predicted."""

    task: str
    depth: float
    begin: int
    end: int


class Tasks:
    """Documents and recall tasks for one tokenizer."""

    def __init__(self, tokenizer, texts: list[str]):
        self.tokenizer = tokenizer
        ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
        eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.stream = np.array([token for document in ids for token in document + eos], np.int64)
        self.bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self._generator = self._make_generator()

    def documents(self, count: int, length: int) -> torch.Tensor:
        """``[count, length]`` consecutive stretches of text, each after a BOS."""
        room = length - len(self.bos)
        if count * room > len(self.stream):
            raise ValueError(f"{count} documents of {length} tokens do not fit {len(self.stream)} tokens of text")
        rows = self.stream[: count * room].reshape(count, room)
        return torch.from_numpy(np.concatenate([np.tile(self.bos, (count, 1)).astype(np.int64), rows], 1))

    def recall(self, seed: int, length: int, task: str) -> tuple[torch.Tensor, list[Question]]:
        """A document of ``length`` tokens: a fact at every depth, all questions at its end."""
        rng = random.Random(f"{seed}/{length}/{task}")
        placed, asked, used = [], [], []
        for depth in DEPTHS:
            states, ask = self._generator.item(rng, rng.choice(FORMS[task]), used)
            spread = [depth, *(rng.uniform(depth, 0.97) for _ in states[1:])]
            placed += zip(sorted(spread), states, strict=True)
            asked.append((depth, ask()))
        rng.shuffle(asked)
        placed += [(1.0 + i * 1e-6, piece) for i, (_, piece) in enumerate(asked)]
        tokens, _ = self._generator.assemble(rng, length - 1 - len(self.bos), placed, bos=False)
        tokens = np.concatenate([np.array(self.bos, np.int64), tokens])
        questions, end = [], len(tokens)
        for depth, (piece, mask) in reversed(asked):
            answer = np.flatnonzero(mask)
            begin = end - len(piece)
            questions.append(Question(task, depth, begin + int(answer[0]), begin + int(answer[-1]) + 1))
            end = begin
        return torch.from_numpy(tokens), questions[::-1]

    def _make_generator(self):
        """The trainer's generator on any Hugging Face tokenizer."""
        base, outer = _trainer().Tasks, self

        class Generator(base):
            def __init__(self):
                self.stream, self.mix = outer.stream, (1,) * len(_trainer().FORMS)
                pieces = outer.tokenizer.convert_ids_to_tokens(range(len(outer.tokenizer)))
                self.ends_line = np.array([(piece or "").endswith(("Ċ", "\n")) for piece in pieces])

            def piece(self, question, answer=""):
                """Tokens and a mask of the answer, whose closing line end is no part of it."""
                parts = [outer.tokenizer(t, add_special_tokens=False).input_ids if t else []
                         for t in (question, answer, answer.rstrip("\n."))]
                mask = np.zeros(len(parts[0]) + len(parts[1]), np.uint8)
                mask[len(parts[0]) : len(parts[0]) + len(parts[2])] = 1
                return np.array(parts[0] + parts[1], np.int64), mask

        return Generator()
