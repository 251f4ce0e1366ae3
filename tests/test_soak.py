# SPDX-License-Identifier: Apache-2.0
"""A small soak of ``benchmarks/soak.py``, and whether it would notice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", FILE)
    module = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXPECTED = [[7, {"7": -0.1, "3": -2.0}], [9, {"9": -0.5, "4": -0.5004}], [5, {"5": -0.2, "1": -3.0}]]


@pytest.mark.parametrize(
    "tokens, is_wrong",
    [
        ([7, 9, 5], False),
        ([7], False),  # aborted
        ([7, 4, 2], False),  # a tie, after which nothing can be compared
        ([3, 9, 5], True),
        ([7, 9, 8], True),  # not even among the best
    ],
)
def test_a_wrong_token_is_noticed(soak, tokens, is_wrong):
    assert soak.wrong(EXPECTED, tokens) == is_wrong


def test_what_went_wrong_or_was_not_tried_is_named(soak):
    tried = dict.fromkeys(
        ("aborted", "resets", "num_preemptions", "prefix_cache_hits", "external_prefix_cache_hits"), 1
    )
    fine = {"wrong": 0, "unfinished": 0, "leaked_blocks": 0, "leaked_requests": 0, "resident_mib": [900, 910]}
    fine |= tried | {"drafts": False, "offload": True, "auto_growth_mib": 8}
    assert soak.problems(fine) == []
    for name in ("wrong", "unfinished", "leaked_blocks", "leaked_requests"):
        assert soak.problems(fine | {name: 2}) == [f"2 {name}"]
    for name in tried:
        assert soak.problems(fine | {name: 0}) == [f"no {name}"]
    assert soak.problems(fine | {"resident_mib": [900, 950]}) == ["resident memory grew by 50 MiB, with auto by 8"]
    assert soak.problems(fine | {"drafts": True, "spec_decode_num_accepted_tokens": 0})


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_requests(soak):
    """With drafts, and with offloading; the whole soak is a benchmark."""
    for result in soak.run(300, seed=1, cases=[(True, False), (False, True)]):
        assert soak.problems(result) == [], result
