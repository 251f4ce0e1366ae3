# SPDX-License-Identifier: Apache-2.0
"""A task that a person understands: sort a word into its kind, after many solved examples.

A prompt is some pages of examples and a question of the same form; the word asked for is in none of
the examples. Chance is one in six. The answer is the name of the kind, of which a model that knows
English needs few examples, or a colour that stands for the kind in the examples alone::

    trout: animal        trout: red
    saw: tool            saw: black
    ...                  ...
    plum:                plum:
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

KINDS = {
    "animal": "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse rat frog snake duck goose hen "
    "eagle owl whale shark trout salmon camel deer donkey monkey elephant",
    "fruit": "apple pear plum cherry grape lemon orange banana peach mango melon fig date kiwi lime apricot papaya "
    "raspberry strawberry blueberry",
    "city": "Paris London Berlin Madrid Rome Vienna Oslo Dublin Athens Cairo Tokyo Sydney Boston Chicago Dallas "
    "Denver Miami Seattle Toronto Moscow",
    "job": "teacher doctor baker farmer lawyer nurse painter pilot singer writer driver dentist soldier judge "
    "tailor plumber engineer chef actor butcher",
    "tool": "hammer saw drill wrench pliers screwdriver axe shovel chisel spade rake ladder anvil crowbar sickle "
    "scissors file clamp hoe trowel",
    "clothing": "shirt coat hat sock shoe glove scarf dress skirt jacket sweater belt boot tie vest jeans blouse cap "
    "sandal robe",
}

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
"""Another name for each kind, in the order of ``KINDS``."""

ANSWERS = {"kinds": dict(zip(KINDS, KINDS, strict=True)), "colours": dict(zip(KINDS, COLOURS, strict=True))}


@dataclass(frozen=True)
class Quiz:
    """``examples``: token ids, the beginning of every prompt. ``items``: question and answer, as token ids."""

    examples: list[int]
    items: list[tuple[list[int], list[int]]]


def make(tokenizer, seed: int, answers: str, length: int, items: int) -> Quiz:
    """A quiz whose examples take ``length`` tokens exactly, filled up with empty lines at the beginning.

    ``answers``: which of ``ANSWERS``; the words are the same.
    """
    rng = random.Random(f"quiz {seed}")
    words = [(word, ANSWERS[answers][kind]) for kind in KINDS for word in KINDS[kind].split()]
    rng.shuffle(words)
    asked, shown = words[: len(words) // 2], words[len(words) // 2 :]
    if items > len(asked):
        raise ValueError(f"a quiz has at most {len(asked)} questions, not {items}; make more of them")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    lines: list[int] = []
    while True:
        word, answer = rng.choice(shown)
        line = encode(f"{word}: {answer}\n")
        if len(start) + len(lines) + len(line) > length:
            break
        lines += line
    (empty,) = encode("\n")
    examples = start + [empty] * (length - len(start) - len(lines)) + lines
    return Quiz(examples, [(encode(f"{word}:"), encode(f" {answer}")) for word, answer in asked[:items]])


def difference(own: list[int], reference: list[int]) -> tuple[float, float, int, int]:
    """Of right (1) and wrong (0) answers to the same questions: the difference in points, its standard
    error, and how many answers were lost and won (McNemar's two counts)."""
    lost = sum(r > o for o, r in zip(own, reference, strict=True))
    won = sum(r < o for o, r in zip(own, reference, strict=True))
    n = len(own)
    return 100 * (won - lost) / n, 100 * math.sqrt(lost + won - (won - lost) ** 2 / n) / n, lost, won
