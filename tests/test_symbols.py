# SPDX-License-Identifier: Apache-2.0
"""vLLM without something that the plugin touches: everything else is served, our dtypes are refused with a sentence."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import vanish
from vllm_engine import MODEL, REPO, environment

import vllm_oscar.engine
from vllm_oscar.engine import symbols


def outcomes(*options: str) -> list[dict]:
    """What ``vanish.py`` found, a dictionary for each symbol."""
    command = [sys.executable, str(REPO / "tests" / "vanish.py"), str(MODEL), *options]
    # Without plugins vLLM does not register ours by itself.
    env = environment(VLLM_PLUGINS="", VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=str(REPO))
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


# Without these our dtypes cannot even be registered to be refused.
UNREGISTERED = {
    ("config.cache", "CacheDType"),
    ("utils.torch_utils", "STR_DTYPE_TO_TORCH_DTYPE"),
    ("engine.arg_utils", "_compute_kwargs"),
    ("engine.arg_utils", "EngineArgs"),
    ("engine.arg_utils", "EngineArgs.create_engine_config"),
    ("config.cache", "CacheConfig"),
}


def test_each_symbol_in_turn():
    whole, *others = outcomes()
    assert whole == {"symbol": None, "log": [], "auto": "served", "oscar": "served"}
    assert [tuple(found["symbol"]) for found in others] == [(s.module, s.name) for s in vanish.removable()]
    for found in others:
        assert found["auto"] == "served", found
        module, name = found["symbol"]
        expected = f"vllm.{module} has no {name}; install vLLM 0.29 to 0.33 unchanged, or a newer vllm-oscar"
        expected = expected.replace(f"vllm.{symbols.PLATFORM}", "the platform")
        (line,) = found["log"]
        assert "--kv-cache-dtype oscar does not support this vLLM" in line and expected in line
        if (module, name) in UNREGISTERED:
            assert line.startswith("ERROR") and "nor could the dtype be registered" in line
            assert "invalid choice: 'oscar'" in found["oscar"]
        else:
            assert line.startswith("WARNING")
            assert found["oscar"] == "UnsupportedByOscar" + line.removeprefix("WARNING")


@pytest.mark.parametrize(
    "name", ["CircularBufferManager", pytest.param("check_and_update_config", marks=pytest.mark.slow)]
)
def test_an_engine_serves_without(name):
    """Of the scheduler's side and of the platform's."""
    (found,) = outcomes("--engine", "--only", name)
    assert len(found["tokens"]) == 4 and found["oscar"].startswith("UnsupportedByOscar")


def test_each_parameter_field_and_attribute_in_turn():
    needed = symbols.needed(lambda symbol: symbols.problem(symbol) is None)
    # tests/test_versions.py says which vLLM lacks these.
    optional = () if symbols.missing(symbols.OFFLOADING) else symbols.OFFLOADING
    for symbol in (*needed, *optional):
        assert symbols.problem(symbol) is None
        for part in (*symbol.names, *symbol.sets):
            with vanish.without(symbol, part):
                found = symbols.problem(symbol)
            assert found and symbol.name in found and part in found, (symbol, part, found)
        assert symbols.problem(symbol) is None


def test_a_patch_that_fails_all_the_same(monkeypatch):
    from vllm_oscar.engine import compat, plugin

    refused = []
    monkeypatch.setattr(compat, "register_specs", lambda: {}["spec"])
    monkeypatch.setattr(compat, "refuse_dtypes", refused.append)
    plugin.register()
    (sentence,) = refused
    assert "does not support this vLLM" in sentence and "KeyError: 'spec'" in sentence


# ---- the table against our code ------------------------------------------------------
ENGINE = sorted(Path(vllm_oscar.engine.__file__).parent.glob("*.py"))
SELECT = REPO / "vllm_oscar" / "ops" / "select.py"
TABLE = (
    *symbols.ALWAYS,
    *symbols.OFFLOADING,
    *symbols.CPU_RUNNER,
    *symbols.NEW_DTYPE,
    *symbols.OLD_DTYPE,
)


def imported(tree: ast.Module):
    """``(module, name)`` of what a file imports of vLLM, ``vllm.`` left out; the name is None for a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from ((node.module.removeprefix("vllm").strip("."), alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((a.name[5:], None) for a in node.names if a.name.startswith("vllm."))


@pytest.mark.parametrize("file", [*ENGINE, SELECT], ids=lambda file: file.name)
def test_every_import_is_in_the_table(file):
    known = {(symbol.module, symbol.name.split(".")[0]) for symbol in TABLE}
    modules = {module for module, _ in known}
    for module, name in imported(ast.parse(file.read_text())):
        submodule = module if name is None else f"{module}.{name}".lstrip(".")
        assert (module, name) in known or submodule in modules, f"{file.name} imports {name} from vllm.{module}"


def test_every_override_is_in_the_table():
    known = {symbol.name for symbol in TABLE}
    count = 0
    for info in pkgutil.iter_modules(vllm_oscar.engine.__path__):
        module = importlib.import_module(f"vllm_oscar.engine.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            bases = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
            for member in vars(cls) if cls.__module__ == module.__name__ else ():
                owners = [base for base in bases if member in vars(base)]
                if owners and not member.startswith("__") and member != "_abc_impl":
                    count += 1
                    assert any(f"{base.__name__}.{member}" in known for base in bases), f"{cls.__name__}.{member}"
    assert count > 15


CONFIGS = {
    "vllm_config": "VllmConfig",
    "attention_config": "AttentionConfig",
    "cache_config": "CacheConfig",
    "compilation_config": "CompilationConfig",
    "device_config": "DeviceConfig",
    "model_config": "ModelConfig",
    "parallel_config": "ParallelConfig",
    "scheduler_config": "SchedulerConfig",
    "speculative_config": "SpeculativeConfig",
    "common": "CommonAttentionMetadata",
    "common_attn_metadata": "CommonAttentionMetadata",
    "attn_selector_config": "AttentionSelectorConfig",
    "selector_config": "AttentionSelectorConfig",
}
SHORT_NAMES = {  # of variables, in that file
    "checks.py": {
        "attention": "AttentionConfig",
        "cache": "CacheConfig",
        "draft": "ModelConfig",
        "layer": "Attention",
        "model": "ModelConfig",
        "other": "Attention",
        "parallel": "ParallelConfig",
        "speculative": "SpeculativeConfig",
        "transfer": "KVTransferConfig",
        "target": "ModelConfig",
    },
    "compat.py": {"speculative": "SpeculativeConfig"},
    "metadata.py": {"speculative": "SpeculativeConfig"},
    "tail.py": {"attention": "Attention"},
}


@pytest.mark.parametrize("file", ENGINE, ids=lambda file: file.name)
def test_every_attribute_of_a_configuration_is_in_the_table(file):
    """What is read with ``getattr`` and a default may be absent, and need not be there."""
    known: dict[str, set[str]] = {}
    for symbol in TABLE:
        cls, *member = symbol.name.split(".")
        known.setdefault(cls, set()).update(member, () if member and not symbol.sets else symbol.names, symbol.sets)
    owners = CONFIGS | SHORT_NAMES.get(file.name, {})
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            owner = owners.get(getattr(node.value, "id", None) or getattr(node.value, "attr", None))
            assert owner is None or node.attr in known[owner] | {"_asdict"}, f"{owner}.{node.attr} ({file.name})"


def test_every_patch_is_in_the_catalogue():
    from vllm_oscar.engine import compat

    rows = (REPO / "patches" / "README.md").read_text().splitlines()
    catalogue = {row.split("`")[1] for row in rows if row.startswith("| `")}
    applied = {name for name in vars(compat) if name.startswith(("register_", "patch_", "refuse_"))}
    assert catalogue == applied
