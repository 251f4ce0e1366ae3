# SPDX-License-Identifier: Apache-2.0
"""Does a vLLM source tree have everything that the plugin patches, subclasses or calls?

    python tests/check_vllm_sources.py [--register] DIR...

Each DIR holds an unpacked vLLM (``DIR/vllm/__init__.py``). The symbols are read from the
syntax trees, so nothing is imported and no compiled extension is needed. ``--register``
also imports each tree in a process of its own, with its Python sources before the
installed vLLM, and really registers the plugin there. What is needed stands in
``vllm_oscar/engine/symbols.py``.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from vllm_oscar.engine import symbols
from vllm_oscar.engine.symbols import Symbol

# A platform's methods must be those of every class that users run.
PLATFORMS = (("platforms.cpu", "CpuPlatform"), ("platforms.cuda", "CudaPlatformBase"))

# What a vLLM may lack: then that is refused, or slower.
OPTIONAL = {
    "KV offloading": symbols.OFFLOADING,
    "FlashAttention in prefill": symbols.DENSE_PREFILL,
    "blocks of several pages on the CPU": symbols.CPU_RUNNER,
}

REGISTER = """
import vllm
from vllm_oscar.engine import compat, plugin
assert compat.unsupported_version() is None, compat.unsupported_version()
plugin.register(); plugin.register()
import torch
from vllm.config import CacheConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm_oscar.core.config import PRESETS
from vllm_oscar.engine.scheduler import OscarTailManager, OscarTailSpec
for preset in PRESETS:
    assert CacheConfig(cache_dtype=preset).cache_dtype == preset
    layer = AttentionSelectorConfig(head_size=128, dtype=torch.bfloat16, kv_cache_dtype=preset, block_size=128)
    assert current_platform.get_attn_backend_cls(None, layer) == compat.BACKENDS["OSCAR"]
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_oscar.engine.backend import OscarBackend
assert OscarBackend.get_name() in AttentionBackendEnum.__members__  # a layer looks it up
assert not AttentionBackendEnum.CUSTOM.is_overridden()  # the slot of others
spec = OscarTailSpec(block_size=128, num_kv_heads=2, head_size=128, dtype=torch.uint8, state_content_bytes=90, pages=6)
assert KVCacheSpecRegistry.get_manager_class(spec) is OscarTailManager
full = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=128, dtype=torch.uint8, state_content_bytes=90)
assert KVCacheSpecRegistry.get_manager_class(full) is FullAttentionManager
assert full.page_size_bytes == spec.page_size_bytes == 128 * 2 * 90
from vllm.v1.core.block_pool import BlockPool
pool = BlockPool(num_gpu_blocks=20, enable_caching=True, hash_block_size=128)
manager = OscarTailManager(spec, block_pool=pool, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=128)
manager.add_local_computed_blocks("r", [], 256, 0)
row = manager.allocate_new_blocks("r", 300, 300)
assert [block.block_id for block in row][6:] == [2] and pool.get_num_free_blocks() == 13
manager.free("r")
assert pool.get_num_free_blocks() == 19
print("registered", vllm.__version__, vllm.__file__)
"""


def source(root: Path, module: str) -> Path:
    """The file of ``vllm.<module>`` in the tree of ``root``, which may not exist."""
    path = root.joinpath("vllm", *module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@lru_cache(maxsize=None)
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _find(node: ast.Module | ast.ClassDef, name: str):
    """A function, class, assignment or import called ``name`` in a module (also under ``if``) or class body."""
    for child in ast.walk(node) if isinstance(node, ast.Module) else node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and child.name == name:
            return child
        if isinstance(child, ast.AnnAssign) and getattr(child.target, "id", None) == name:
            return child
        if isinstance(child, ast.Assign) and any(getattr(target, "id", None) == name for target in child.targets):
            return child
        if isinstance(child, ast.ImportFrom) and any((a.asname or a.name) == name for a in child.names):
            return child
    return None


def _definition(root: Path, module: str, name: str):
    """``(node, module)`` where ``name`` of ``module`` is defined, through vLLM's own imports."""
    path = source(root, module)
    found = _find(_tree(path), name) if path.exists() else None
    if isinstance(found, ast.ImportFrom):
        parts = module.split(".")[: len(module.split(".")) - found.level + (path.name == "__init__.py")]
        target = ".".join(filter(None, (*parts, found.module))) if found.level else found.module
        if found.level or target.startswith("vllm."):
            original = next(a.name for a in found.names if (a.asname or a.name) == name)
            return _definition(root, target.removeprefix("vllm."), original)
    return found, module


def _bases(node: ast.ClassDef, root: Path, module: str):
    """The classes that a class derives from, as far as they are vLLM's: ``(class, module)``."""
    for base in node.bases:
        name = getattr(base, "id", None) or getattr(getattr(base, "value", None), "id", None)
        found, where = _definition(root, module, name) if name else (None, module)
        if isinstance(found, ast.ClassDef):
            yield found, where


def _member(node: ast.ClassDef, name: str, root: Path, module: str):
    found = _find(node, name)
    for base, where in _bases(node, root, module) if found is None else ():
        found = found or _member(base, name, root, where)
    return found


def _names(node, root: Path, module: str) -> list[str]:
    """Parameters of a function, fields of a class and its bases."""
    if isinstance(node, ast.ClassDef):
        inherited = [name for base, where in _bases(node, root, module) for name in _names(base, root, where)]
        return inherited + [child.target.id for child in node.body if isinstance(child, ast.AnnAssign)]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return []


def problem(root: Path, symbol: Symbol) -> str | None:
    """A sentence if ``symbol`` is missing, or a parameter, field or attribute of it."""
    if symbol.module == symbols.PLATFORM:
        found = (problem(root, symbol._replace(module=m, name=f"{c}.{symbol.name}")) for m, c in PLATFORMS)
        return next(filter(None, found), None)
    path = source(root, symbol.module)
    if not path.exists():
        return f"{path.relative_to(root)} does not exist"
    file, (name, *member) = path.relative_to(root / "vllm"), symbol.name.split(".")
    node, module = _definition(root, symbol.module, name)
    if member:
        node = _member(node, *member, root, module) if isinstance(node, ast.ClassDef) else None
    if node is None:
        return f"{file} has no {symbol.name}"
    found = _names(node, root, module)
    lacking = [name for name in symbol.names if name not in found]
    if lacking:
        return f"{file}: {symbol.name} has no {', '.join(lacking)} (it has {', '.join(found)})"
    if not isinstance(node, ast.ClassDef) and tuple(found[: len(symbol.names)]) != symbol.names:
        return f"{file}: {symbol.name} starts with ({', '.join(found)}), not ({', '.join(symbol.names)})"
    given = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)} if symbol.sets else ()
    unset = [name for name in symbol.sets if name not in given]
    return f"{file}: {symbol.name} sets no {', '.join(unset)}" if unset else None


def problems(root: Path) -> list[str]:
    """Every problem of a source tree that would keep the plugin from working."""
    needed = symbols.needed(lambda symbol: problem(root, symbol) is None)
    return [text for text in (problem(root, symbol) for symbol in needed) if text]


def lacks(root: Path) -> dict[str, str]:
    """What the plugin would do without in a source tree, each with the first problem."""
    found = {name: [problem(root, symbol) for symbol in table] for name, table in OPTIONAL.items()}
    return {name: next(filter(None, texts)) for name, texts in found.items() if any(texts)}


def register(root: Path) -> str | None:
    """Register the plugin in a process that imports the sources of ``root``; the error's last line."""
    paths = os.pathsep.join((str(root), str(Path(symbols.__file__).parents[2])))
    env = os.environ | {"PYTHONPATH": paths, "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    result = subprocess.run([sys.executable, "-c", REGISTER], env=env, cwd="/", capture_output=True, text=True)
    if result.returncode == 0 and str(root.resolve()) in result.stdout:
        return None
    return (result.stderr or result.stdout).strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--register", action="store_true", help="also register the plugin in each tree")
    parser.add_argument("roots", nargs="+", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    failed = False
    for root in arguments.roots:
        found = problems(root)
        if arguments.register and (error := register(root)):
            found.append(f"registration failed: {error}")
        print(f"{root}: {'ok' if not found else ''}")
        for text in [*found, *(f"without {name}: {text}" for name, text in lacks(root).items())]:
            print(f"  {text}")
        failed |= bool(found)
    return failed


if __name__ == "__main__":
    sys.exit(main())
