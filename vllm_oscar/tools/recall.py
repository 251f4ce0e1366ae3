# SPDX-License-Identifier: Apache-2.0
"""A prompt with facts to recall from far back: the demo and the GPU check ask the demo model for them."""

from __future__ import annotations

import argparse
import inspect

FACTS = {
    "calm-otter-17": "8302914",
    "brave-lamp-42": "5519073",
    "quick-river-88": "2746610",
    "tiny-hawk-35": "9913487",
}


def long_prompt(lines: int) -> str:
    """``lines`` lines of real source code with the facts spread over their first half."""
    body, step = [], lines // (2 * len(FACTS))
    for index, line in enumerate(inspect.getsource(argparse).split("\n")):
        if index % step == 0 and index // step < len(FACTS):
            name = list(FACTS)[index // step]
            body.append(f"\nRemember: the code of {name} is {FACTS[name]}.\n")
        body.append(line)
        if index >= lines:
            break
    return "\n".join(body)


def question(prompt: str, name: str) -> str:
    """``prompt``, then what the model is to complete."""
    return f"{prompt}\nThe code of {name} is"
