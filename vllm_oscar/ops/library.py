# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the native libraries, and refuses one that other sources made.

Both export ``oscar_source_hash()``: the hash of the files that they were compiled from. In a checkout it is
compared with the files that lie there now, in an installed package with the hash that was written beside the
library when both were packed. ``setup.py`` runs this file by its path, to have the one definition of the hash: it
must import nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = PACKAGE / "lib"
CHECKOUT = PACKAGE.parent
SOURCES = {
    "cpu": ("csrc/cpu", "csrc/include/oscar/abi.h", "csrc/include/oscar/step.h"),
    "cuda": ("csrc/cuda", "csrc/include"),
}
"""Files, and folders with all that lies in them."""
SUFFIXES = (".h", ".inc", ".cpp", ".cuh", ".cu")
COMPILERS = {"cpu": "a C++ compiler", "cuda": "nvcc"}


class NativeLibraryError(RuntimeError):
    """A native library cannot be used: one sentence with the reason and the command that helps."""


def source_files(kind: str, root: Path = CHECKOUT) -> list[Path]:
    """The files below ``root`` that the library ``kind`` is made of, sorted; empty outside of a checkout."""
    if not (root / "setup.py").exists():
        return []
    places = [root / place for place in SOURCES[kind]]
    found = [path for place in places for path in (place, *place.rglob("*")) if path.suffix in SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def source_hash(kind: str, root: Path = CHECKOUT) -> str:
    """16 hexadecimal digits for names and contents of :func:`source_files`."""
    digest = hashlib.sha256()
    for path in source_files(kind, root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def library_path(kind: str) -> Path:
    return FOLDER / f"oscar_{kind}.so"


def hash_path(kind: str) -> Path:
    """Where an installed package has the hash of the sources of its library."""
    return FOLDER / f"oscar_{kind}.sources"


def how_to_build(kind: str) -> str:
    """The command that makes the library, to end a sentence with."""
    if source_files(kind):
        return f"with {COMPILERS[kind]}, run `OSCAR_NATIVE={kind} pip install --no-deps -e .` in {CHECKOUT}"
    return (
        "install vllm-oscar's wheel, which holds it, "
        f"or, with {COMPILERS[kind]}, run `OSCAR_NATIVE={kind} pip install --no-deps .` in its source folder"
    )


def _expected_hash(kind: str) -> str:
    if source_files(kind):
        return source_hash(kind)
    try:
        return hash_path(kind).read_text().strip()
    except FileNotFoundError:
        return "none"


def load(kind: str, path: Path | None = None) -> ctypes.CDLL:
    """The library ``kind`` ("cpu" or "cuda") of this package, or another one at ``path``, to compare or examine it.

    Raises :class:`NativeLibraryError` if it is missing, does not load, or, being the package's, is stale.
    """
    import torch  # noqa: F401  the CPU library links no OpenMP runtime: it uses the one that torch has loaded

    path = path or library_path(kind)
    if not path.exists():
        raise NativeLibraryError(f"the {kind} library {path} was not built; {how_to_build(kind)}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"the {kind} library cannot be loaded ({error}); {how_to_build(kind)}") from error
    try:
        library.oscar_source_hash.restype = ctypes.c_char_p
        found = library.oscar_source_hash().decode()
    except AttributeError:
        found = "none"
    expected = _expected_hash(kind)
    if found != expected and path == library_path(kind):
        raise NativeLibraryError(
            f"the {kind} library {path} is stale: it was made from other sources ({found}) than this package's "
            f"({expected}); {how_to_build(kind)}"
        )
    return library
