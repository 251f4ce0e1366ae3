# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused before any worker starts: one sentence with the way out."""

from __future__ import annotations

import json
import re

import pytest
import torch

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """``refusal(config, **engine args)``: the message with which the engine's configuration is refused."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def create(config: dict | None = None, **args):
        merged = LLAMA | (config or {})
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}))
        args = {"model": str(tmp_path), "skip_tokenizer_init": True, "kv_cache_dtype": "oscar"} | args
        return EngineArgs(**args).create_engine_config()

    def message(config: dict | None = None, **args) -> str:
        with pytest.raises(ValueError) as caught:
            create(config, **args)
        found = re.sub(r" \[type=value_error.*", "", str(caught.value), flags=re.DOTALL)
        return found.split("Value error, ")[-1].strip()

    message.create = create
    return message


def assert_sentence(text: str, what: str, remedy: str) -> None:
    """One line that names the option, what is not supported and what to change."""
    assert re.fullmatch(r"--kv-cache-dtype \w+ does not support [^\n]+; [^\n]+", text), text
    assert what in text.split("; ")[0]
    assert remedy in text.split("; ")[-1]


def test_a_plain_model_is_accepted(refusal):
    config = refusal.create()
    assert config.cache_config.block_size == 128
    assert config.cache_config.cache_dtype == "oscar"
    assert refusal.create(block_size=128).cache_config.block_size == 128


OTHER_MODEL = "--kv-cache-dtype auto"
MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "sliding_window": None,
    "layer_types": ["full_attention", "full_attention"],
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "layer_types": ["full_attention", "full_attention"],
    "sliding_window": None,
    "num_local_experts": 2,
}
BLOOM = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2, "n_head": 2}
FALCON = {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": True, "head_dim": ...}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 128,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_target_positions": 448,
}
BERT = {"architectures": ["BertModel"], "model_type": "bert"}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 8,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize(
    "config, what",
    [
        pytest.param(MLA, "multi-head latent attention (MLA)", id="mla"),
        pytest.param(GEMMA2, "logit soft-capping", id="soft-cap"),
        pytest.param(GPT_OSS, "attention sinks", id="sinks"),
        pytest.param(BLOOM, "ALiBi", id="bloom"),
        pytest.param(FALCON, "ALiBi", id="falcon"),
        pytest.param(WHISPER, "encoder-decoder models", id="encoder-decoder"),
        pytest.param(BERT, "encoder or pooling models", id="encoder"),
        pytest.param(MAMBA, "state-space or linear-attention layers", id="mamba"),
        pytest.param(MISTRAL, "sliding-window attention", id="sliding-window"),
        pytest.param(GEMMA3, "sliding-window attention", id="some-sliding-window"),
        pytest.param({"head_dim": 72}, "head size 72 (supported: 64, 80, 96, 112, 128, 192, 256)", id="head-72"),
        pytest.param({"head_dim": 512}, "head size 512", id="head-512"),
    ],
)
def test_models(refusal, config, what):
    assert_sentence(refusal(config), what, OTHER_MODEL)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_head_sizes_that_are_supported(refusal, head_dim):
    assert refusal.create({"head_dim": head_dim}).model_config.get_head_size() == head_dim


OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
EAGLE = {"method": "eagle", "num_speculative_tokens": 2}


@pytest.mark.parametrize(
    "args, what, remedy",
    [
        pytest.param({"block_size": 64}, "--block-size 64", "--block-size 128", id="block-size"),
        pytest.param(
            {"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers", "remove the option", id="skip-layers"
        ),
        pytest.param({"kv_transfer_config": OFFLOADING}, "KV connectors", "--kv-transfer-config", id="connector"),
        pytest.param({"kv_offloading_size": 1.0}, "offloading", "--kv-offloading-size", id="offloading"),
        pytest.param(
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "--decode-context-parallel-size 2",
            "remove the option",
            id="dcp",
        ),
        pytest.param(
            {"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2", "remove the option", id="pcp"
        ),
    ],
)
def test_options(refusal, args, what, remedy):
    config = {"num_key_value_heads": 1} if "decode_context_parallel_size" in args else {}
    assert_sentence(refusal(config, **args), what, remedy)


@pytest.mark.parametrize("method", ["draft_model", "eagle", "mtp", "suffix", "medusa"])
def test_speculation_other_than_ngram(method):
    """At the level of the check: vLLM wants a draft model's files before it gets there."""
    from types import SimpleNamespace

    from vllm_oscar.engine.checks import UnsupportedByOscar, _check_speculation

    with pytest.raises(UnsupportedByOscar) as caught:
        _check_speculation(SimpleNamespace(method=method), "oscar")
    assert_sentence(str(caught.value), method, '{"method": "ngram"}')


def test_a_draft_model_is_refused_by_the_engine(refusal, tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps(LLAMA))
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    assert_sentence(refusal(speculative_config=speculation), "draft_model", '{"method": "ngram"}')


def test_ngram_speculation_is_accepted(refusal):
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    assert refusal.create(speculative_config=speculation).speculative_config.method == "ngram"


def test_an_unknown_dtype_names_the_known_ones(refusal):
    found = refusal(kv_cache_dtype="oscar_tiny")
    assert "'oscar'" in found and "'oscar_paper'" in found


@pytest.mark.parametrize("codec", ["none", "Lossless"])
def test_an_unknown_codec(refusal, monkeypatch, codec):
    monkeypatch.setenv("VLLM_OSCAR_CODEC", codec)
    assert f"VLLM_OSCAR_CODEC='{codec}' is unknown; use 'oscar' or 'lossless', or unset it" in refusal()


def test_an_unknown_kind_of_determinism(refusal, monkeypatch):
    monkeypatch.setenv("VLLM_OSCAR_DETERMINISTIC", "yes")
    assert "VLLM_OSCAR_DETERMINISTIC='yes' is unknown; use 0 or 1, or unset it" in refusal()


def test_our_variables_pass_vllms_validation(refusal, monkeypatch):
    monkeypatch.setenv("VLLM_OSCAR_CODEC", "lossless")
    monkeypatch.setenv("VLLM_OSCAR_KERNELS", "reference")
    monkeypatch.setenv("VLLM_OSCAR_DETERMINISTIC", "1")
    assert refusal.create(fail_on_environ_validation=True)
    monkeypatch.setenv("VLLM_OSCAR_CODECS", "lossless")
    assert "VLLM_OSCAR_CODECS" in refusal(fail_on_environ_validation=True)


@pytest.mark.parametrize("version", ["0.28.1", "0.34.0", "1.0.0"])
def test_an_unsupported_vllm_is_named_and_left_alone(monkeypatch, caplog, version):
    import vllm

    from vllm_oscar.engine import compat, plugin

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(compat, "apply", lambda: pytest.fail("patched an unsupported vLLM"))
    with caplog.at_level("ERROR"):
        plugin.register()
    short = ".".join(version.split(".")[:2])
    expected = f"vllm-oscar supports vLLM 0.29 to 0.33, but vLLM {short} is installed; "
    messages = [record.getMessage() for record in caplog.records] or [compat.unsupported_version()]
    assert any(message.startswith(expected) and "install a supported vLLM" in message for message in messages)


def test_other_dtypes_are_untouched(refusal):
    config = refusal.create(MISTRAL, kv_cache_dtype="auto")
    assert config.cache_config.cache_dtype == "auto"
    assert refusal.create(kv_cache_dtype="auto", kv_cache_dtype_skip_layers=["0"])


def test_too_little_memory_names_the_setting(engine_host):
    from vllm_engine import EngineError

    with pytest.raises(EngineError) as caught:
        engine_host.start("oscar", kv_cache_memory_bytes=1 << 20)
    assert "max_model_len" in str(caught.value)


# ---- what only a layer knows -----------------------------------------------------------
@pytest.mark.parametrize(
    "attribute, what",
    [
        ("use_mla", "multi-head latent attention"),
        ("has_sink", "attention sinks"),
        ("use_sparse", "sparse attention"),
        ("has_sliding_window", "sliding-window attention"),
        ("use_non_causal", "non-causal attention"),
        ("use_mm_prefix", "bidirectional multimodal prefixes"),
    ],
)
def test_a_layer_that_is_not_plain_attention(attribute, what):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from vllm_oscar.engine.checks import check_selection

    plain = AttentionSelectorConfig(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="oscar", block_size=128)
    check_selection(plain)
    with pytest.raises(ValueError) as caught:
        check_selection(plain._replace(**{attribute: True}))
    assert_sentence(str(caught.value), what, OTHER_MODEL)


@pytest.mark.parametrize(
    "arguments, what",
    [
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"sliding_window": 128}, "a sliding window"),
        ({"logits_soft_cap": 30.0}, "logit soft-capping"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "layers that share a KV cache"),
        ({"sinks": torch.zeros(2)}, "attention sinks"),
    ],
)
def test_an_impl_with_an_unsupported_argument(arguments, what):
    from vllm_oscar.engine.impl import OscarImpl

    with pytest.raises(ValueError) as caught:
        OscarImpl(2, 128, 0.1, kv_cache_dtype="oscar", **arguments)
    assert_sentence(str(caught.value), what, OTHER_MODEL)
