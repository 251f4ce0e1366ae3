# SPDX-License-Identifier: Apache-2.0
"""What layers without a KV cache keep of a request, from a model's ``config.json``: the sums of vLLM's models.

Gated DeltaNet (Qwen3-Next, Qwen3.5), Mamba 2 (Nemotron-H, Granite 4) and short convolutions (LFM2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
_ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class States:
    """The state-space layers of a model (per tensor-parallel rank).

    Attributes:
        layers: how many there are.
        fixed: bytes of a layer's state, its convolution's newest tokens included.
        per_draft: bytes more for each drafted token.
    """

    layers: int
    fixed: int
    per_draft: int = 0

    def nbytes(self, drafts: int) -> int:
        """Bytes of a layer's state with this number of drafted tokens a step."""
        return self.fixed + drafts * self.per_draft


def attention_layers(config: Mapping[str, Any]) -> int:
    """Layers with a KV cache. ``config``: the language model's part of a ``config.json``."""
    layers = config["num_hidden_layers"]
    if pattern := config.get("hybrid_override_pattern"):
        return pattern.count("*")
    if types := config.get("layer_types"):
        return sum(kind in _ATTENTION for kind in types)
    if interval := config.get("full_attention_interval"):
        return layers // interval
    return layers


def states(config: Mapping[str, Any], itemsize: int, tensor_parallel: int = 1) -> States | None:
    """The state-space layers; None if the model has none. Raises ``ValueError`` for kinds that are not known here.

    ``itemsize``: bytes of an element in the model's dtype, in which states are unless the configuration says more.
    """
    layers = config["num_hidden_layers"] - attention_layers(config)
    if pattern := config.get("hybrid_override_pattern"):
        layers = pattern.count("M")
    if not layers:
        return None

    def recurrent(name: str, default: int) -> int:
        return ITEMSIZE.get(config.get(name), default)

    def of_convolution(channels: int, kernel: int, state: int) -> States:
        row = channels // tensor_parallel * itemsize
        return States(layers, (kernel - 1) * row + state // tensor_parallel, row)

    if "linear_num_value_heads" in config:  # Gated DeltaNet
        key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        value = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        size = value * config["linear_key_head_dim"] * recurrent("mamba_ssm_dtype", itemsize)
        return of_convolution(2 * key + value, config["linear_conv_kernel_dim"], size)
    if "mamba_num_heads" in config:  # Nemotron-H
        inner = config["mamba_num_heads"] * config["mamba_head_dim"]
        size = inner * config["ssm_state_size"] * recurrent("mamba_ssm_cache_dtype", ITEMSIZE["float32"])
        groups = _groups(config["n_groups"], tensor_parallel)
        return of_convolution(inner + 2 * groups * config["ssm_state_size"], config["conv_kernel"], size)
    if "mamba_n_heads" in config:  # Granite 4
        inner = config["mamba_expand"] * config["hidden_size"]
        size = inner * config["mamba_d_state"] * itemsize
        groups = _groups(config["mamba_n_groups"], tensor_parallel)
        return of_convolution(inner + 2 * groups * config["mamba_d_state"], config["mamba_d_conv"], size)
    if "conv_L_cache" in config:  # LFM2
        channels = config.get("conv_dim") or config["hidden_size"]
        return States(layers, (config["conv_L_cache"] - 1) * channels // tensor_parallel * itemsize)
    raise ValueError(f"the state-space layers of {config.get('model_type')} are not known to this command")


def _groups(groups: int, tensor_parallel: int) -> int:
    """Mamba 2's groups, with the copies that ranks need to have one each."""
    return groups if groups % tensor_parallel == 0 else tensor_parallel
