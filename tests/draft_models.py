# SPDX-License-Identifier: Apache-2.0
"""Small drafters for the demo model, made from its own weights: one of each kind that vLLM knows.

None is trained. Each says what the demo model says often enough for its accepted tokens to
depend on what it reads from its KV cache.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm_engine import MODEL

CONFIG = json.loads((MODEL / "config.json").read_text())
HIDDEN, LAYERS = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]


def _weights() -> dict[str, torch.Tensor]:
    return {name: weight.float() for name, weight in load_file(MODEL / "model.safetensors").items()}


def _save(folder: Path, weights: dict[str, torch.Tensor], **config) -> str:
    """A checkpoint in float32; ``config`` as far as it differs from the demo model's. Returns its path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32"} | config))
    whole = {name: weight.contiguous().clone() for name, weight in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, folder / file)
    return str(folder)


def _layer(weights: dict[str, torch.Tensor], number: int, prefix: str) -> dict[str, torch.Tensor]:
    """One decoder layer, under other names."""
    own = f"model.layers.{number}."
    return {prefix + name.removeprefix(own): weight for name, weight in weights.items() if name.startswith(own)}


def noisy(folder: Path) -> str:
    """A draft model: the demo model, its weights 6 % off."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: weight * (1 + 0.06 * torch.randn(weight.shape, generator=generator))
        for name, weight in _weights().items()
    }
    return _save(folder, weights)


def eagle(folder: Path) -> str:
    """EAGLE: all of the demo model's layers on the next token's embedding, without the first norm, which EAGLE lacks.

    That norm becomes part of the projections behind it, as if all embeddings had the same size.
    """
    weights = _weights()
    embedding = weights["model.embed_tokens.weight"]
    first = "model.layers.0."
    scale = weights.pop(first + "input_layernorm.weight") / embedding.square().mean().sqrt()
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"{first}self_attn.{name}.weight"] *= scale
    layers = {name.removeprefix("model."): w for name, w in weights.items() if ".layers." in name}
    merge = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1)
    return _save(folder, layers | {"fc.weight": merge})


def eagle3(folder: Path) -> str:
    """EAGLE-3: a layer of the demo model between what the target's layers say and its head."""
    weights = _weights()
    layer = _layer(weights, LAYERS - 1, "midlayer.")
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = layer[f"midlayer.self_attn.{name}.weight"]
        layer[f"midlayer.self_attn.{name}.weight"] = torch.cat([0.5 * weight, weight], 1)
    layer["midlayer.hidden_norm.weight"] = layer["midlayer.input_layernorm.weight"]
    merge = torch.cat([torch.zeros(HIDDEN, 2 * HIDDEN), torch.eye(HIDDEN)], 1)
    rest = {"fc.weight": merge, "norm.weight": weights["model.norm.weight"]}
    rest["lm_head.weight"] = weights["model.embed_tokens.weight"]
    architecture = ["LlamaForCausalLMEagle3"]
    return _save(folder, layer | rest, architectures=architecture, num_hidden_layers=1, draft_vocab_size=8192)


def mtp(folder: Path) -> str:
    """Multi-token prediction as Ernie 4.5 has it: a layer on the sum of hidden state and next embedding."""
    weights = _weights()
    block = _layer(weights, LAYERS - 1, "model.mtp_block.0.")
    rest = {
        "model.mtp_emb_norm.0.weight": torch.ones(HIDDEN),
        "model.mtp_hidden_norm.0.weight": torch.ones(HIDDEN),
        "model.mtp_linear_proj.0.weight": torch.cat([torch.eye(HIDDEN), torch.eye(HIDDEN)], 1),
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"],
    }
    ernie = {"architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "num_nextn_predict_layers": 1}
    return _save(folder, block | rest, **ernie)
