# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused before any worker starts: one sentence with the way out."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm_engine import MODEL, environment

from vllm_oscar.core.config import PRESETS
from vllm_oscar.engine import checks
from vllm_oscar.engine.refusal import UnsupportedByOscar

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
def log():
    """The messages of warnings and errors; vLLM's loggers do not propagate to pytest's."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    checks.logger.addHandler(handler)
    yield lines
    checks.logger.removeHandler(handler)


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
        with pytest.raises((UnsupportedByOscar, ValueError)) as caught:
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


def refused_by_check(config) -> str:
    """What the check says of a configuration that vLLM itself would not make here."""
    with pytest.raises(UnsupportedByOscar) as caught:
        checks.check_config(config)
    return str(caught.value)


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
LLAMA4 = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size_mlp": 256,
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 1024,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
}
THREE_LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LFM2 = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"],
    "conv_L_cache": 3,
    "conv_dim": 256,
}
GEMMA2 = GEMMA3 | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0}
GPT_OSS = GEMMA3 | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 2}
GEMMA3N = GEMMA3 | {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "num_kv_shared_layers": 1,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}
# Windows that vLLM ignores: all layers of these keep every token.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 1024,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


@pytest.mark.parametrize(
    "config, what",
    [
        pytest.param(MLA, "multi-head latent attention (MLA)", id="mla"),
        pytest.param(BLOOM, "ALiBi", id="bloom"),
        pytest.param(FALCON, "ALiBi", id="falcon"),
        pytest.param(WHISPER, "encoder-decoder models", id="encoder-decoder"),
        pytest.param(BERT, "encoder or pooling models", id="encoder"),
        pytest.param(MAMBA, "models without attention", id="mamba"),
        pytest.param(MISTRAL, "models whose layers all have a sliding window (1024 tokens)", id="windows-alone"),
        pytest.param(LLAMA4, "chunked local attention", id="chunked-local"),
        pytest.param(GEMMA3N, "layers that share a KV cache", id="shared-cache"),
        pytest.param({"head_dim": 72}, "head size 72 (supported: 64, 80, 96, 112, 128, 192, 256)", id="head-72"),
        pytest.param({"head_dim": 512}, "head size 512", id="head-512"),
    ],
)
def test_models(refusal, config, what):
    assert_sentence(refusal(config), what, OTHER_MODEL)


@pytest.mark.parametrize("config", [GEMMA3, GEMMA2, GPT_OSS, QWEN2, QWEN3], ids=lambda config: config["model_type"])
def test_windows_beside_full_layers_are_accepted(refusal, config):
    assert refusal.create(config).model_config.hf_text_config.sliding_window is not None


def test_windows_alone_can_be_served_as_far_as_they_reach(refusal):
    assert "--disable-sliding-window" in refusal(MISTRAL)
    assert refusal.create(MISTRAL, disable_sliding_window=True).model_config.max_model_len == 1024


def test_multimodal_prefixes(refusal):
    """At the level of the check: vLLM imports torchvision for such models, which not every machine has."""
    config = refusal.create()
    config.model_config.is_mm_prefix_lm = True
    assert_sentence(refused_by_check(config), "bidirectional multimodal prefixes", "--language-model-only")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_head_sizes_that_are_supported(refusal, head_dim):
    assert refusal.create({"head_dim": head_dim}).model_config.get_head_size() == head_dim


SKIP = "kv_cache_dtype_skip_layers"


@pytest.mark.parametrize(
    "config, args, what, remedy",
    [
        ({}, {SKIP: ["2"]}, "--kv-cache-dtype-skip-layers 2", "name layers by their numbers, 0 to 1"),
        ({}, {SKIP: ["first"]}, "--kv-cache-dtype-skip-layers first", "sliding_window"),
        ({}, {SKIP: ["0", "1"]}, "with all layers of the model", "skip fewer"),
        (LFM2, {SKIP: ["1"]}, "with state-space layers, whose blocks have several pages", "remove the option"),
        (GEMMA3 | THREE_LAYERS, {SKIP: ["0"]}, "some layers that have a sliding window", "skip all of them by"),
        ({}, {SKIP: ["0"], "kv_offloading_size": 1.0}, "KV-cache offloading with", "remove --kv-offloading-size"),
        (LFM2, {"kv_offloading_size": 1.0}, "KV-cache offloading with state-space layers", "--kv-offloading-size"),
    ],
)
def test_layers_beside_ours(refusal, config, args, what, remedy):
    assert_sentence(refusal(config, **args), what, remedy)


def test_another_layout_beside_skipped_layers(refusal, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    assert_sentence(refusal(kv_cache_dtype_skip_layers=["0"]), "VLLM_KV_CACHE_LAYOUT=LBHNC", "unset the variable")
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT")
    assert refusal.create(kv_cache_dtype_skip_layers=["0"]).cache_config.kv_cache_layout == "BLHNC"


@pytest.mark.parametrize("beside", ["lfm2", "skipped"])
def test_drafters_beside_layers_that_are_not_ours(refusal, beside):
    """At the level of the check: vLLM wants a draft model's files before it gets there."""
    config = refusal.create(LFM2 if beside == "lfm2" else {})
    if beside == "skipped":
        config.cache_config.kv_cache_dtype_skip_layers = ["0"]
    config.speculative_config = SimpleNamespace(method="eagle")
    with pytest.raises(UnsupportedByOscar) as caught:
        checks._check_hybrid(config, "oscar")
        checks._check_skipped_layers(config, "oscar")
    assert_sentence(str(caught.value), "a drafter with a KV cache (eagle)", "remove --speculative-config")


def test_a_hybrid_is_accepted_with_hits_of_single_pages(refusal):
    assert refusal.create(LFM2).cache_config.prefix_match_unit == 128
    assert refusal.create().cache_config.prefix_match_unit is None


class Backend:
    """A backend for layers in the model's dtype."""

    get_name = staticmethod(lambda: "FLEX_ATTENTION")
    supported_kv_cache_layouts = staticmethod(lambda: (SimpleNamespace(name="LBNHC"),))


def test_a_backend_that_cannot_read_packed_pages():
    layer = SimpleNamespace(attn_backend=Backend, attn_type="decoder")
    cache, made = SimpleNamespace(cache_dtype="oscar", kv_cache_layout=None), {}
    config = SimpleNamespace(cache_config=cache, compilation_config=SimpleNamespace(static_forward_context=made))
    checks.check_wide_layer(layer, config)
    cache.kv_cache_layout = "BLHNC"
    with pytest.raises(UnsupportedByOscar) as caught:
        checks.check_wide_layer(layer, config)
    what = "layers in the model's dtype with FLEX_ATTENTION"
    assert_sentence(str(caught.value), what, "another --attention-backend")
    cache.cache_dtype = "auto"  # a drafter's configuration; only the layers made so far tell of ours
    checks.check_wide_layer(layer, config)
    made["of the target"] = SimpleNamespace(kv_cache_dtype="oscar_small")
    with pytest.raises(UnsupportedByOscar) as caught:
        checks.check_wide_layer(layer, config)
    assert_sentence(str(caught.value), what, "another --attention-backend")
    layer.attn_type = "encoder_only"
    checks.check_wide_layer(layer, config)


OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
NO_CONNECTOR = "use --kv-offloading-size with --kv-offloading-backend native, or remove --kv-transfer-config"
EAGLE = {"method": "eagle", "num_speculative_tokens": 2}


@pytest.mark.parametrize(
    "args, what, remedy",
    [
        pytest.param({"block_size": 64}, "--block-size 64", "--block-size 128", id="block-size"),
        pytest.param(
            {"kv_transfer_config": OFFLOADING | {"kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec"}}},
            "KV-cache offloading with spec_name 'TieringOffloadingSpec'",
            "remove spec_name from the kv_connector_extra_config",
            id="tiers",
        ),
        pytest.param(
            {"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"}, "LMCache", NO_CONNECTOR, id="lmcache"
        ),
        pytest.param(
            {"kv_transfer_config": OFFLOADING | {"kv_connector": "DecodeBenchConnector"}},
            "the KV connector DecodeBenchConnector",
            NO_CONNECTOR,
            id="connector",
        ),
        pytest.param({"prefix_match_unit": 64}, "hits that end inside a page", "remove --prefix-match-unit", id="unit"),
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


@pytest.mark.parametrize(
    "connector, extra, what, remedy",
    [
        ("LMCacheConnectorV1", {}, "LMCache, which knows one kind of block", NO_CONNECTOR),
        ("LMCacheMPConnector", {}, "LMCache, which knows one kind of block", NO_CONNECTOR),
        ("NixlConnector", {}, "NIXL, which would send rings as if they were pages", NO_CONNECTOR),
        ("MultiConnector", {}, "the KV connector MultiConnector", NO_CONNECTOR),
        ("OffloadingConnector", {"canonical_layout": True}, "with canonical_layout True", "remove canonical_layout"),
        ("SimpleCPUOffloadConnector", {"kv_offload_backend": "disk"}, "kv_offload_backend 'disk'", "remove kv_offload"),
    ],
)
def test_connectors(connector, extra, what, remedy):
    """At the level of the check: vLLM wants the packages of some before it gets there."""
    transfer = SimpleNamespace(kv_connector=connector, kv_connector_extra_config=extra)
    with pytest.raises(UnsupportedByOscar) as caught:
        checks._check_offloading(SimpleNamespace(kv_offloading_size=None), transfer, "oscar")
    assert_sentence(str(caught.value), what, remedy)


def test_offloading_to_the_host_is_accepted(refusal, monkeypatch):
    assert refusal.create(kv_offloading_size=1.0).kv_transfer_config.kv_connector == "OffloadingConnector"
    assert refusal.create(kv_transfer_config=OFFLOADING | {"kv_connector": "SimpleCPUOffloadConnector"})


def test_offloading_with_another_vllm(refusal):
    """Only offloading is refused if what it needs is missing."""
    import vanish

    from vllm_oscar.engine import symbols

    connector = next(s for s in symbols.OFFLOADING if s.name.endswith("get_num_new_matched_tokens"))
    with vanish.without(connector, "max_num_new_tokens"):
        assert refusal.create()
        what = "KV-cache offloading with this vLLM: vllm.distributed"
        assert_sentence(refusal(kv_offloading_size=1.0), what, "VLLM_USE_SIMPLE_KV_OFFLOAD=1")


@pytest.mark.parametrize("method", ["dflash", "dspark", "extract_hidden_states", "custom_class", "mlp_speculator"])
def test_other_methods_of_speculation(method):
    """At the level of the check: vLLM wants a drafter's files before it gets there."""
    with pytest.raises(UnsupportedByOscar) as caught:
        checks._check_speculation(SimpleNamespace(speculative_config=SimpleNamespace(method=method)), "oscar")
    assert_sentence(str(caught.value), repr(method), "eagle3, mtp in --speculative-config")


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix", "medusa"])
def test_speculation_without_a_cache_is_accepted(method):
    checks._check_speculation(SimpleNamespace(speculative_config=SimpleNamespace(method=method)), "oscar")


@pytest.fixture
def drafting(tmp_path):
    """``drafting(config, **options)``: engine arguments for a draft model."""

    def arguments(config: dict | None = None, **options) -> dict:
        draft = tmp_path / "draft"
        draft.mkdir()
        (draft / "config.json").write_text(json.dumps(LLAMA | (config or {})))
        speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
        return {"speculative_config": speculation | options}

    return arguments


def test_a_draft_model_is_accepted(refusal, drafting):
    assert refusal.create(**drafting()).speculative_config.method == "draft_model"


@pytest.mark.parametrize(
    "config, options, what, remedy",
    [
        pytest.param(
            {"num_key_value_heads": 1}, {}, "a drafter with 1 KV heads of 128 beside the target's 2 of 128",
            'let "kv_cache_dtype" in --speculative-config be "auto"', id="heads",
        ),
        pytest.param(
            {"head_dim": 64}, {}, "a drafter with 2 KV heads of 64 beside the target's 2 of 128",
            "or use a drafter of the target's shape", id="head size",
        ),
        pytest.param({"head_dim": 72}, {}, "head size 72 in the drafter", OTHER_MODEL, id="unsupported head size"),
        pytest.param(
            {}, {"kv_cache_dtype": "fp8"}, "a drafter with KV-cache dtype fp8",
            'remove "kv_cache_dtype" from --speculative-config, or let it be "auto"', id="dtype",
        ),
        pytest.param(
            {"pard_token": 3}, {"parallel_drafting": True}, "parallel drafting", 'remove "parallel_drafting"',
            id="parallel",
        ),
    ],
)  # fmt: skip
def test_a_draft_model_that_does_not_fit(refusal, drafting, config, options, what, remedy):
    assert_sentence(refusal(**drafting(config, **options)), what, remedy)


@pytest.mark.parametrize("config", [{}, {"num_key_value_heads": 1, "head_dim": 64}])
def test_a_drafter_in_the_models_dtype_is_accepted(refusal, drafting, config):
    """Whatever its shape; its pages and ours are packed into blocks."""
    assert refusal.create(**drafting(config, kv_cache_dtype="auto")).cache_config.kv_cache_layout == "BLHNC"


def test_what_a_drafter_in_the_models_dtype_is_refused_beside(refusal, drafting, monkeypatch):
    wide, remedy = drafting(kv_cache_dtype="auto"), 'remove "kv_cache_dtype" from --speculative-config'
    assert_sentence(refusal(**wide, kv_offloading_size=1.0), "a drafter in the model's dtype", remedy)
    assert_sentence(refusal(**wide, kv_cache_dtype_skip_layers=["0"]), "a drafter with a KV cache", "remove")
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    assert_sentence(refusal(**wide), "a drafter in the model's dtype", "unset the variable")


def test_fewer_ranks_for_the_drafter_name_their_option(refusal, drafting):
    """At the level of the check: vLLM refuses it for a draft model, but not for EAGLE."""
    config = refusal.create(**drafting(), tensor_parallel_size=2)
    config.speculative_config.draft_parallel_config.tensor_parallel_size = 1
    with pytest.raises(UnsupportedByOscar) as caught:
        checks._check_speculation(config, "oscar")
    what = "a drafter with 2 KV heads of 128 beside the target's 1 of 128"
    assert_sentence(str(caught.value), what, 'remove "draft_tensor_parallel_size"')


@pytest.mark.parametrize("kind", ["gemma4_mtp", "step3p5_mtp", "inkling_mtp"])
def test_kinds_of_mtp_with_a_drafter_of_their_own(refusal, drafting, kind):
    config = refusal.create(**drafting())
    config.speculative_config.draft_model_config.hf_config.model_type = kind
    with pytest.raises(UnsupportedByOscar) as caught:
        checks._check_speculation(config, "oscar")
    assert_sentence(str(caught.value), kind, "remove --speculative-config")


def test_a_drafter_in_our_pages_beside_another_target(refusal, drafting):
    """vLLM up to 0.32 does not know our dtypes there, so the setting is made behind its back."""
    from vllm.platforms import current_platform

    config = refusal.create(**drafting(), kv_cache_dtype="auto")
    config.speculative_config.kv_cache_dtype = "oscar"
    with pytest.raises(UnsupportedByOscar) as caught:
        current_platform.check_and_update_config(config)
    what = "a drafter whose target has another KV-cache dtype"
    assert_sentence(str(caught.value), what, "use --kv-cache-dtype oscar")


def test_a_draft_model_whose_pages_are_not_the_first_group():
    checks.check_draft_group("draft_model", 0, "oscar")
    checks.check_draft_group("eagle", 1, "oscar")
    with pytest.raises(UnsupportedByOscar) as caught:
        checks.check_draft_group("draft_model", 1, "oscar")
    assert_sentence(str(caught.value), "a draft model whose pages are not", "set VLLM_USE_V2_MODEL_RUNNER=1")


def test_ngram_speculation_is_accepted(refusal):
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    assert refusal.create(speculative_config=speculation).speculative_config.method == "ngram"


def test_an_unknown_dtype_names_the_known_ones(refusal):
    found = refusal(kv_cache_dtype="oscar_tiny")
    assert found == "--kv-cache-dtype oscar_tiny is no preset; choose one of " + ", ".join(PRESETS)


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


@pytest.mark.parametrize("kernels", ["Triton", "cutlass"])
def test_unknown_kernels(refusal, monkeypatch, kernels):
    monkeypatch.setenv("VLLM_OSCAR_KERNELS", kernels)
    assert refusal().startswith(f"VLLM_OSCAR_KERNELS='{kernels}' is unknown; use one of ")


@pytest.mark.parametrize("version", ["0.28.1", "0.34.0", "1.0.0"])
def test_an_unsupported_vllm_is_named_and_left_alone(monkeypatch, log, version):
    import vllm

    from vllm_oscar.engine import compat, plugin

    refused = []
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(compat, "apply", lambda: pytest.fail("patched an unsupported vLLM"))
    monkeypatch.setattr(compat, "refuse_dtypes", refused.append)
    plugin.register()
    short = ".".join(version.split(".")[:2])
    (sentence,) = refused
    assert sentence.startswith(f"vllm-oscar supports vLLM 0.29 to 0.33, but vLLM {short} is installed; ")
    assert "install a supported vLLM" in sentence and log == [sentence]


def test_sleep_mode(refusal):
    """At the level of the check: vLLM itself refuses sleep mode on the CPU."""
    config = refusal.create()
    config.model_config.enable_sleep_mode = True
    assert_sentence(refused_by_check(config), "sleep mode", "remove --enable-sleep-mode")


def test_batch_invariant_mode(refusal, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert_sentence(refusal(), "batch-invariant mode", "unset VLLM_BATCH_INVARIANT")


@pytest.mark.parametrize(
    "options, ignored",
    [
        ({"attention_backend": "TRITON_ATTN"}, "TRITON_ATTN"),
        ({"attention_config": {"backend_per_kind": {"full_attention": "FLEX_ATTENTION"}}}, "FLEX_ATTENTION"),
        ({"attention_backend": "OSCAR"}, None),
        ({}, None),
    ],
)
def test_another_attention_backend_is_ignored_with_one_line(refusal, log, options, ignored):
    refusal.create(**options)
    line = f"--attention-backend {ignored} is ignored: only OScaR's own backend reads --kv-cache-dtype oscar."
    assert log == ([line] if ignored else [])


def test_other_dtypes_are_untouched(refusal):
    config = refusal.create(MISTRAL, kv_cache_dtype="auto")
    assert config.cache_config.cache_dtype == "auto"
    assert refusal.create(kv_cache_dtype="auto", kv_cache_dtype_skip_layers=["0"])


def test_too_little_memory_names_the_setting(engine_host):
    from vllm_engine import EngineError

    with pytest.raises(EngineError) as caught:
        engine_host.start("oscar", kv_cache_memory_bytes=1 << 20)
    assert "max_model_len" in str(caught.value)


# ---- layers that differ --------------------------------------------------------------
def test_layers_with_different_kv_heads_in_the_configuration(refusal):
    blocks = [{"attention": {"n_heads_in_group": n, "no_op": False}, "ffn": {"no_op": False}} for n in (1, 2)]
    assert_sentence(refusal({"block_configs": blocks}), "layers that differ in KV heads or head size", OTHER_MODEL)


def test_layers_that_are_alike_but_for_one_without_attention(refusal):
    blocks = [{"attention": {"n_heads_in_group": 1, "no_op": False}}, {"attention": {"no_op": True}}]
    assert refusal.create({"block_configs": blocks})


@pytest.mark.parametrize(
    "change, what",
    [
        ({"num_kv_heads": 1}, "layers that differ in KV heads or head size (b has 1 heads of 128, a 2 of 128)"),
        ({"head_size": 64}, "layers that differ in KV heads or head size (b has 2 heads of 64, a 2 of 128)"),
        ({"head_size_v": 64}, "values of 64 channels beside keys of 128"),
        ({"attn_backend": "another"}, "the attention of b (Another)"),
    ],
)
def test_layers_that_the_configuration_did_not_tell(refusal, change, what):
    """Real layers, as a model makes them."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from vllm_oscar.engine.backend import OscarBackend

    if "attn_backend" in change:
        change = {"attn_backend": type("Another", (OscarBackend,), {})}
    config = refusal.create()
    shape = {"num_heads": 2, "head_size": 128, "scale": 0.1, "num_kv_heads": 2, "cache_config": config.cache_config}
    with set_current_vllm_config(config):
        Attention(**shape, prefix="a")
        Attention(**shape, prefix="same")
        with pytest.raises(UnsupportedByOscar) as caught:
            Attention(**shape | change, prefix="b")
    assert_sentence(str(caught.value), what, OTHER_MODEL)


# ---- what vLLM's own rules say of a layer -----------------------------------------------
@pytest.fixture
def plain():
    """The selection of a plain layer, which is accepted."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="oscar", block_size=128)


def selection_refusal(config, capability=None) -> str:
    with pytest.raises(UnsupportedByOscar) as caught:
        checks.check_selection(config, capability)
    return str(caught.value)


@pytest.mark.parametrize(
    "change, what, remedy",
    [
        ({"use_mla": True}, "multi-head latent attention (MLA)", OTHER_MODEL),
        ({"use_sparse": True}, "sparse attention", OTHER_MODEL),
        ({"use_mm_prefix": True}, "bidirectional multimodal prefixes", "--language-model-only"),
        ({"use_per_head_quant_scales": True}, "a checkpoint with KV scales per head", OTHER_MODEL),
        ({"use_non_causal": True}, "non-causal attention", OTHER_MODEL),
        ({"use_batch_invariant": True}, "batch-invariant mode", "unset VLLM_BATCH_INVARIANT"),
        ({"use_pcp": True}, "prefill context parallelism", "remove --prefill-context-parallel-size"),
        ({"use_dcp": True}, "decode context parallelism", "remove --decode-context-parallel-size"),
        ({"use_adaptive_verification": True}, "adaptive verification", "remove --speculative-config"),
        ({"use_rswa": True}, "R-SWA", OTHER_MODEL),
        ({"attn_type": "encoder_only"}, "attention type encoder_only", OTHER_MODEL),
        ({"head_size": 72}, "head size 72 (supported: 64, ", OTHER_MODEL),
        ({"dtype": torch.float64}, "the model dtype torch.float64", "--dtype bfloat16"),
        ({"block_size": 64}, "--block-size 64", "--block-size 128"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_layer_that_is_not_plain_attention(plain, change, what, remedy):
    checks.check_selection(plain)
    assert_sentence(selection_refusal(plain._replace(**change)), what, remedy)


def test_every_flag_of_a_selection_is_refused(plain):
    """Flags of a vLLM to come, too: whatever a backend must declare, ours does not."""
    supported = {"has_sink", "has_sliding_window", "use_kv_connector"}  # check_config refuses connectors by name
    flags = [name for name, value in plain._asdict().items() if value is False and name not in supported]
    assert len(flags) > 8
    checks.check_selection(plain._replace(**dict.fromkeys(supported, True)))
    for flag in flags:
        assert_sentence(selection_refusal(plain._replace(**{flag: True})), "", " ")


def test_every_reason_of_vllm_has_our_words():
    from vllm.v1.attention.backend import AttentionBackend

    tree = ast.parse(textwrap.dedent(inspect.getsource(AttentionBackend.validate_configuration)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    said = [call.args[0] for call in calls if call.func.attr == "append"]
    reasons = {reason.value for reason in said if isinstance(reason, ast.Constant)}
    # Said only of other dtypes, of backends for MLA or sparse attention alone, after "MLA not supported", and of
    # backends that cannot do what ours can.
    never = {
        "kv_cache_dtype not supported",
        "non-MLA not supported",
        "non-sparse not supported",
        "non-causal MLA attention with DCP not supported",
        # Supported.
        "attention sinks not supported",
        "sliding window not supported",
        "KV connector not supported",
    }
    assert len(reasons) > 12
    assert reasons - never == set(checks._REASONS)


def test_what_a_gpu_must_be_able_to_do(plain, monkeypatch):
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    old, ampere, hopper = (DeviceCapability(*version) for version in ((7, 5), (8, 0), (9, 0)))
    for capability in (ampere, hopper, None):
        checks.check_selection(plain, capability)
    assert_sentence(selection_refusal(plain, old), "this GPU", "8.0 or newer")
    float32 = plain._replace(dtype=torch.float32)
    checks.check_selection(float32)  # on a CPU
    assert_sentence(selection_refusal(float32, hopper), "the model dtype torch.float32", "--dtype bfloat16")
    # The platform's capability is the one that counts.
    monkeypatch.setattr(type(current_platform), "get_device_capability", classmethod(lambda cls: hopper))
    with pytest.raises(UnsupportedByOscar, match="float32"):
        current_platform.get_attn_backend_cls(None, float32)


@pytest.mark.parametrize(
    "arguments, what",
    [
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "layers that share a KV cache"),
    ],
)
def test_an_impl_with_an_unsupported_argument(arguments, what):
    from vllm_oscar.engine.impl import OscarImpl

    with pytest.raises(UnsupportedByOscar) as caught:
        OscarImpl(2, 128, 0.1, kv_cache_dtype="oscar", **arguments)
    assert_sentence(str(caught.value), what, OTHER_MODEL)


# ---- how a refusal reaches the user ------------------------------------------------------
VLLM = str(Path(sys.executable).with_name("vllm"))
COMMANDS = {
    "serve": ["serve", str(MODEL)],
    "LLM": ["bench", "throughput", "--model", str(MODEL), "--input-len", "8", "--output-len", "8"],  # calls LLM(...)
}


@pytest.mark.parametrize("way", ["serve", pytest.param("LLM", marks=pytest.mark.slow)])
def test_a_refusal_is_a_line_and_not_a_traceback(way):
    command = [VLLM, *COMMANDS[way], "--kv-cache-dtype", "oscar", "--block-size", "64"]
    env = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_KVCACHE_SPACE="1")
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    name, sentence = result.stderr.splitlines()[-1].split(": ", 1)
    assert name == "vllm-oscar"
    assert_sentence(sentence, "--block-size 64", "--block-size 128")


def test_tracebacks_of_others_and_at_debug_level_remain(monkeypatch, capsys):
    from vllm_oscar.engine import plugin

    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: seen.append(error))
    for _ in range(2):  # twice makes no difference
        plugin.show_refusals_alone()
    refusal, other = UnsupportedByOscar("a sentence"), ValueError("of somebody else")
    sys.excepthook(UnsupportedByOscar, refusal, None)
    assert capsys.readouterr().err == "vllm-oscar: a sentence\n" and not seen
    sys.excepthook(ValueError, other, None)
    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.DEBUG)
    logging.getLogger("vllm").manager._clear_cache()
    sys.excepthook(UnsupportedByOscar, refusal, None)
    assert seen == [other, refusal]
