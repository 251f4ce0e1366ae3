# SPDX-License-Identifier: Apache-2.0
"""Builds the optional native libraries; all metadata is in pyproject.toml.

Both are plain shared libraries with a C ABI, loaded with ctypes, so that one binary
serves every torch version. A missing compiler is not an error: the package then
falls back to Triton (GPU) or to the PyTorch reference (CPU) and says so once.

``pip install .`` or ``python setup.py build_ext --inplace`` builds; ``OSCAR_NATIVE`` in
{"auto", "cpu", "cuda", "none"} chooses what to build, "auto" being all that can be.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CHOICE = os.environ.get("OSCAR_NATIVE", "auto")


# Extra flags of the x86 translation units; all others are compiled for the baseline machine.
X86_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
        *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC bug 105593
    ],
    "multiply_avx512_bf16": ["-mavx512f", "-mavx512bf16"],
    "multiply_amx": ["-mamx-tile", "-mamx-bf16"],
}


def accepts(compiler: str, flags: list[str]) -> bool:
    command = [compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def cpu_commands(build: Path, output: Path) -> list[list[str]]:
    """Compile every csrc/cpu/*.cpp for its instruction set and link one library.

    ``OSCAR_CPU_CXXFLAGS`` is added to every command, e.g. for a sanitizer build.
    """
    compiler = os.environ.get("CXX", "g++")
    extra = os.environ.get("OSCAR_CPU_CXXFLAGS", "").split()
    common = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    common.append(f"-I{ROOT / 'csrc' / 'include'}")
    flags = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {}
    commands, objects = [], []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        target = build / (source.stem + ".o")
        isa = flags.get(source.stem, [])
        if source.stem.startswith("multiply") and not accepts(compiler, isa):
            isa = []  # an older compiler: the library does without
        commands.append([compiler, *common, *isa, *extra, "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    return [*commands, [compiler, "-shared", "-fopenmp", *extra, *objects, "-o", str(output)]]


def cuda_commands(build: Path, output: Path) -> list[list[str]]:
    """One nvcc call for every csrc/cuda/*.cu; architectures from ``OSCAR_CUDA_ARCHS``."""
    archs = os.environ.get("OSCAR_CUDA_ARCHS", "80 90a 100a 120").split()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    sources = [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    flags = ["-O3", "-std=c++17", "--shared", "-Xcompiler=-fPIC", "-cudart=static", "--threads=0"]
    return [["nvcc", *flags, *targets, f"-I{ROOT / 'csrc' / 'include'}", *sources, "-o", str(output)]]


LIBRARIES = {
    "cpu": (lambda: shutil.which(os.environ.get("CXX", "g++")), cpu_commands),
    "cuda": (lambda: shutil.which("nvcc"), cuda_commands),
}


class BuildNative(build_ext):
    """Run the commands of each library; report, but survive, a failed build."""

    def build_extension(self, ext: Extension) -> None:
        kind = ext.name.rsplit("_", 1)[1]
        find_compiler, commands = LIBRARIES[kind]
        wanted = CHOICE == kind
        if not find_compiler():
            if wanted:
                raise SystemExit(f"OSCAR_NATIVE={kind}, but its compiler was not found")
            self.announce(f"vllm-oscar: no compiler for the {kind} library, skipping it", level=3)
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / kind
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            for command in commands(build, output):
                subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            if wanted:
                raise SystemExit(f"building the {kind} library failed: {error}") from error
            self.announce(f"vllm-oscar: building the {kind} library failed, continuing without it", level=3)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # setuptools does not make the folder
            (ROOT / Path(*ext.name.split(".")[:-1])).mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


def wanted_extensions() -> list[Extension]:
    if CHOICE not in ("auto", "none", *LIBRARIES):
        raise SystemExit(f"OSCAR_NATIVE={CHOICE} is unknown; use auto, none or one of: {', '.join(LIBRARIES)}")
    kinds = {"auto": ["cpu", "cuda"], "none": []}.get(CHOICE, [CHOICE])
    return [Extension(f"vllm_oscar.lib.oscar_{kind}", [], optional=True) for kind in kinds]


setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": BuildNative})
