# SPDX-License-Identifier: Apache-2.0
"""Every symbol of vLLM that the plugin imports, calls, overrides or reads, in one table.

:func:`missing` holds the running vLLM against it before anything is patched, so that a
vLLM that lacks something still serves all else. ``tests/check_vllm_sources.py`` holds the
sources of other versions against it, and ``tests/test_symbols.py`` our code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import NamedTuple


class Symbol(NamedTuple):
    """A function, class, method ``Class.method``, class variable or module variable.

    Attributes:
        module: below ``vllm``; ``PLATFORM`` is the class of the running platform.
        name: in that module.
        names: first parameters in their order, or fields of a class in any order.
        sets: attributes that the method, most times ``__init__``, gives the instance.
    """

    module: str
    name: str
    names: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


PLATFORM = "platforms.*"

ALWAYS = (
    # compat.py
    Symbol("envs", "environment_variables"),
    Symbol("config", "get_current_vllm_config"),
    Symbol("engine.arg_utils", "EngineArgs", ("kv_cache_dtype",)),
    Symbol("engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    Symbol("v1.attention.backends.registry", "AttentionBackendEnum.CUSTOM"),
    Symbol("v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
    Symbol("v1.kv_cache_spec_registry", "KVCacheSpecRegistry._ensure_registered"),
    Symbol(
        "v1.kv_cache_spec_registry",
        "KVCacheSpecRegistry.register",
        ("cls", "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    Symbol("platforms", "current_platform"),
    Symbol(PLATFORM, "get_attn_backend_cls", ("cls", "selected_backend", "attn_selector_config")),
    Symbol(PLATFORM, "check_and_update_config", ("cls", "vllm_config")),
    Symbol(PLATFORM, "get_device_capability"),
    Symbol(PLATFORM, "_align_heterogeneous_kv_block_size", ("cls", "vllm_config", "backend_cls")),
    Symbol("model_executor.layers.attention", "Attention"),
    Symbol(
        "model_executor.layers.attention.attention",
        "Attention.__init__",
        ("self", "num_heads", "head_size"),
        sets=(
            "attn_backend",
            "attn_type",
            "dtype",
            "head_size",
            "head_size_v",
            "impl",
            "kv_cache",
            "kv_cache_dtype",
            "layer_name",
            "num_kv_heads",
            "sliding_window",
        ),
    ),
    Symbol("model_executor.layers.attention.attention", "Attention.get_kv_cache_spec", ("self", "vllm_config")),
    Symbol("v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer"),
    Symbol(
        "v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.__init__",
        ("self", "vllm_config", "device"),
        sets=("vllm_config", "method"),
    ),
    Symbol(
        "v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.load_model",
        ("self", "target_model"),
        sets=("_draft_attn_layer_names",),
    ),
    Symbol(
        "v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.initialize_attn_backend",
        ("self", "kv_cache_config"),
        sets=("kv_cache_gid",),
    ),
    # checks.py
    Symbol("config", "set_current_vllm_config", ("vllm_config",)),
    Symbol("config.attention", "AttentionConfig", ("backend", "backend_per_kind")),
    Symbol("v1.attention.selector", "get_attn_backend", ("head_size", "dtype", "kv_cache_dtype")),
    Symbol(
        "v1.attention.selector",
        "AttentionSelectorConfig",
        ("head_size", "dtype", "kv_cache_dtype", "block_size", "attn_type"),
    ),
    Symbol("v1.attention.backend", "AttentionBackend.validate_configuration", ("cls", "head_size", "dtype")),
    Symbol("config", "VllmConfig"),
    Symbol(
        "config.vllm",
        "VllmConfig",
        (
            "attention_config",
            "cache_config",
            "compilation_config",
            "device_config",
            "kv_transfer_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    ),
    Symbol("config.vllm", "VllmConfig.num_speculative_tokens"),
    Symbol(
        "config.cache",
        "CacheConfig",
        (
            "block_size",
            "cache_dtype",
            "kv_cache_dtype_skip_layers",
            "kv_cache_layout",
            "kv_offloading_backend",
            "kv_offloading_size",
            "prefix_match_unit",
            "sliding_window",
            "user_specified_block_size",
        ),
    ),
    Symbol("config.compilation", "CompilationConfig", ("max_cudagraph_capture_size", "static_forward_context")),
    Symbol("config.device", "DeviceConfig", ("device_type",)),
    Symbol("config.kv_transfer", "KVTransferConfig", ("kv_connector", "kv_connector_extra_config")),
    Symbol("config.model", "ModelConfig", ("dtype", "enable_sleep_mode", "hf_config", "hf_text_config")),
    *(
        Symbol("config.model", f"ModelConfig.{name}")
        for name in (
            "get_head_size",
            "get_num_kv_heads",
            "is_attention_free",
            "is_encoder_decoder",
            "is_hybrid",
            "is_mm_prefix_lm",
            "use_mla",
        )
    ),
    Symbol("config.model", "ModelConfig.__post_init__", sets=("hf_text_config", "runner_type")),
    Symbol(
        "config.parallel",
        "ParallelConfig",
        ("decode_context_parallel_size", "prefill_context_parallel_size", "tensor_parallel_size"),
    ),
    Symbol("config.scheduler", "SchedulerConfig", ("max_num_batched_tokens", "max_num_seqs")),
    Symbol(
        "config.speculative",
        "SpeculativeConfig",
        ("draft_model_config", "draft_parallel_config", "kv_cache_dtype", "method", "parallel_drafting"),
    ),
    # scheduler.py, tail.py
    Symbol("model_executor.layers.attention_layer_base", "AttentionLayerBase"),
    Symbol("model_executor.layers.attention_layer_base", "AttentionLayerBase.get_attn_backend", ("self",)),
    Symbol(
        "model_executor.layers.attention_layer_base", "AttentionLayerBase.get_kv_cache_spec", ("self", "vllm_config")
    ),
    Symbol("utils.math_utils", "cdiv", ("a", "b")),
    Symbol("v1.core.kv_cache_utils", "KVCacheBlock", ("block_id", "ref_cnt", "is_null")),
    Symbol("v1.core.kv_cache_utils", "KVCacheBlock.block_hash_num_tokens"),
    Symbol("v1.core.block_pool", "BlockPool.__init__", ("self", "num_gpu_blocks"), sets=("num_gpu_blocks",)),
    Symbol("v1.core.block_pool", "BlockPool.get_new_blocks", ("self", "num_blocks")),
    Symbol("v1.kv_cache_interface", "KVCacheSpec", ("block_size",)),
    Symbol("v1.kv_cache_interface", "AttentionSpec", ("num_kv_heads", "head_size", "dtype", "state_content_bytes")),
    Symbol("v1.kv_cache_interface", "AttentionSpec.page_size_bytes"),
    Symbol("v1.kv_cache_interface", "KVCacheConfig", ("kv_cache_groups",)),
    Symbol("v1.kv_cache_interface", "KVCacheConfig.needs_kv_cache_zeroing"),
    Symbol("v1.kv_cache_interface", "FullAttentionSpec"),
    Symbol("v1.kv_cache_interface", "replace_as", ("spec", "target_cls")),
    Symbol("v1.kv_cache_interface", "CircularBufferSpec"),
    Symbol("v1.kv_cache_interface", "CircularBufferSpec.max_memory_usage_bytes", ("self", "vllm_config")),
    Symbol("v1.kv_cache_interface", "CircularBufferSpec.max_num_blocks_per_req", ("self", "vllm_config", "max_len")),
    Symbol("v1.kv_cache_interface", "CircularBufferSpec.is_uniform_with_collection", ("self", "kv_cache_specs")),
    Symbol("v1.core.single_type_kv_cache_manager", "CircularBufferManager"),
    Symbol(
        "v1.core.single_type_kv_cache_manager",
        "SingleTypeKVCacheManager.__init__",
        ("self", "kv_cache_spec", "block_pool"),
        sets=("block_pool", "kv_cache_spec", "num_cached_block", "req_to_blocks"),
    ),
    Symbol(
        "v1.core.single_type_kv_cache_manager",
        "SingleTypeKVCacheManager._has_partial_local_hit",
        ("self", "new_computed_blocks", "num_local_computed_tokens"),
    ),
    Symbol("v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager.new_step_starts", ("self",)),
    # Before those of its base class, which is what a method missing there would be called otherwise.
    *(
        Symbol("v1.core.single_type_kv_cache_manager", f"CircularBufferManager.{method}", ("self", *parameters))
        for method, *parameters in (
            ("_claim_ring_block", "request_id"),
            ("get_num_blocks_to_allocate", "request_id", "num_tokens"),
            ("allocate_new_blocks", "request_id"),
            ("cache_blocks", "request", "num_tokens"),
            (
                "add_local_computed_blocks",
                "request_id",
                "new_computed_blocks",
                "num_local_computed_tokens",
                "num_external_computed_tokens",
            ),
        )
    ),
    Symbol("v1.core.single_type_kv_cache_manager", "FullAttentionManager"),
    Symbol(
        "v1.core.single_type_kv_cache_manager", "FullAttentionManager.cache_blocks", ("self", "request", "num_tokens")
    ),
    Symbol(
        "v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.get_num_blocks_to_allocate",
        (
            "self",
            "request_id",
            "num_tokens",
            "new_computed_blocks",
            "total_computed_tokens",
            "num_local_computed_tokens",
        ),
    ),
    Symbol(
        "v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager.pop_blocks_for_free", ("self", "request_id")
    ),
    # metadata.py, backend.py, impl.py
    *(
        Symbol("v1.attention.backend", name)
        for name in ("AttentionBackend", "AttentionImpl", "AttentionMetadata", "AttentionMetadataBuilder")
    ),
    *(
        Symbol("v1.attention.backend", f"AttentionBackend.{member}")
        for member in (
            "customize_spec",
            "forward_includes_kv_cache_update",
            "get_builder_cls",
            "get_impl_cls",
            "get_name",
            "get_supported_head_sizes",
            "get_supported_kernel_block_sizes",
            "supported_dtypes",
            "supported_kv_cache_dtypes",
            "supported_kv_cache_layouts",
            "supports_combination",
            "supports_compute_capability",
            "supports_device_cpu_query_lens_mismatch",
            "supports_kv_connector",
            "supports_sink",
            "supports_sliding_window",
        )
    ),
    Symbol(
        "v1.attention.backend",
        "AttentionMetadataBuilder.__init__",
        ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        sets=("device", "kv_cache_spec", "layer_names", "vllm_config"),
    ),
    Symbol(
        "v1.attention.backend",
        "AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Symbol(
        "v1.attention.backend",
        "AttentionMetadataBuilder._init_reorder_batch_threshold",
        ("self", "reorder_batch_threshold", "supports_spec_as_decode"),
    ),
    Symbol("v1.attention.backend", "AttentionMetadataBuilder.get_cudagraph_support", ("cls", "vllm_config")),
    Symbol(
        "v1.attention.backend",
        "AttentionMetadataBuilder.build_for_drafting",
        ("self", "common_attn_metadata", "draft_index"),
    ),
    Symbol("v1.attention.backend", "AttentionMetadataBuilder.supports_draft_decode_metadata_update"),
    Symbol("v1.attention.backend", "AttentionMetadataBuilder.update_draft_decode_metadata", ("self", "metadata")),
    Symbol("v1.attention.backend", "AttentionMetadataBuilder.reorder_batch_threshold"),
    Symbol(
        "v1.attention.backend",
        "AttentionImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    Symbol("v1.attention.backend", "AttentionImpl.__init__", ("self", "num_heads", "head_size", "scale")),
    Symbol("v1.attention.backend", "AttentionImplBase.process_weights_after_loading", ("self", "act_dtype")),
    Symbol(
        "v1.attention.backend",
        "CommonAttentionMetadata",
        (
            "block_table_tensor",
            "max_query_len",
            "num_actual_tokens",
            "num_reqs",
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        ),
    ),
    Symbol("v1.attention.backend", "AttentionCGSupport.NEVER"),
    Symbol("v1.attention.backend", "AttentionType.DECODER"),
    Symbol("v1.kv_cache_interface", "KVCacheLayout"),
    Symbol("v1.kv_cache_layout", "KVCacheLayout.LBHNC"),
    Symbol("v1.kv_cache_layout", "KVCacheLayout.BLHNC"),
    Symbol("forward_context", "get_forward_context"),
    Symbol("forward_context", "ForwardContext", ("attn_metadata",)),
)

# What KV offloading needs besides; without it, only that is refused.
_OFFLOADER = "distributed.kv_transfer.kv_connector.v1.offloading.scheduler"
OFFLOADING = (
    Symbol(
        _OFFLOADER,
        "OffloadingConnectorScheduler.__init__",
        ("self", "spec", "vllm_config", "kv_cache_config"),
        sets=("_current_batch_allocated_block_ids", "_sliding_window_groups"),
    ),
    Symbol(
        _OFFLOADER,
        "OffloadingConnectorScheduler.get_num_new_matched_tokens",
        ("self", "request", "num_computed_tokens", "max_num_new_tokens"),
    ),
    Symbol(_OFFLOADER, "OffloadingConnectorScheduler._update_req_states", ("self", "scheduler_output")),
    Symbol("distributed.kv_transfer.kv_connector.utils", "yield_req_data", ("scheduler_output",)),
)

# Patched in a worker on a CPU, which looks then: importing it takes seconds, in processes that do not need it.
CPU_RUNNER = (
    Symbol("v1.worker.cpu_model_runner", "CPUModelRunner"),
    Symbol("v1.worker.cpu_model_runner", "CPUModelRunner._zero_block_ids", ("self", "block_ids")),
    Symbol(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner.__init__",
        ("self", "vllm_config"),
        sets=("cache_config", "compilation_config"),
    ),
)

# What ops/dense_prefill.py calls on GPUs. It looks for itself, and does without: prefill is slower then.
DENSE_PREFILL = (
    Symbol("v1.attention.backends.fa_utils", "get_flash_attn_version", ("requires_alibi", "head_size")),
    Symbol(
        "vllm_flash_attn.flash_attn_interface",
        "flash_attn_varlen_func",
        tuple(
            "q k v max_seqlen_q cu_seqlens_q max_seqlen_k cu_seqlens_k seqused_k q_v dropout_p softmax_scale causal "
            "window_size softcap alibi_slopes deterministic return_attn_probs block_table return_softmax_lse out "
            "scheduler_metadata q_descale k_descale v_descale num_splits output_scale fa_version".split()
        ),
    ),
    Symbol(
        "v1.attention.ops.merge_attn_states",
        "merge_attn_states",
        ("output", "prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output_lse"),
    ),
)

# The two ways to add a dtype: either all of the first or all of the second.
NEW_DTYPE = (
    Symbol("config.cache", "register_kv_cache_dtype", ("name",)),
    Symbol("config.cache", "get_kv_cache_dtype_handler", ("name",)),
    Symbol("v1.kv_cache_interface", "KVQuantMode.NONE"),
)
OLD_DTYPE = (
    Symbol("config.cache", "CacheDType"),
    Symbol("v1.attention.selector", "CacheDType"),
    Symbol("utils.torch_utils", "STR_DTYPE_TO_TORCH_DTYPE"),
    Symbol("engine.arg_utils", "_compute_kwargs", ("cls",)),
)


def _platform() -> type:
    from vllm.platforms import current_platform

    return type(current_platform)


def _fields(cls: type) -> set[str]:
    """Fields of a dataclass or named tuple, and whatever else the class and its bases declare."""
    found = set(getattr(cls, "_fields", ())) | set(getattr(cls, "__dataclass_fields__", ()))
    for base in cls.__mro__:
        found |= set(base.__dict__.get("__annotations__", ()))
    return found


def problem(symbol: Symbol) -> str | None:
    """What the running vLLM lacks of ``symbol``, as the end of a sentence."""
    where = "the platform" if symbol.module == PLATFORM else f"vllm.{symbol.module}"
    try:
        found = _platform() if symbol.module == PLATFORM else importlib.import_module(where)
    except ImportError as error:
        return f"{where} cannot be imported ({error})"
    parts = symbol.name.split(".")
    for count, part in enumerate(parts, 1):
        declared = isinstance(found, type) and part in _fields(found)
        if not declared and not hasattr(found, part):
            return f"{where} has no {'.'.join(parts[:count])}"
        found = getattr(found, part, None)
    if isinstance(found, type):
        absent = [name for name in symbol.names if name not in _fields(found)]
        return f"{where}: {symbol.name} has no {', '.join(absent)}" if absent else None
    function = inspect.unwrap(getattr(found, "__func__", found)) if symbol.names or symbol.sets else None
    if symbol.names:
        parameters = tuple(inspect.signature(function).parameters)
        if parameters[: len(symbol.names)] != symbol.names:
            return f"{where}: {symbol.name} takes ({', '.join(parameters)}), not ({', '.join(symbol.names)}, ...)"
    # Another plugin's wrapper says nothing about the function inside it.
    if symbol.sets and getattr(function, "__module__", "").startswith("vllm."):
        absent = [name for name in symbol.sets if name not in function.__code__.co_names]
        if absent:
            return f"{where}: {symbol.name} sets no {', '.join(absent)}"
    return None


def needed(module_has) -> Iterator[Symbol]:
    """The symbols that one vLLM needs: of the two ways to add a dtype only the one that it has.

    ``module_has(symbol)``: whether that vLLM has ``symbol``.
    """
    yield from ALWAYS
    yield from NEW_DTYPE if all(map(module_has, NEW_DTYPE)) else OLD_DTYPE


def missing(table: tuple[Symbol, ...] | None = None) -> str | None:
    """The first thing that the running vLLM lacks, as the end of a sentence; None if it lacks nothing.

    ``table``: such as ``OFFLOADING``; what all of the plugin needs unless given.
    """
    for symbol in needed(lambda symbol: problem(symbol) is None) if table is None else table:
        found = problem(symbol)
        if found:
            return found
    return None
