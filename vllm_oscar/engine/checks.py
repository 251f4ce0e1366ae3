# SPDX-License-Identifier: Apache-2.0
"""What OScaR refuses at start-up: one sentence each, with the setting to change.

Raised while the configuration is made, so the user sees it before any worker starts.
A feature leaves this list when a test shows that it works.
"""

from __future__ import annotations

import logging

from vllm_oscar.core import envs
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope

logger = logging.getLogger("vllm.oscar")


class UnsupportedByOscar(ValueError):
    """The requested combination cannot be served with an OScaR KV cache."""


_AUTO = "or serve this model with --kv-cache-dtype auto"


def _refuse(dtype: str, what: str, remedy: str) -> None:
    raise UnsupportedByOscar(f"--kv-cache-dtype {dtype} does not support {what}; {remedy}")


def check_config(vllm_config) -> None:
    """Refuse what is not supported and set what OScaR needs (block size 128).

    Raises :class:`UnsupportedByOscar`.
    """
    cache, dtype = vllm_config.cache_config, vllm_config.cache_config.cache_dtype
    if cache.user_specified_block_size and cache.block_size != PAGE_TOKENS:
        _refuse(dtype, f"--block-size {cache.block_size}", f"remove the option or use --block-size {PAGE_TOKENS}")
    cache.block_size = PAGE_TOKENS
    if cache.kv_cache_dtype_skip_layers:
        _refuse(dtype, "--kv-cache-dtype-skip-layers (every page would grow to 16-bit size)", "remove the option")
    if getattr(cache, "kv_offloading_size", None) is not None:
        _refuse(dtype, "KV-cache offloading", "remove --kv-offloading-size")
    if vllm_config.kv_transfer_config is not None:
        _refuse(dtype, "KV connectors", "remove --kv-transfer-config")
    if getattr(cache, "prefix_match_unit", None) not in (None, PAGE_TOKENS):
        _refuse(dtype, "prefix hits inside a page", "remove --prefix-match-unit")
    _check_parallelism(vllm_config.parallel_config, dtype)
    _check_speculation(vllm_config.speculative_config, dtype)
    if vllm_config.model_config is not None:
        _check_model(vllm_config.model_config, dtype)
    envs.deterministic()  # refuses values that it does not know, before a kernel asks
    if envs.lossless_codec():
        logger.warning(
            "VLLM_OSCAR_CODEC=lossless: the KV cache is NOT compressed. This is a test mode; unset it to serve."
        )
    if PRESETS[dtype].norm is NormScope.JOINT and vllm_config.parallel_config.tensor_parallel_size > 1:
        logger.warning(
            "%s takes one key norm over all KV heads of a rank, so its numerics depend on the tensor-parallel size.",
            dtype,
        )


def _check_parallelism(parallel, dtype: str) -> None:
    for option, size in (
        ("decode-context-parallel-size", getattr(parallel, "decode_context_parallel_size", 1)),
        ("prefill-context-parallel-size", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if size > 1:
            _refuse(dtype, f"--{option} {size}", "remove the option")


def _check_speculation(speculative, dtype: str) -> None:
    if speculative is not None and speculative.method != "ngram":
        _refuse(
            dtype,
            f"speculative decoding with method {speculative.method!r}",
            'use {"method": "ngram"} or remove --speculative-config',
        )


def _check_model(model, dtype: str) -> None:
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ())
    window = model.get_sliding_window() if hasattr(model, "get_sliding_window") else None
    refusals = (
        ("multi-head latent attention (MLA)", model.use_mla),
        ("encoder-decoder models", model.is_encoder_decoder),
        ("encoder or pooling models", model.runner_type == "pooling"),
        ("models with state-space or linear-attention layers", model.is_hybrid or model.is_attention_free),
        ("sliding-window attention", window is not None or "sliding_attention" in layer_types),
        ("chunked local attention", "chunked_attention" in layer_types),
        ("logit soft-capping", bool(getattr(text, "attn_logit_softcapping", None))),
        ("ALiBi", bool(getattr(text, "alibi", False)) or model.hf_config.model_type in ("bloom", "mpt")),
        ("attention sinks", model.hf_config.model_type == "gpt_oss"),
        ("bidirectional multimodal prefixes", getattr(model, "is_mm_prefix_lm", False)),
    )
    for what, present in refusals:
        if present:
            _refuse(dtype, what, f"choose another model, {_AUTO}")
    head_dim = model.get_head_size()
    if head_dim not in SUPPORTED_HEAD_DIMS:
        known = ", ".join(map(str, SUPPORTED_HEAD_DIMS))
        _refuse(dtype, f"head size {head_dim} (supported: {known})", f"choose another model, {_AUTO}")


def check_selection(selector_config) -> None:
    """The same for one layer, with what only the layer knows. Raises :class:`UnsupportedByOscar`."""
    from vllm_oscar.engine.backend import OscarBackend

    dtype = selector_config.kv_cache_dtype
    for attribute, what in (
        ("use_mla", "multi-head latent attention (MLA)"),
        ("has_sink", "attention sinks"),
        ("use_sparse", "sparse attention"),
        ("use_mm_prefix", "bidirectional multimodal prefixes"),
        ("has_sliding_window", "sliding-window attention"),
        ("use_non_causal", "non-causal attention"),
    ):
        if getattr(selector_config, attribute, False):
            _refuse(dtype, what, f"choose another model, {_AUTO}")
    if not OscarBackend.supports_head_size(selector_config.head_size):
        _refuse(dtype, f"head size {selector_config.head_size}", f"choose another model, {_AUTO}")
    if not OscarBackend.supports_attn_type(selector_config.attn_type):
        _refuse(dtype, f"{selector_config.attn_type} attention", f"choose another model, {_AUTO}")
