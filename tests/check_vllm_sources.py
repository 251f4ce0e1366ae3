# SPDX-License-Identifier: Apache-2.0
"""Does a vLLM source tree have everything that the plugin patches, subclasses or calls?

    python tests/check_vllm_sources.py [--register] DIR...

Each DIR holds an unpacked vLLM (``DIR/vllm/__init__.py``). The symbols are read from the
syntax trees, so nothing is imported and no compiled extension is needed. ``--register``
also imports each tree in a process of its own, with its Python sources before the
installed vLLM, and really registers the plugin there.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

# What the plugin needs of every supported version: (file, symbol, parameters or fields in order).
# A symbol is a function, a class, a method "Class.method" or a module variable.
ALWAYS = [
    # compat.py
    ("envs.py", "environment_variables", []),
    ("config/cache.py", "CacheConfig", ["block_size", "cache_dtype", "kv_cache_dtype_skip_layers"]),
    ("v1/attention/selector.py", "AttentionSelectorConfig", ["head_size", "dtype", "kv_cache_dtype", "block_size"]),
    ("v1/attention/backends/registry.py", "AttentionBackendEnum.CUSTOM", []),
    ("v1/attention/backends/registry.py", "register_backend", ["backend", "class_path"]),
    ("v1/kv_cache_spec_registry.py", "KVCacheSpecRegistry._ensure_registered", []),
    (
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry.register",
        ["cls", "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"],
    ),
    *(
        entry
        for platform, cls in (("cpu", "CpuPlatform"), ("cuda", "CudaPlatformBase"))
        for entry in (
            (
                f"platforms/{platform}.py",
                f"{cls}.get_attn_backend_cls",
                ["cls", "selected_backend", "attn_selector_config"],
            ),
            (f"platforms/{platform}.py", f"{cls}.check_and_update_config", ["cls", "vllm_config"]),
        )
    ),
    ("model_executor/layers/attention/attention.py", "Attention.__init__", ["self", "num_heads", "head_size"]),
    ("model_executor/layers/attention/attention.py", "Attention.get_kv_cache_spec", ["self", "vllm_config"]),
    # tail.py
    ("model_executor/layers/attention_layer_base.py", "AttentionLayerBase.get_attn_backend", ["self"]),
    ("model_executor/layers/attention_layer_base.py", "AttentionLayerBase.get_kv_cache_spec", ["self", "vllm_config"]),
    ("utils/math_utils.py", "cdiv", ["a", "b"]),
    ("v1/core/kv_cache_utils.py", "KVCacheBlock", ["block_id", "ref_cnt", "is_null"]),
    ("v1/core/block_pool.py", "BlockPool.get_new_blocks", ["self", "num_blocks"]),
    ("v1/kv_cache_interface.py", "KVCacheSpec", ["block_size"]),
    ("v1/kv_cache_interface.py", "AttentionSpec", ["num_kv_heads", "head_size", "dtype", "state_content_bytes"]),
    ("v1/kv_cache_interface.py", "CircularBufferSpec.max_memory_usage_bytes", ["self", "vllm_config"]),
    ("v1/kv_cache_interface.py", "CircularBufferSpec.max_num_blocks_per_req", ["self", "vllm_config", "max_len"]),
    ("v1/kv_cache_interface.py", "CircularBufferSpec.is_uniform_with_collection", ["self", "kv_cache_specs"]),
    *(
        ("v1/core/single_type_kv_cache_manager.py", f"{cls}.{method}", parameters)
        for cls, method, parameters in (
            ("SingleTypeKVCacheManager", "__init__", ["self", "kv_cache_spec", "block_pool"]),
            ("SingleTypeKVCacheManager", "pop_blocks_for_free", ["self", "request_id"]),
            ("CircularBufferManager", "_claim_ring_block", ["self", "request_id"]),
            ("CircularBufferManager", "get_num_blocks_to_allocate", ["self", "request_id", "num_tokens"]),
            ("CircularBufferManager", "allocate_new_blocks", ["self", "request_id"]),
            ("CircularBufferManager", "cache_blocks", ["self", "request", "num_tokens"]),
            (
                "CircularBufferManager",
                "add_local_computed_blocks",
                [
                    "self",
                    "request_id",
                    "new_computed_blocks",
                    "num_local_computed_tokens",
                    "num_external_computed_tokens",
                ],
            ),
        )
    ),
    # metadata.py, backend.py, impl.py
    (
        "v1/attention/backend.py",
        "CommonAttentionMetadata",
        ["query_start_loc", "seq_lens", "num_actual_tokens", "max_query_len", "block_table_tensor"],
    ),
    (
        "v1/attention/backend.py",
        "AttentionMetadataBuilder.build",
        ["self", "common_prefix_len", "common_attn_metadata", "fast_build"],
    ),
    ("v1/attention/backend.py", "AttentionMetadataBuilder._init_reorder_batch_threshold", ["self"]),
    ("v1/attention/backend.py", "AttentionBackend.forward_includes_kv_cache_update", []),
    ("v1/attention/backend.py", "AttentionCGSupport.NEVER", []),
    ("v1/attention/backend.py", "AttentionType.DECODER", []),
    ("v1/kv_cache_interface.py", "KVCacheLayout", []),
    ("v1/kv_cache_layout.py", "KVCacheLayout.LBHNC", []),
    ("v1/kv_cache_layout.py", "KVCacheLayout.BLHNC", []),
    ("forward_context.py", "get_forward_context", []),
]

# The two ways to add a dtype: either all of the first or all of the second.
NEW_DTYPE = [
    ("config/cache.py", "register_kv_cache_dtype", ["name"]),
    ("config/cache.py", "get_kv_cache_dtype_handler", ["name"]),
    ("v1/kv_cache_interface.py", "KVQuantMode.NONE", []),
]
OLD_DTYPE = [
    ("config/cache.py", "CacheDType", []),
    ("v1/attention/selector.py", "CacheDType", []),
    ("utils/torch_utils.py", "STR_DTYPE_TO_TORCH_DTYPE", []),
    ("engine/arg_utils.py", "_compute_kwargs", ["cls"]),
]

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


@lru_cache(maxsize=None)
def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _find(node: ast.Module | ast.ClassDef, name: str):
    """A function, class, assignment or import called ``name`` in a module (also under ``if``) or class body."""
    if not isinstance(node, (ast.Module, ast.ClassDef)):
        return None
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


def _names(node) -> list[str]:
    """Parameters of a function, fields of a class."""
    if isinstance(node, ast.ClassDef):
        return [child.target.id for child in node.body if isinstance(child, ast.AnnAssign)]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return []


def problem(root: Path, file: str, symbol: str, names: list[str]) -> str | None:
    """A sentence if ``symbol`` is missing or lacks one of ``names``; for functions their order counts."""
    path = root / "vllm" / file
    if not path.exists():
        return f"{file} does not exist"
    node = _module(path)
    for part in symbol.split("."):
        node = _find(node, part)
        if node is None:
            return f"{file} has no {symbol}"
    found = _names(node)
    missing = [name for name in names if name not in found]
    if missing:
        return f"{file}: {symbol} has no {', '.join(missing)} (it has {', '.join(found)})"
    if not isinstance(node, ast.ClassDef) and found[: len(names)] != names:
        return f"{file}: {symbol} starts with ({', '.join(found[: len(names)])}), not ({', '.join(names)})"
    return None


def problems(root: Path) -> list[str]:
    """Every problem of a source tree."""
    found = [problem(root, *entry) for entry in ALWAYS]
    new = [problem(root, *entry) for entry in NEW_DTYPE]
    if any(new):
        # Not all of the new interface: then none of it, and all of what we patch instead.
        found += [problem(root, *entry) for entry in OLD_DTYPE]
    return [text for text in found if text]


def register(root: Path) -> str | None:
    """Register the plugin in a process that imports the sources of ``root``; the error's last line."""
    env = os.environ | {"PYTHONPATH": str(root), "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
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
        for text in found:
            print(f"  {text}")
        failed |= bool(found)
    return failed


if __name__ == "__main__":
    sys.exit(main())
