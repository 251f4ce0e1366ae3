# SPDX-License-Identifier: Apache-2.0
"""Small models with state-space layers beside attention, random weights, written where a test wants them."""

from __future__ import annotations

from pathlib import Path

import torch
from window_models import COMMON, FULL, save


def qwen3_next(folder: Path) -> Path:
    """Gated DeltaNet and attention, 2 to 1; both experts for every token, since a change of expert is a jump."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    linear = {"linear_num_value_heads": 12, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
    experts |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    shape = {"head_dim": 64, "num_hidden_layers": 6, "initializer_range": 0.1}
    layers = {"layer_types": ["linear_attention", "linear_attention", FULL] * 2}
    torch.manual_seed(0)
    return save(folder, Qwen3NextForCausalLM(Qwen3NextConfig(**COMMON | shape | layers | linear | experts)))


def lfm2(folder: Path) -> Path:
    """Short convolutions and attention, 1 to 1."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    shape = {"hidden_size": 256, "num_hidden_layers": 4, "conv_L_cache": 3}
    vllm = {"conv_dim": 256, "block_dim": 256, "block_ff_dim": 256}  # which transformers does without
    torch.manual_seed(0)
    return save(folder, Lfm2ForCausalLM(Lfm2Config(**COMMON | shape | vllm | {"layer_types": ["conv", FULL] * 2})))
