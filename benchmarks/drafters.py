# SPDX-License-Identifier: Apache-2.0
"""Small drafters for the demo model, made from its own weights: one of each kind that has layers of its own.

None is trained, but what each drafts depends on what it reads from its KV cache: the draft
model and EAGLE are right most times or half the time; of EAGLE-3 and MTP look at what they
draft, which is seldom right.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
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


def random(folder: Path) -> str:
    """A draft model of another shape, a layer with four KV heads of 64: never right, but the same every time."""
    generator = torch.Generator().manual_seed(2)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    sizes = {name: weight.shape for name, weight in _weights().items() if not name.startswith("model.layers.")}
    layer = _layer(_weights(), 0, "model.layers.0.")
    for name, weight in layer.items():
        width = 4 * 64
        is_projection = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        sizes[name] = (width, HIDDEN) if is_projection else (HIDDEN, width) if "o_proj" in name else weight.shape
    weights = {
        name: torch.ones(size) if len(size) == 1 else 0.1 * torch.randn(size, generator=generator)
        for name, size in sizes.items()
    }
    return _save(folder, weights, **shape)


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


def random_eagle(folder: Path, target: dict) -> str:
    """EAGLE: a random layer for any target whose ``config.json`` this is; with the target's embedding and head."""
    generator = torch.Generator().manual_seed(3)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    hidden, heads, kv_heads, head_dim, _ = (target[name] for name in names)
    layer, inner = "layers.0.", 2 * hidden
    sizes = {
        "fc": (hidden, 2 * hidden),
        f"{layer}self_attn.q_proj": (heads * head_dim, hidden),
        f"{layer}self_attn.k_proj": (kv_heads * head_dim, hidden),
        f"{layer}self_attn.v_proj": (kv_heads * head_dim, hidden),
        f"{layer}self_attn.o_proj": (hidden, heads * head_dim),
        f"{layer}mlp.gate_proj": (inner, hidden),
        f"{layer}mlp.up_proj": (inner, hidden),
        f"{layer}mlp.down_proj": (hidden, inner),
    }
    weights = {f"{name}.weight": 0.2 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    weights[f"{layer}post_attention_layernorm.weight"] = torch.ones(hidden)
    shape = {name: target[name] for name in names} | {"intermediate_size": inner, "num_hidden_layers": 1}
    return _save(folder, weights, **shape)


def eagle3(folder: Path) -> str:
    """EAGLE-3: a layer of the demo model, its attention four times as loud, on what a layer before it says."""
    weights = _weights()
    layer = _layer(weights, LAYERS - 1, "midlayer.")
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = layer[f"midlayer.self_attn.{name}.weight"]
        layer[f"midlayer.self_attn.{name}.weight"] = torch.cat([0.5 * weight, weight], 1)
    layer["midlayer.hidden_norm.weight"] = layer["midlayer.input_layernorm.weight"]
    layer["midlayer.self_attn.o_proj.weight"] *= 4
    merge = torch.cat([torch.zeros(HIDDEN, 2 * HIDDEN), 0.1 * torch.eye(HIDDEN)], 1)
    rest = {"fc.weight": merge, "norm.weight": weights["model.norm.weight"]}
    rest["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 8192}
    return _save(folder, layer | rest, **config, eagle_aux_hidden_state_layer_ids=[1, 3, LAYERS - 1])


def mtp(folder: Path) -> str:
    """Multi-token prediction as Ernie 4.5 has it: such a layer on hidden state and next embedding.

    vLLM asks the target's configuration for ``num_nextn_predict_layers`` (1).
    """
    weights = _weights()
    block = _layer(weights, LAYERS - 1, "model.mtp_block.0.")
    block["model.mtp_block.0.self_attn.o_proj.weight"] *= 4
    rest = {
        "model.mtp_emb_norm.0.weight": torch.ones(HIDDEN),
        "model.mtp_hidden_norm.0.weight": torch.ones(HIDDEN),
        "model.mtp_linear_proj.0.weight": torch.cat([0.1 * torch.eye(HIDDEN), torch.eye(HIDDEN)], 1),
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"],
    }
    ernie = {"architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "num_nextn_predict_layers": 1}
    return _save(folder, block | rest, **ernie)


def medusa(folder: Path, heads: int = 4) -> str:
    """Medusa: that many random heads, each for a token; it has no attention."""
    generator = torch.Generator().manual_seed(4)
    weights = {f"blocks.{i}.layers.0.weight": torch.randn(HIDDEN, HIDDEN, generator=generator) for i in range(heads)}
    weights |= {f"lm_heads.{i}.weight": _weights()["model.embed_tokens.weight"] for i in range(heads)}
    return _save(folder, weights, architectures=["MedusaModel"], model_type="medusa", num_hidden_layers=1)


SPECULATION = {
    "same": {"method": "draft_model"},  # the target itself
    "noisy": {"method": "draft_model"},
    "random": {"method": "draft_model"},
    "eagle": {"method": "eagle"},
    "eagle3": {"method": "eagle3"},
    "mtp": {"method": "mtp"},
    "medusa": {"method": "medusa"},
}
"""What vLLM is told of each kind, besides the checkpoint and the number of tokens."""


def options(kind: str, folder: Path, tokens: int, **more) -> dict:
    """Engine arguments for the demo model with one kind of drafter, whose checkpoint is made in ``folder`` once.

    ``more``: goes into ``speculative_config``.
    """
    makers = {"noisy": noisy, "random": random, "eagle": eagle, "eagle3": eagle3, "mtp": mtp, "medusa": medusa}
    path = folder / kind
    if kind in makers and not path.exists():
        makers[kind](path)
    model = str(path if kind in makers else MODEL)
    config = SPECULATION[kind] | {"model": model, "num_speculative_tokens": tokens} | more
    return {"speculative_config": config} | ({"hf_overrides": {"num_nextn_predict_layers": 1}} if kind == "mtp" else {})
