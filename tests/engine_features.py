# SPDX-License-Identifier: Apache-2.0
"""What ``test_vllm_features`` does in the engine's process."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_engine import MODEL
from window_models import COMMON, FULL, SLIDING, save


def mixture_of_experts(folder: str) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(4)
    shape = {"head_dim": 64, "num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 2}
    shape |= {"moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []}
    save(Path(folder), Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON | shape)))


def ignored_windows(folder: str) -> None:
    """Its configuration says that some layers have windows; vLLM gives none to this architecture."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    layers = [FULL, SLIDING, FULL, SLIDING]
    shape = {"head_dim": 64, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 100}
    shape["max_window_layers"] = 4  # from which layer on, as vLLM reads it
    save(Path(folder), Qwen3ForCausalLM(Qwen3Config(**COMMON | shape, layer_types=layers)))


def adapter(folder: str, broken: str = "0") -> None:
    """A LoRA adapter of the demo model: random, and large enough to change every answer.

    ``broken``: a number, ``nan`` or ``inf``, added to some weights of every matrix.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((MODEL / "config.json").read_text())
    hidden, heads, dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    outputs = {"q_proj": heads * dim, "k_proj": config["num_key_value_heads"] * dim}
    generator, weights = torch.Generator().manual_seed(6), {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in outputs.items():
            start = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{start}.lora_A.weight"] = torch.randn(8, hidden, generator=generator) * 0.1
            weights[f"{start}.lora_B.weight"] = torch.randn(size, 8, generator=generator) * 0.1
            for side in ("A", "B"):
                weights[f"{start}.lora_{side}.weight"][3] += float(broken)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(outputs), "bias": "none"}
    (Path(folder) / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))


def beams(engine, prompts: list, width: int, tokens: int) -> list:
    """Per prompt the beams found: ``[tokens, sum of logprobs]``."""
    from vllm.sampling_params import BeamSearchParams

    parameters = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
    found = engine.llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], parameters)
    return [[[list(beam.tokens), beam.cum_logprob] for beam in output.sequences] for output in found]


def record_events(engine) -> None:
    """From now on keep what is published of blocks."""
    scheduler = engine.core.scheduler
    engine.events = []
    scheduler.kv_event_publisher.publish = lambda batch: engine.events.extend(batch.events)


def events(engine) -> list:
    """Blocks stored since: ``[tokens of a block, tokens, group]``."""
    stored = [event for event in engine.events if type(event).__name__ == "BlockStored"]
    return [[event.block_size, list(event.token_ids), event.group_idx] for event in stored]
