# SPDX-License-Identifier: Apache-2.0
"""Builds the optional native libraries; all metadata is in pyproject.toml.

Both are plain shared libraries with a C ABI, loaded with ctypes: one binary serves every Python and every torch.
``pip install .`` builds; ``OSCAR_NATIVE`` says what:

- ``auto``, the default: every library whose compiler is found. The package works without them, more slowly (Triton
  on a GPU, PyTorch on a CPU), and says so; but a compiler that is found and fails makes the installation fail.
- ``cpu``, ``cuda`` or ``cpu,cuda``: these, or fail.
- ``none``: nothing.

``CXX`` names the C++ compiler; nvcc is looked for on ``PATH``, then in ``CUDA_HOME`` and ``CUDA_PATH``.
``OSCAR_CUDA_ARCHS`` replaces the GPU architectures and ``OSCAR_CPU_CXXFLAGS`` adds flags to the C++ compiler's.
"""

import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = runpy.run_path(str(ROOT / "vllm_oscar" / "ops" / "library.py"))  # by path: importing it needs torch

# Machine code runs on later minor versions, too: sm_80 on 8.6 and 8.9, sm_100 on 10.3, sm_120 on 12.1.
ARCHS = ("80", "90a", "100", "120")

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


def find_cxx() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def find_nvcc() -> str | None:
    roots = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places = [None, *(os.path.join(root, "bin") for root in roots if root)]  # None: PATH
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def accepts(compiler: str, *flags: str) -> bool:
    """Whether the compiler knows these flags."""
    return subprocess.run([compiler, *flags], capture_output=True).returncode == 0


def source_hash_flag(kind: str) -> str:
    return f'-DOSCAR_SOURCE_HASH="{LIBRARY["source_hash"](kind, ROOT)}"'


def cpu_commands(build: Path, output: Path) -> list[list[str]]:
    """Compile every csrc/cpu/*.cpp for its instruction set and link one library.

    It is linked without an OpenMP runtime: torch has loaded one, and two would each start their threads.
    """
    compiler = os.environ.get("CXX", "g++")
    extra = os.environ.get("OSCAR_CPU_CXXFLAGS", "").split()
    common = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    common.append(f"-I{ROOT / 'csrc' / 'include'}")
    common.append(source_hash_flag("cpu"))
    flags = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {}
    commands, objects = [], []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        target = build / (source.stem + ".o")
        isa = flags.get(source.stem, [])
        if source.stem.startswith("multiply") and not accepts(compiler, *isa, "-x", "c++", "-fsyntax-only", os.devnull):
            isa = []  # an older compiler: the library does without
        commands.append([compiler, *common, *isa, *extra, "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    return [*commands, [compiler, "-shared", *extra, *objects, "-o", str(output)]]


def cuda_targets(nvcc: str) -> list[str]:
    """nvcc's flags for each of :data:`ARCHS` that it knows, and PTX of the newest, which later GPUs compile."""
    chosen = os.environ.get("OSCAR_CUDA_ARCHS")
    if chosen:
        return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen.split()]
    targets = {arch: f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS}
    known = [arch for arch in ARCHS if accepts(nvcc, "--dryrun", targets[arch], "-x", "cu", "-c", os.devnull)]
    if not known:
        raise SystemExit(
            f"{nvcc} knows none of the GPU architectures {', '.join(ARCHS)}; install CUDA 12 or newer, or leave the "
            "CUDA library out with OSCAR_NATIVE=cpu"
        )
    newest = known[-1].rstrip("a")  # PTX of an "a" architecture would run on no other
    return [*(targets[arch] for arch in known), f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_commands(build: Path, output: Path) -> list[list[str]]:
    """One nvcc call for every csrc/cuda/*.cu."""
    nvcc = find_nvcc()
    sources = [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    flags = ["-O3", "-std=c++17", "--shared", "-Xcompiler=-fPIC", "-cudart=static", "--threads=0"]
    flags += [source_hash_flag("cuda"), f"-I{ROOT / 'csrc' / 'include'}"]
    return [[nvcc, *flags, *cuda_targets(nvcc), *sources, "-o", str(output)]]


LIBRARIES = {"cpu": (find_cxx, cpu_commands), "cuda": (find_nvcc, cuda_commands)}


def wanted_extensions() -> list[Extension]:
    """The libraries that ``OSCAR_NATIVE`` asks for."""
    choice = os.environ.get("OSCAR_NATIVE", "auto")
    kinds = {"auto": list(LIBRARIES), "none": []}.get(choice, choice.split(","))
    unknown = set(kinds) - set(LIBRARIES)
    if unknown:
        raise SystemExit(f"OSCAR_NATIVE={choice} is unknown; use auto, none, cpu, cuda or cpu,cuda")
    missing = [kind for kind in kinds if not LIBRARIES[kind][0]()]
    for kind in missing:
        sentence = f"the {kind} library needs {LIBRARY['COMPILERS'][kind]}, which was not found"
        if choice != "auto":
            raise SystemExit(f"OSCAR_NATIVE={choice}, but {sentence}; install it, or set OSCAR_NATIVE=none")
        print(f"vllm-oscar: {sentence}: installing without it")
    return [Extension(f"vllm_oscar.lib.oscar_{kind}", []) for kind in kinds if kind not in missing]


class BuildNative(build_ext):
    """Run the commands of each library, and write the hash of its sources beside it."""

    def run(self) -> None:
        # Whatever an earlier build left in the build folder would be packed, too.
        shutil.rmtree(Path(self.build_lib, "vllm_oscar", "lib"), ignore_errors=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        kind = ext.name.rsplit("_", 1)[1]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / kind
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        for command in LIBRARIES[kind][1](build, output):
            self.announce(" ".join(command), level=2)
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "strerror", None) or f"exit code {error.returncode}, its messages are above"
                raise SystemExit(
                    f"vllm-oscar: building the {kind} library failed: {command[0]} ({reason}); mend the compiler, or "
                    "install without this library by OSCAR_NATIVE=cpu, cuda or none"
                ) from error
        output.with_suffix(".sources").write_text(LIBRARY["source_hash"](kind, ROOT) + "\n")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # setuptools does not make the folder
            (ROOT / Path(*ext.name.split(".")[:-1])).mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PackNative(bdist_wheel):
    """A wheel with libraries fits any Python of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": PackNative})
