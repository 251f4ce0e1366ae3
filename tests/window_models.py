# SPDX-License-Identifier: Apache-2.0
"""Small models with sliding windows, random weights, written where a test wants them: the same ones every time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from vllm_engine import MODEL

# The vocabulary of the demo model's tokenizer. The larger initializer_range is, the more each attended token shows in
# the logprobs, and each rounding.
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
}
SLIDING, FULL = "sliding_attention", "full_attention"


def save(folder: Path, model: torch.nn.Module) -> Path:
    """Weights in float32, and the demo model's tokenizer."""
    model.float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def gemma3(folder: Path) -> Path:
    """Like Gemma 3: five windows, of 200 tokens, to a full layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {"head_dim": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": 6}
    layers = {"sliding_window": 200, "layer_types": [SLIDING] * 5 + [FULL]}
    torch.manual_seed(0)
    return save(folder, Gemma3ForCausalLM(Gemma3TextConfig(**COMMON | shape | layers)))


def gpt_oss(folder: Path) -> Path:
    """Like gpt-oss: sinks everywhere, windows of 128 tokens in every other layer. Both experts for every token,
    since a change of expert is a jump."""
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {"head_dim": 64, "num_hidden_layers": 4, "num_local_experts": 2, "num_experts_per_tok": 2}
    shape["initializer_range"] = 0.08
    layers = {"sliding_window": 128, "layer_types": [SLIDING, FULL] * 2}
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**COMMON | shape | layers))
    for layer in model.model.layers:  # large enough to take a good part of the weights
        torch.nn.init.normal_(layer.self_attn.sinks, mean=4.0)
    # As Gemma does, tie and scale embeddings, so that it says tokens again and n-gram drafts are accepted.
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.model.embed_tokens.weight.data *= 20
    return save(folder, model)


def gemma2(folder: Path) -> Path:
    """Like Gemma 2: logits capped, here so low that it tells, windows of 192 tokens in every other layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"head_dim": 128, "query_pre_attn_scalar": 32, "num_hidden_layers": 4, "attn_logit_softcapping": 2.0}
    layers = {"sliding_window": 192, "layer_types": [SLIDING, FULL] * 2}
    torch.manual_seed(0)
    return save(folder, Gemma2ForCausalLM(Gemma2Config(**COMMON | shape | layers)))


MODELS = {"gemma3": gemma3, "gpt_oss": gpt_oss, "gemma2": gemma2}
