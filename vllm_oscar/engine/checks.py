# SPDX-License-Identifier: Apache-2.0
"""What OScaR refuses at start-up: one sentence each, with the setting to change.

Raised while the configuration is made, so the user sees it before any worker starts.
A feature leaves this list when a test shows that it works.
"""

from __future__ import annotations

import logging
import os
import shutil

from vllm import envs as vllm_envs

from vllm_oscar.core import envs
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS, SUPPORTED_HEAD_DIMS, NormScope
from vllm_oscar.core.layers import sliding_windows, uneven_layers
from vllm_oscar.engine import symbols
from vllm_oscar.engine.refusal import OTHER_MODEL, UnsupportedByOscar

logger = logging.getLogger("vllm.oscar")


MIXED_LAYOUT = "BLHNC"
"""vLLM's KV-cache layout in which layers' pages lie side by side in a block and may differ in size."""

SHARED_MEMORY = "/dev/shm"

_HEAD_DIMS = ", ".join(map(str, SUPPORTED_HEAD_DIMS))
_PREFIX_LM = (
    "bidirectional multimodal prefixes",
    f"serve text alone with --language-model-only, or {OTHER_MODEL}",
)


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
    _check_offloading(cache, vllm_config.kv_transfer_config, dtype)
    if cache.prefix_match_unit not in (None, PAGE_TOKENS):
        _refuse(dtype, f"prefix hits that end inside a page of {PAGE_TOKENS} tokens", "remove --prefix-match-unit")
    device = vllm_config.device_config.device_type
    if device not in ("cpu", "cuda"):
        _refuse(dtype, f"the device {device}", "use an NVIDIA GPU or a CPU, or --kv-cache-dtype auto")
    _check_host_memory(vllm_config, device)
    _check_environment()
    _check_parallelism(vllm_config.parallel_config, dtype)
    _check_speculation(vllm_config, dtype)
    if vllm_config.model_config is not None:
        _check_model(vllm_config.model_config, dtype)
        _check_windows(cache, dtype)
        _check_hybrid(vllm_config, dtype)
        _check_skipped_layers(vllm_config, dtype)
        _check_as_a_layer_will(vllm_config)
    _warn(vllm_config, dtype)


def _check_environment() -> None:
    """Refuse values that our variables do not have before a worker asks for them."""
    try:
        for read in (envs.lossless_codec, envs.forced_kernels, envs.deterministic):
            read()
    except ValueError as error:
        raise UnsupportedByOscar(str(error)) from None


def _check_as_a_layer_will(vllm_config) -> None:
    """Ask vLLM for the backend of a plain layer of this model, which comes to :func:`check_selection`.

    A layer asks in a worker; here users are told in the process that they started.
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        get_attn_backend(model.get_head_size(), model.dtype, vllm_config.cache_config.cache_dtype)


def _warn(vllm_config, dtype: str) -> None:
    """One line in the log for each setting that does not do what the user may think."""
    if envs.lossless_codec():
        logger.warning(
            "VLLM_OSCAR_CODEC=lossless: the KV cache is NOT compressed. This is a test mode; unset it to serve."
        )
    if PRESETS[dtype].norm is NormScope.JOINT and vllm_config.parallel_config.tensor_parallel_size > 1:
        logger.warning(
            "%s takes one key norm over all KV heads of a rank, so its numerics depend on the tensor-parallel size.",
            dtype,
        )
    attention = vllm_config.attention_config
    chosen = {backend.name for backend in (attention.backend, *(attention.backend_per_kind or {}).values()) if backend}
    if chosen - {"OSCAR"}:
        logger.warning(
            "--attention-backend %s is ignored: only OScaR's own backend reads --kv-cache-dtype %s.",
            ", ".join(sorted(chosen)),
            dtype,
        )


# Why these KV connectors cannot be used; their names begin with the key.
_OTHER_CONNECTORS = {
    "LMCache": "LMCache, which knows one kind of block where OScaR has pages and rings",
    "Nixl": "NIXL, which would send rings as if they were pages",
}


def _check_offloading(cache, transfer, dtype: str) -> None:
    """Offloading to host memory moves whole pages and leaves rings alone; no other KV connector does.

    ``transfer``: vLLM's ``KVTransferConfig`` or None, before vLLM enters into it what ``--kv-offloading-size`` means.
    """
    name, extra = (transfer.kv_connector, transfer.kv_connector_extra_config) if transfer else (None, {})
    if cache.kv_offloading_size is not None:
        simple = getattr(vllm_envs, "VLLM_USE_SIMPLE_KV_OFFLOAD", False)
        native = "SimpleCPUOffloadConnector" if simple else "OffloadingConnector"
        name = native if cache.kv_offloading_backend == "native" else "LMCacheMPConnector"
    if name is None:
        return
    if name not in ("OffloadingConnector", "SimpleCPUOffloadConnector"):
        what = next((what for start, what in _OTHER_CONNECTORS.items() if name.startswith(start)), None)
        _refuse(
            dtype,
            what or f"the KV connector {name}",
            "use --kv-offloading-size with --kv-offloading-backend native, or remove --kv-transfer-config",
        )
    unusual = {
        "spec_name": extra.get("spec_name", "CPUOffloadingSpec") != "CPUOffloadingSpec",
        "canonical_layout": bool(extra.get("canonical_layout")),
        "kv_offload_backend": extra.get("kv_offload_backend", "cpu") != "cpu",
    }
    for key in (key for key, found in unusual.items() if found):
        _refuse(
            dtype,
            f"KV-cache offloading with {key} {extra[key]!r}",
            f"remove {key} from the kv_connector_extra_config of --kv-transfer-config",
        )
    lacking = symbols.missing(symbols.OFFLOADING)
    if lacking and name == "OffloadingConnector":
        _refuse(dtype, f"KV-cache offloading with this vLLM: {lacking}", "set VLLM_USE_SIMPLE_KV_OFFLOAD=1")


def _check_host_memory(vllm_config, device: str) -> None:
    """Refuse to offload to more host memory than there is, before a worker dies of it.

    vLLM's own connector maps it in ``/dev/shm`` on a GPU, one region for all workers of a machine.
    """
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if cache.kv_offloading_size is not None:
        setting, asked = "--kv-offloading-size", cache.kv_offloading_size
        simple = getattr(vllm_envs, "VLLM_USE_SIMPLE_KV_OFFLOAD", False)
    elif transfer is not None:
        setting = "cpu_bytes_to_use of --kv-transfer-config"
        asked = float(transfer.kv_connector_extra_config.get("cpu_bytes_to_use") or 0) / (1 << 30)
        simple = transfer.kv_connector == "SimpleCPUOffloadConnector"
    else:
        return
    place, remedy, there = "memory", "", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device == "cuda" and not simple and os.path.isdir(SHARED_MEMORY):
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < there:
            place, there = f"room in {SHARED_MEMORY}", free
            remedy = f", or enlarge {SHARED_MEMORY} (Docker: --shm-size)"
    if asked * (1 << 30) > there:
        raise UnsupportedByOscar(
            f"{setting} asks for {asked:.1f} GiB, but this machine has {there / (1 << 30):.1f} GiB of {place}; "
            f"lower it{remedy}"
        )


def _check_parallelism(parallel, dtype: str) -> None:
    for option, size in (
        ("decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            _refuse(dtype, f"--{option} {size}", "remove the option")


# Methods that propose tokens from what there is: they have no KV cache of their own.
_WITHOUT_CACHE = ("ngram", "ngram_gpu", "suffix", "medusa")
# Methods whose attention layers join the target's, in pages and rings of the same size.
_WITH_LAYERS = ("draft_model", "eagle", "eagle3", "mtp")
# Kinds of MTP with a drafter of their own in vLLM: one reads the target's cache, the others have sliding windows.
_OTHER_MTP = ("gemma4_mtp", "step3p5_mtp", "inkling_mtp")
_NO_DRAFT = "remove --speculative-config"


def _check_speculation(vllm_config, dtype: str) -> None:
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in _WITHOUT_CACHE:
        return
    if speculative.method not in _WITH_LAYERS:
        methods = ", ".join((*_WITHOUT_CACHE, *_WITH_LAYERS))
        _refuse(
            dtype,
            f"speculative decoding with method {speculative.method!r}",
            f"use one of {methods} in --speculative-config, or remove it",
        )
    if speculative.parallel_drafting:
        _refuse(dtype, "parallel drafting", 'remove "parallel_drafting" from --speculative-config')
    if speculative.kv_cache_dtype not in (None, dtype, "auto"):
        _refuse(
            dtype,
            f"a drafter with KV-cache dtype {speculative.kv_cache_dtype}",
            'remove "kv_cache_dtype" from --speculative-config, or let it be "auto"',
        )
    draft = speculative.draft_model_config
    if draft.hf_config.model_type in _OTHER_MTP:
        _refuse(dtype, f"drafts of the kind {draft.hf_config.model_type}", _NO_DRAFT)
    _check_model(draft, dtype, " in the drafter")
    if vllm_config.model_config is None:
        return
    if wide_drafter(vllm_config):
        option, remedy = "a drafter in the model's dtype", 'remove "kv_cache_dtype" from --speculative-config'
        _mix_pages(vllm_config, option, remedy, dtype)
        _refuse_offloading(vllm_config, dtype, option, remedy)
    else:
        _check_shape_of_draft(vllm_config, draft, dtype)


def wide_drafter(vllm_config) -> bool:
    """Whether a drafter's layers are in the model's dtype, if the target's are not."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method in _WITH_LAYERS and speculative.kv_cache_dtype == "auto"


def _check_shape_of_draft(vllm_config, draft, dtype: str) -> None:
    """Blocks of the target's and the drafter's layers have one size."""
    speculative, target = vllm_config.speculative_config, vllm_config.model_config
    parallel = speculative.draft_parallel_config
    heads = [draft.get_num_kv_heads(parallel), target.get_num_kv_heads(vllm_config.parallel_config)]
    sizes = [draft.get_head_size(), target.get_head_size()]
    if sizes[0] != sizes[1] or heads[0] != heads[1]:
        remedy = 'let "kv_cache_dtype" in --speculative-config be "auto", or use a drafter of the target\'s shape'
        if parallel.tensor_parallel_size != vllm_config.parallel_config.tensor_parallel_size:
            remedy = 'remove "draft_tensor_parallel_size" from --speculative-config, or ' + remedy
        what = f"a drafter with {heads[0]} KV heads of {sizes[0]} beside the target's {heads[1]} of {sizes[1]}"
        _refuse(dtype, what, remedy)


def _check_windows(cache, dtype: str) -> None:
    """Refuse models of windows alone; beside full layers windows are served."""
    if cache.sliding_window is not None:  # vLLM's word that all layers have it
        _refuse(
            dtype,
            f"models whose layers all have a sliding window ({cache.sliding_window} tokens)",
            f"serve contexts of that length with --disable-sliding-window, or {OTHER_MODEL}",
        )


def refuse_drafter_alone(dtype: str) -> None:
    """A drafter with our dtype whose target has another."""
    _refuse(
        dtype,
        "a drafter whose target has another KV-cache dtype",
        f'use --kv-cache-dtype {dtype} or remove "kv_cache_dtype" from --speculative-config',
    )


def check_draft_group(method: str, group: int, dtype: str) -> None:
    """Model runner V1 gives a draft model the block table of the first KV-cache group, whatever its own is.

    ``group``: the index of the one that has the drafter's pages.
    """
    if method == "draft_model" and group:
        _refuse(
            dtype,
            "a draft model whose pages are not in the first KV-cache group",
            f"set VLLM_USE_V2_MODEL_RUNNER=1 or {_NO_DRAFT}",
        )


def _check_hybrid(vllm_config, dtype: str) -> None:
    """What does not go with state-space layers, for which a block has several pages; and hits of single pages."""
    if not vllm_config.model_config.is_hybrid:
        return
    _refuse_beside(vllm_config, dtype, "state-space layers", "choose another model")
    vllm_config.cache_config.prefix_match_unit = PAGE_TOKENS  # else hits end with a block


def _refuse_beside(vllm_config, dtype: str, what: str, remedy: str) -> None:
    """Refuse what was never run beside layers that are not ours."""
    _refuse_offloading(vllm_config, dtype, what, remedy)
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method in _WITH_LAYERS:
        _refuse(dtype, f"a drafter with a KV cache ({speculative.method}) with {what}", f"{_NO_DRAFT}, or {remedy}")


def _refuse_offloading(vllm_config, dtype: str, what: str, remedy: str) -> None:
    if vllm_config.cache_config.kv_offloading_size is not None or vllm_config.kv_transfer_config is not None:
        remedy = f"remove --kv-offloading-size and --kv-transfer-config, or {remedy}"
        _refuse(dtype, f"KV-cache offloading with {what}", remedy)


def _check_skipped_layers(vllm_config, dtype: str) -> None:
    """Layers in the model's dtype beside ours."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    skipped, option = set(cache.kv_cache_dtype_skip_layers), "--kv-cache-dtype-skip-layers"
    if not skipped:
        return
    layers = {str(layer) for layer in range(model.hf_text_config.num_hidden_layers)}
    unknown = skipped - layers - {"sliding_window"}
    if unknown:
        _refuse(
            dtype,
            f"{option} {' '.join(sorted(unknown))}",
            f"name layers by their numbers, 0 to {len(layers) - 1}, or all with a window by sliding_window",
        )
    if layers <= skipped:
        _refuse(dtype, f"{option} with all layers of the model", "skip fewer, or use --kv-cache-dtype auto")
    windows = {str(i) for i, window in enumerate(sliding_windows(model.hf_text_config.to_dict())) if window}
    if "sliding_window" not in skipped and skipped & windows and windows - skipped:
        # vLLM forms groups of such layers as if it could not happen, and loses some.
        _refuse(
            dtype,
            f"{option} with some layers that have a sliding window, and not all",
            "skip all of them by sliding_window, or none",
        )
    _mix_pages(vllm_config, option, "remove the option", dtype)
    _refuse_beside(vllm_config, dtype, option, "remove the option")


def _mix_pages(vllm_config, option: str, remedy: str, dtype: str) -> None:
    """Have pages of different size packed into blocks, each as large as it is.

    With vLLM's usual layout all layers' pages would become as large as the largest.
    """
    if vllm_config.model_config.is_hybrid:
        _refuse(dtype, f"{option} with state-space layers, whose blocks have several pages", remedy)
    if os.environ.get("VLLM_KV_CACHE_LAYOUT", MIXED_LAYOUT) != MIXED_LAYOUT:
        _refuse(dtype, f"{option} with VLLM_KV_CACHE_LAYOUT={os.environ['VLLM_KV_CACHE_LAYOUT']}", "unset the variable")
    vllm_config.cache_config.kv_cache_layout = MIXED_LAYOUT


def mixes_pages(vllm_config) -> bool:
    """Whether layers in the model's dtype have pages in the same blocks as ours."""
    return bool(vllm_config.cache_config.kv_cache_dtype_skip_layers) or wide_drafter(vllm_config)


def check_wide_layer(layer, vllm_config) -> None:
    """Refuse a layer in the model's dtype, beside ours, whose backend cannot read its pages where they lie.

    CPU_ATTN can, although it only names the layout in which it usually finds them.
    """
    from vllm.v1.attention.backend import AttentionType

    cache = vllm_config.cache_config
    if cache.kv_cache_layout != MIXED_LAYOUT or layer.attn_type != AttentionType.DECODER:
        return  # nothing is mixed, or this layer has no pages
    # A drafter's configuration has the drafter's dtype.
    layers = vllm_config.compilation_config.static_forward_context.values()
    ours = {cache.cache_dtype, *(getattr(other, "kv_cache_dtype", None) for other in layers)} & set(PRESETS)
    layouts = layer.attn_backend.supported_kv_cache_layouts()
    name = layer.attn_backend.get_name()
    if ours and name != "CPU_ATTN" and layouts is not None and MIXED_LAYOUT not in {layout.name for layout in layouts}:
        _refuse(
            min(ours),
            f"layers in the model's dtype with {name}, which cannot read KV-cache layout {MIXED_LAYOUT}",
            "choose another --attention-backend",
        )


def _check_model(model, dtype: str, where: str = "") -> None:
    """``where``: which model it is, if it is not the target."""
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ())
    refusals = (
        ("multi-head latent attention (MLA)", model.use_mla),
        ("encoder-decoder models", model.is_encoder_decoder),
        ("encoder or pooling models", model.runner_type == "pooling"),
        ("models without attention", model.is_attention_free),
        ("chunked local attention", "chunked_attention" in layer_types),
        ("ALiBi", bool(getattr(text, "alibi", False)) or model.hf_config.model_type in ("bloom", "mpt")),
        ("layers that share a KV cache", bool(getattr(text, "num_kv_shared_layers", 0))),
    )
    for what, present in refusals:
        if present:
            _refuse(dtype, what + where, OTHER_MODEL)
    if model.is_mm_prefix_lm:
        _refuse(dtype, *_PREFIX_LM)
    if model.enable_sleep_mode:
        _refuse(dtype, "sleep mode, which would lose what the kernels keep on the GPU", "remove --enable-sleep-mode")
    head_dim = model.get_head_size()
    if head_dim not in SUPPORTED_HEAD_DIMS:
        _refuse(dtype, f"head size {head_dim}{where} (supported: {_HEAD_DIMS})", OTHER_MODEL)
    uneven = uneven_layers(text.to_dict())
    if uneven:
        _refuse(dtype, uneven + where, OTHER_MODEL)


# What AttentionBackend.validate_configuration may say: what it means here, and the way out.
_REASONS = {
    "head_size not supported": ("head size {head_size} (supported: " + _HEAD_DIMS + ")", OTHER_MODEL),
    "dtype not supported": ("the model dtype {dtype}", "use --dtype bfloat16 or --kv-cache-dtype auto"),
    "block_size not supported": ("--block-size {block_size}", f"use --block-size {PAGE_TOKENS}"),
    "partial multimodal token full attention not supported": _PREFIX_LM,
    "MLA not supported": ("multi-head latent attention (MLA)", OTHER_MODEL),
    "sparse not supported": ("sparse attention", OTHER_MODEL),
    "per-head quant scales not supported": ("a checkpoint with KV scales per head", OTHER_MODEL),
    "compute capability not supported": (
        "this GPU",
        "use an NVIDIA GPU of compute capability 8.0 or newer, or --kv-cache-dtype auto",
    ),
    "R-SWA not supported": ("sliding windows beside a prompt that stays visible (R-SWA)", OTHER_MODEL),
    "non-causal attention not supported": ("non-causal attention", OTHER_MODEL),
    "batch invariance not supported": (
        "batch-invariant mode",
        "unset VLLM_BATCH_INVARIANT or use --kv-cache-dtype auto",
    ),
    "PCP not supported": ("prefill context parallelism", "remove --prefill-context-parallel-size"),
    "DCP not supported": ("decode context parallelism", "remove --decode-context-parallel-size"),
    "device-cpu query lens mismatch not supported, this is needed for adaptive verification": (
        "adaptive verification of drafts",
        "remove --speculative-config",
    ),
}


def check_selection(selector_config, device_capability=None) -> None:
    """The same for one layer, with what only the layer knows. Raises :class:`UnsupportedByOscar`.

    vLLM's own rules decide, by what :class:`~vllm_oscar.engine.backend.OscarBackend` says of
    itself, so that a new one is never overlooked. ``selector_config``: vLLM's
    ``AttentionSelectorConfig``; ``device_capability``: of the GPU, if it is one.
    """
    from vllm_oscar.engine.backend import OscarBackend

    reasons = OscarBackend.validate_configuration(device_capability=device_capability, **selector_config._asdict())
    if not reasons:
        return
    what, remedy = _REASONS.get(reasons[0], (reasons[0].removesuffix(" not supported"), OTHER_MODEL))
    _refuse(selector_config.kv_cache_dtype, what.format(**selector_config._asdict()), remedy)


def check_layer(layer, layers: dict) -> None:
    """Refuse an Attention layer that cannot share blocks with the others, whatever the model's configuration said.

    ``layers``: those made so far, by name; this one may be among them.
    """
    from vllm_oscar.engine.backend import OscarBackend

    dtype = layer.kv_cache_dtype
    if layer.attn_backend is not OscarBackend:  # the model brings another, or changes what ours means
        _refuse(dtype, f"the attention of {layer.layer_name} ({layer.attn_backend.__name__})", OTHER_MODEL)
    if layer.head_size_v != layer.head_size:
        _refuse(dtype, f"values of {layer.head_size_v} channels beside keys of {layer.head_size}", OTHER_MODEL)
    shape = (layer.num_kv_heads, layer.head_size)
    for name, other in layers.items():
        if getattr(other, "kv_cache_dtype", None) == dtype and (other.num_kv_heads, other.head_size) != shape:
            _refuse(
                dtype,
                f"layers that differ in KV heads or head size ({layer.layer_name} has {shape[0]} heads of {shape[1]}, "
                f"{name} {other.num_kv_heads} of {other.head_size})",
                OTHER_MODEL,
            )
