# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights, written where a test wants them. The same weights every time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from vllm_engine import MODEL

# Of the demo model's tokenizer; initializer_range makes differences between prompts show in the logprobs.
COMMON = {
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}


def save(folder: Path, model_class, config, seed: int = 0) -> Path:
    """Write config, weights in float32 and the demo model's tokenizer to ``folder``, which is returned."""
    torch.manual_seed(seed)
    model_class(config).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def qwen3_next(folder: Path, **change) -> Path:
    """Gated DeltaNet and attention, 2 to 1; both experts for every token, since a change of expert is a jump."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
    experts |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    layer_types = ["linear_attention", "linear_attention", "full_attention"] * 2
    shape = {"head_dim": 64, "num_hidden_layers": len(layer_types), "layer_types": layer_types}
    return save(folder, Qwen3NextForCausalLM, Qwen3NextConfig(**COMMON | shape | linear | experts | change))


def lfm2(folder: Path, **change) -> Path:
    """Short convolutions and attention, 1 to 1."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    layer_types = ["conv", "full_attention", "conv", "full_attention"]
    shape = {"hidden_size": 256, "num_hidden_layers": len(layer_types), "layer_types": layer_types}
    conv = {"conv_L_cache": 3, "conv_dim": 256, "block_dim": 256, "block_ff_dim": 256}
    return save(folder, Lfm2ForCausalLM, Lfm2Config(**COMMON | shape | conv | change))
