# SPDX-License-Identifier: Apache-2.0
"""Capacity of real models with state-space layers, and with skipped layers: ``plan`` counts as vLLM does."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from test_plan_windows import configured  # noqa: E402
from vllm.model_executor.models import ModelRegistry  # noqa: E402
from vllm.model_executor.models import config as model_configs  # noqa: E402
from vllm.platforms.interface import Platform  # noqa: E402
from vllm.v1.attention.backend import AttentionBackend, MultipleOf  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.core.layers import sliding_windows  # noqa: E402
from vllm_oscar.engine import compat  # noqa: E402
from vllm_oscar.engine.backend import OscarBackend  # noqa: E402
from vllm_oscar.engine.scheduler import OscarPageSpec, OscarTailSpec  # noqa: E402
from vllm_oscar.tools import plan as planner  # noqa: E402

FOLDER = Path(__file__).parent / "configs"
MODELS = {
    "qwen3-next-80b-a3b": ("qwen3_next", "Qwen3NextForCausalLM", None),
    # Qwen3.5's own module asks for torchvision, and asks the same of its configuration.
    "qwen3.5-35b-a3b": ("qwen3_next", "Qwen3NextForCausalLM", "Qwen3_5ForConditionalGenerationConfig"),
    "nemotron-nano-9b-v2": ("nemotron_h", "NemotronHForCausalLM", "NemotronHForCausalLMConfig"),
    "granite-4.0-h-small": ("granitemoehybrid", "GraniteMoeHybridForCausalLM", None),
    "lfm2-1.2b": ("lfm2", "Lfm2ForCausalLM", None),
}
LAYERS = {  # with attention, with a state; from the models' papers and cards
    "qwen3-next-80b-a3b": (12, 36),
    "qwen3.5-35b-a3b": (10, 30),
    "nemotron-nano-9b-v2": (4, 27),
    "granite-4.0-h-small": (4, 36),
    "lfm2-1.2b": (6, 10),
}
MEMORY = 24 << 30


class FlashAttention(AttentionBackend):
    """What vLLM asks of a GPU's usual backend."""

    get_name = get_impl_cls = get_builder_cls = staticmethod(lambda: None)
    get_supported_kernel_block_sizes = staticmethod(lambda kv_cache_spec=None: [MultipleOf(16)])


@pytest.fixture
def align(monkeypatch):
    """``align(model, dtype, tp)``: tokens of a block, bytes of a padded state and its spec, by vLLM's own rules."""
    compat.register_dtypes()
    monkeypatch.setattr("vllm.config.vllm.set_current_vllm_config", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(ModelRegistry, "resolve_model_cls", lambda cls, **_: (cls, None))

    def aligned(model: str, dtype: str, tensor_parallel: int = 1):
        module, name, updater = MODELS[model]
        cls = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
        hf = SimpleNamespace(**planner.text_config(FOLDER / "hybrid" / f"{model}.json"))
        shape = planner.ModelShape.load(FOLDER / "hybrid" / f"{model}.json", tensor_parallel)
        config = SimpleNamespace(
            cache_config=SimpleNamespace(
                block_size=128 if dtype == "oscar" else 16,
                cache_dtype=dtype,
                kv_cache_dtype_skip_layers=[],
                mamba_block_size=None,
                mamba_cache_dtype="auto",
                mamba_cache_mode="none",
                mamba_page_size_padded=None,
                mamba_ssm_cache_dtype="auto",
                use_replayssm=False,
            ),
            model_config=SimpleNamespace(
                architecture=cls,
                dtype=torch.bfloat16,
                get_head_size=lambda: shape.head_dim,
                get_num_kv_heads=lambda parallel: shape.kv_heads,
                hf_config=hf,
                hf_text_config=hf,
                use_mla=False,
            ),
            num_speculative_tokens=0,
            parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel),
            speculative_config=None,
        )
        if updater:
            getattr(model_configs, updater).verify_and_update_config(config)
        backend = OscarBackend if dtype == "oscar" else FlashAttention
        monkeypatch.setattr(Platform, "_find_non_ssm_backends", classmethod(lambda cls, config: [backend]))
        if dtype == "oscar":
            bytes_per_token = PageFormat.preset("oscar", shape.head_dim).bytes_per_token
            monkeypatch.setattr(OscarBackend, "bytes_per_token", {shape.head_dim: bytes_per_token})
        Platform._align_hybrid_block_size(config, backend)
        state = {
            "shapes": cls.get_mamba_state_shape_from_config(config),
            "dtypes": cls.get_mamba_state_dtype_from_config(config),
            "page_size_padded": config.cache_config.mamba_page_size_padded,
        }
        return config.cache_config.block_size, state, shape

    return aligned


def capacity_by_vllm(specs: dict, context: int, layout: KVCacheLayout = KVCacheLayout.LBHNC, **cache) -> int:
    """Tokens that vLLM would log."""
    config = configured(context)
    config.cache_config.get_resolved_kv_cache_layout = lambda: layout
    vars(config.cache_config).update(cache, kv_cache_layout=layout.name)
    found = kv_cache_utils.get_kv_cache_configs(config, [specs], [MEMORY])[0]
    tokens, _ = kv_cache_utils.get_kv_cache_capacity(config, kv_cache_utils.generate_scheduler_kv_cache_config([found]))
    return tokens


def pages(shape, dtype: str, block_tokens: int = 128, mixed: bool = False) -> tuple:
    """Specs of an attention layer's pages and of its ring."""
    fmt = PageFormat.preset("oscar", shape.head_dim)
    common = {"block_size": block_tokens, "num_kv_heads": shape.kv_heads, "head_size": shape.head_dim}
    if dtype != "oscar":
        return FullAttentionSpec(**common, dtype=torch.bfloat16 if dtype == "auto" else torch.uint8), None
    common |= {"dtype": torch.uint8, "state_content_bytes": fmt.bytes_per_token}
    ring = OscarTailSpec(**common, pages=fmt.ring_pages(2), split=block_tokens // 128, mixed=mixed)
    return (OscarPageSpec if block_tokens > 128 else FullAttentionSpec)(**common), ring


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_plan_says_what_vllm_would(align, model, tensor_parallel):
    for caching in (False, True):
        for context in (8192, 32768, 131072):
            found = {}
            for dtype in ("auto", "fp8", "oscar"):
                block, state, shape = align(model, dtype, tensor_parallel)
                full, ring = pages(shape, dtype, block)
                mode = "align" if caching else "none"
                mamba = MambaSpec(block_size=block if caching else context, mamba_cache_mode=mode, **state)
                attention, states = LAYERS[model]
                specs = {f"layers.state{i}": mamba for i in range(states)}
                for i in range(attention):
                    specs |= {f"layers.{i}": full} | ({f"layers.{i}.oscar_tail": ring} if ring else {})
                found[dtype] = block, capacity_by_vllm(specs, context, mamba_cache_mode=mode)
            rows = {row.name: row for row in planner.plan(shape, MEMORY, planner.Load(context, prefix_caching=caching))}
            assert found == {name: (rows[name].block_tokens, rows[name].tokens) for name in found}


def test_four_times_the_tokens_of_qwen3_next_at_32k():
    shape = planner.ModelShape.load(FOLDER / "hybrid" / "qwen3-next-80b-a3b.json")
    rows = {row.name: row for row in planner.plan(shape, MEMORY, planner.Load(32768, prefix_caching=False))}
    assert rows["oscar"].tokens >= 4.0 * rows["auto"].tokens
    assert rows["oscar"].block_tokens == 25 * 128


def test_a_state_that_is_not_known(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "jamba", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 256, '
        '"layer_types": ["mamba", "attention"]}'
    )
    with pytest.raises(ValueError, match="the state-space layers of jamba are not known"):
        planner.ModelShape.load(tmp_path)


# ---- skipped layers ----------------------------------------------------------------------
QWEN3_8B = planner.ModelShape(layers=36, kv_heads=8, head_dim=128, itemsize=2)


def skipping(shape: planner.ModelShape, context: int, names: str) -> list[planner.Capacity]:
    return planner.plan(shape, MEMORY, planner.Load(context), planner.Skipped.parse(names, shape))


@pytest.mark.parametrize("skipped", [1, 2, 4, 18, 30])
@pytest.mark.parametrize("context", [2048, 32768])
def test_layers_in_16_bits(skipped, context):
    (ours, ring), (wide, _) = pages(QWEN3_8B, "oscar", mixed=True), pages(QWEN3_8B, "auto")
    specs = {}
    for i in range(36):
        specs[f"layers.{i}"] = wide if i < skipped else ours
        if i >= skipped:
            specs[f"layers.{i}.oscar_tail"] = ring
    found = capacity_by_vllm(specs, context, KVCacheLayout.BLHNC)
    names = ",".join(str(i) for i in range(skipped))
    rows = {row.name: row.tokens for row in skipping(QWEN3_8B, context, names)}
    assert rows["oscar"] == found
    if (skipped, context) == (2, 32768):
        assert found >= 4.4 * rows["auto"]


@pytest.mark.parametrize("model", ["gemma-3-27b", "gpt-oss-20b"])
@pytest.mark.parametrize("context", [8192, 131072])
def test_windows_in_16_bits(model, context):
    shape = planner.ModelShape.load(FOLDER / f"{model}.json")
    full, ring = pages(shape, "oscar", mixed=True)
    common = {"block_size": 128, "num_kv_heads": shape.kv_heads, "head_size": shape.head_dim, "dtype": torch.bfloat16}
    specs = {}
    for i, window in enumerate(sliding_windows(planner.text_config(FOLDER / f"{model}.json"))):
        specs[f"layers.{i}"] = SlidingWindowSpec(**common, sliding_window=window) if window else full
        if not window:
            specs[f"layers.{i}.oscar_tail"] = ring
    rows = {row.name: row.tokens for row in skipping(shape, context, "sliding_window")}
    assert rows["oscar"] == capacity_by_vllm(specs, context, KVCacheLayout.BLHNC)


@pytest.mark.parametrize(
    "text, message",
    [
        ("36", "name layers by numbers from 0 to 35, or all that have a window by sliding_window"),
        ("first", "name layers by numbers from 0 to 35"),
        (",".join(map(str, range(36))), "these are all layers of the model; skip fewer"),
    ],
)
def test_skipped_layers_that_are_not_there(text, message):
    with pytest.raises(ValueError, match=message):
        planner.Skipped.parse(text, QWEN3_8B)


@pytest.mark.parametrize("name, skipped", [("hybrid/lfm2-1.2b", "0"), ("gemma-3-4b", "0")])
def test_skipped_layers_that_cannot_be_planned(name, skipped):
    with pytest.raises(ValueError, match="leave out --skip-layers|only sliding_window is planned"):
        planner.Skipped.parse(skipped, planner.ModelShape.load(FOLDER / f"{name}.json"))
