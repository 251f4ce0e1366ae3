# SPDX-License-Identifier: Apache-2.0
"""Record a run of every test that needs no GPU: a row in docs/tests.md.

    make test-all; .venv/bin/python tests/record.py
"""

from __future__ import annotations

import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
REPORT = REPO / "build" / "test-all.xml"  # where the Makefile has pytest write it
TABLE = REPO / "docs" / "tests.md"


def outcomes(report: Path) -> dict:
    """Of pytest's JUnit XML: how many ``passed`` and were ``skipped``, and the names of those that ``failed``."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {"passed": len(cases) - len(failed) - len(skipped), "failed": names, "skipped": len(skipped)}


def row(report: Path, commit: str, device: str) -> str:
    """A row of the table, with the CPU instruction sets that ran."""
    from vllm_oscar.ops.cpu import ISAS

    found, document = outcomes(report), ElementTree.parse(report)
    seconds = sum(float(suite.get("time")) for suite in document.iter("testsuite"))
    ran = {entry.get("value") for entry in document.iter("property") if entry.get("name") == "isa"}
    isas = [isa for isa in ISAS if isa in ran]  # tests of refusals name others
    counts = f"{found['passed']} | {', '.join(found['failed']) or 'none'} | {found['skipped']} | {seconds / 60:.0f}"
    return f"| {time.strftime('%Y-%m-%d')} | {commit} | {counts} | {device}: {', '.join(isas)} |"


def main() -> None:
    from vllm_oscar.tools.bench.scrape import commit, device

    if not REPORT.exists():
        sys.exit(f"{REPORT} is missing; run `make test-all` first")
    with TABLE.open("a") as table:
        print(row(REPORT, commit(), device()), file=table)


if __name__ == "__main__":
    main()
