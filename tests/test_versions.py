# SPDX-License-Identifier: Apache-2.0
"""The vLLM that is installed has what the plugin needs, and registration holds.

Other versions' sources are checked by hand with ``python tests/check_vllm_sources.py``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import check_vllm_sources as sources
import pytest

vllm = pytest.importorskip("vllm")
INSTALLED = Path(vllm.__file__).parent.parent


def test_the_installed_vllm_is_supported():
    from vllm_oscar.engine import compat

    assert compat.unsupported_version() is None
    assert compat.MIN_VLLM <= compat.vllm_version() <= compat.MAX_VLLM


def test_every_symbol_exists_with_its_parameters():
    assert sources.problems(INSTALLED) == []
    assert list(sources.lacks(INSTALLED)) == (["KV offloading"] if vllm.__version__.startswith("0.29.") else [])


def test_the_plugin_registers_in_a_fresh_process():
    assert sources.register(INSTALLED) is None


@pytest.mark.parametrize(
    "file, old, new, expected",
    [
        ("v1/core/block_pool.py", "def get_new_blocks(self", "def take_blocks(self", "has no BlockPool.get_new_blocks"),
        (
            "v1/kv_cache_interface.py",
            "state_content_bytes",
            "content_bytes",
            "AttentionSpec has no state_content_bytes",
        ),
        (
            "platforms/cpu.py",
            "selected_backend: ",
            "backend: ",
            "CpuPlatform.get_attn_backend_cls has no selected_backend",
        ),
        (
            "v1/core/single_type_kv_cache_manager.py",
            "self.req_to_blocks",
            "self.request_blocks",
            "SingleTypeKVCacheManager.__init__ sets no req_to_blocks",
        ),
        ("config/__init__.py", "    VllmConfig,\n", "", "config/__init__.py has no VllmConfig"),
    ],
)
def test_the_check_sees_a_changed_vllm(tmp_path, file, old, new, expected):
    """Each change alone, in a tree of links to the installed sources."""
    only_sources = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(INSTALLED / "vllm", tmp_path / "vllm", copy_function=os.symlink, ignore=only_sources)
    assert sources.problems(tmp_path) == []
    changed = tmp_path / "vllm" / file
    text = changed.read_text()
    assert old in text
    changed.unlink()
    changed.write_text(text.replace(old, new))
    sources._tree.cache_clear()
    found = sources.problems(tmp_path)
    assert len(found) == 1 and expected in found[0], found


def test_before_032_the_custom_slot_is_left_to_others(monkeypatch):
    """There our backend bears the slot's name, for layers ask for its backend's, but another plugin may fill it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_oscar.engine import compat
    from vllm_oscar.engine.backend import OscarBackend

    monkeypatch.setattr(OscarBackend, "name", "OSCAR")
    monkeypatch.delattr(AttentionBackendEnum, "register", raising=False)  # not there in such a vLLM
    compat.register_backends()
    assert OscarBackend.get_name() == "CUSTOM"
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    compat.register_backends()
    assert AttentionBackendEnum.CUSTOM.get_path() == "another.plugin.Backend"
    AttentionBackendEnum.CUSTOM.clear_override()


def test_applying_twice_changes_nothing():
    from vllm.model_executor.layers.attention import Attention
    from vllm.platforms import current_platform

    from vllm_oscar.engine import compat

    compat.apply()
    before = (Attention.__init__, Attention.get_kv_cache_spec, type(current_platform).get_attn_backend_cls.__func__)
    compat.apply()
    after = (Attention.__init__, Attention.get_kv_cache_spec, type(current_platform).get_attn_backend_cls.__func__)
    assert before == after
    assert not hasattr(before[0].__wrapped__, "_oscar")  # wrapped once
