# SPDX-License-Identifier: Apache-2.0
"""What a model's ``config.json`` says of layers that are not all alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Where configurations keep KV heads and head sizes; a list there has one entry per layer.
_PER_LAYER = {
    "KV heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_groups"),
    "head size": ("head_dim", "attention_head_dim", "v_head_dim"),
}

# Their configurations may speak of windows, but vLLM's models do not have them.
_WITHOUT_WINDOWS = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


def _get(item: Any, name: str) -> Any:
    """Member of a mapping or attribute of an object; None if it has neither."""
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _differ(values: Iterable[Any]) -> bool:
    return len({value for value in values if value is not None}) > 1


def uneven_layers(config: Mapping[str, Any]) -> str | None:
    """What differs between the layers of a decoder, as a noun; None if nothing is known to.

    ``config``: the language model's part of a ``config.json``. Layers without attention
    do not count. Known are lists with one entry per layer (OpenELM), ``block_configs``
    (Nemotron-NAS), full layers with heads of their own (Gemma 4) and values of another size
    than the keys; of what a model decides in its code the configuration does not tell.
    """
    for what, names in _PER_LAYER.items():
        for name in names:
            if isinstance(config.get(name), (list, tuple)) and _differ(config[name]):
                return f"layers that differ in {what} ({name} in config.json)"
    blocks = [_get(block, "attention") for block in config.get("block_configs") or ()]
    blocks = [block for block in blocks if block and not _get(block, "no_op")]
    for name in ("n_heads_in_group", "num_key_value_heads", "head_dim"):
        if _differ(_get(block, name) for block in blocks):
            return f"layers that differ in KV heads or head size (block_configs: {name} in config.json)"
    for name, other in (("head_dim", "global_head_dim"), ("num_key_value_heads", "num_global_key_value_heads")):
        values = config.get(name), config.get(other)  # of layers with sliding windows, of full layers
        if all(isinstance(value, int) for value in values) and _differ(values):
            what = "head size" if name == "head_dim" else "KV heads"
            return f"layers that differ in {what} ({other} in config.json)"
    key, value = config.get("head_dim"), config.get("v_head_dim")
    if not config.get("kv_lora_rank") and isinstance(key, int) and isinstance(value, int) and key != value:
        return f"values of {value} channels beside keys of {key} (v_head_dim in config.json)"
    return None


def sliding_windows(config: Mapping[str, Any]) -> list[int | None]:
    """The window of each layer that has attention, in tokens, as vLLM serves it; None: it sees all tokens.

    ``config`` is the language model's part of a ``config.json`` with ``num_hidden_layers``.
    """
    window, types = config.get("sliding_window"), config.get("layer_types")
    if config.get("model_type") in _WITHOUT_WINDOWS or not config.get("use_sliding_window", True):
        window = None
    if not types:
        return [window or None] * config["num_hidden_layers"]
    return [window if kind == "sliding_attention" else None for kind in types]
