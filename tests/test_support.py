# SPDX-License-Identifier: Apache-2.0
"""The table of features says what ``checks.py`` refuses, names tests that exist, and is the README's."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_oscar.engine import support
from vllm_oscar.engine.support import ABSENT, FEATURES, REFUSED, TESTED, TRIED, UNRUN
from vllm_oscar.tools import cli

REPO = Path(__file__).resolve().parent.parent


def _text(node) -> str | None:
    """A string as it stands in the source, ``{}`` for what is filled in; None if it comes from elsewhere."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (_text(node.left) or "{}") + (_text(node.right) or "{}")
    if isinstance(node, ast.BoolOp):
        return _text(node.values[-1])
    return None


def refusals() -> set[str]:
    """What ``checks.py`` may refuse: the second argument of ``_refuse``, and the tables that it is taken from."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse((REPO / "vllm_oscar/engine/checks.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_refuse":
            found.add(_text(node.args[1]))
        tuples = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "")
        if tuples == "refusals":
            found |= {_text(entry.elts[0]) for entry in node.value.elts}
        if tuples in ("_REASONS", "_OTHER_CONNECTORS"):
            values = [getattr(value, "elts", [value])[0] for value in node.value.values]
            found |= {_text(value) for value in values}
        if tuples == "_PREFIX_LM":
            found.add(_text(node.value.elts[0]))
    return {text for text in found if text}


def test_every_refusal_has_a_row_and_every_row_its_refusals():
    known = refusals()
    assert len(known) > 30
    claimed = [start for feature in FEATURES for start in feature.refusals]
    assert Counter(claimed).most_common(1)[0][1] == 1
    for text in known:
        assert any(text.startswith(start) for start in claimed), f"no row refuses {text!r}"
    for start in claimed:
        assert any(text.startswith(start) for text in known), f"checks.py does not refuse {start!r}"
    for feature in FEATURES:
        assert REFUSED not in (feature.cpu, feature.gpu) or feature.refusals, feature.name


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_what_is_tested_names_its_test(feature):
    assert feature.cpu in (TESTED, UNRUN, REFUSED, ABSENT) and feature.gpu in (TRIED, UNRUN, REFUSED, ABSENT)
    assert not feature.note or (feature.note.endswith(".") and feature.note.count(". ") == 0)
    assert bool(feature.test) == (feature.cpu == TESTED)
    if feature.test:
        file, name = feature.test.split("::")
        tree = ast.parse((REPO / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_names_are_unique():
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)


def test_the_readme_has_this_table():
    """If not: ``vllm-oscar features --markdown`` prints it."""
    readme = (REPO / "README.md").read_text()
    block = readme.split("<!-- support:begin -->")[1].split("<!-- support:end -->")[0]
    assert support.markdown() in block


def test_the_command(monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=250))
    result = CliRunner().invoke(cli.app, ["features", "--markdown"])
    assert result.exit_code == 0 and result.stdout.strip() == support.markdown()
    result = CliRunner().invoke(cli.app, ["features"])
    assert result.exit_code == 0
    for feature in FEATURES:
        (line,) = [line for line in result.stdout.splitlines() if f" {feature.name.replace('`', '')}  " in line]
        assert feature.cpu in line and feature.gpu in line
