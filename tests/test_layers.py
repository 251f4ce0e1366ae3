# SPDX-License-Identifier: Apache-2.0
"""Models whose layers are not all alike: found in ``config.json``, and refused by ``plan``."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_oscar.core.layers import sliding_windows, uneven_layers
from vllm_oscar.tools.cli import app

PLAIN = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 512, "head_dim": 64}


def blocks(*attention: dict) -> dict:
    return {"block_configs": [{"attention": layer, "ffn": {"no_op": False}} for layer in attention]}


UNEVEN = {
    "kv-heads": ({"num_kv_heads": [3, 3, 4, 5]}, "layers that differ in KV heads (num_kv_heads in config.json)"),
    "head-size": ({"head_dim": [64, 64, 128, 64]}, "layers that differ in head size (head_dim in config.json)"),
    "nemotron": (
        blocks(*({"n_heads_in_group": n, "no_op": False} for n in (1, 2, 4, 2))),
        "layers that differ in KV heads or head size (block_configs: n_heads_in_group in config.json)",
    ),
    "full-layers": (
        {"global_head_dim": 128},
        "layers that differ in head size (global_head_dim in config.json)",
    ),
    "full-layers-heads": (
        {"num_global_key_value_heads": 4},
        "layers that differ in KV heads (num_global_key_value_heads in config.json)",
    ),
    "values": ({"v_head_dim": 128}, "values of 128 channels beside keys of 64 (v_head_dim in config.json)"),
}
EVEN = {
    "plain": {},
    "lists": {"num_key_value_heads": [4, 4, 4, 4], "head_dim": [64, 64]},
    "without-attention": blocks({"n_heads_in_group": 2}, {"no_op": True, "n_heads_in_group": None}, {"no_op": True}),
    "mla": {"kv_lora_rank": 512, "v_head_dim": 128},
    "same-values": {"v_head_dim": 64},
}


@pytest.mark.parametrize("change, what", UNEVEN.values(), ids=UNEVEN)
def test_uneven(change, what):
    assert uneven_layers(PLAIN | change) == what


@pytest.mark.parametrize("change", EVEN.values(), ids=EVEN)
def test_even(change):
    assert uneven_layers(PLAIN | change) is None


def test_blocks_that_are_objects():
    """As remote code of a checkpoint makes them."""
    layers = [SimpleNamespace(attention=SimpleNamespace(n_heads_in_group=n, no_op=False)) for n in (1, 2)]
    assert "n_heads_in_group" in uneven_layers(PLAIN | {"block_configs": layers})


SLIDING = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    "change, windows",
    [
        ({}, [None] * 4),
        (SLIDING, [512, None, 512, None]),
        ({"sliding_window": 512}, [512] * 4),
        ({"sliding_window": None}, [None] * 4),
        (SLIDING | {"use_sliding_window": False}, [None] * 4),
        (SLIDING | {"model_type": "qwen3", "use_sliding_window": True}, [None] * 4),  # vLLM ignores them
    ],
)
def test_windows(change, windows):
    assert sliding_windows(PLAIN | change) == windows


@pytest.mark.parametrize("change, what", UNEVEN.values(), ids=UNEVEN)
def test_plan_refuses_in_one_sentence(tmp_path, change, what):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | change))
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["plan", str(tmp_path)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    output = " ".join(result.output.split())  # however wide the terminal is
    assert f"describes a model that OScaR does not support: {what}; choose another model" in output
