# SPDX-License-Identifier: Apache-2.0
"""Every patch of vLLM, one function each (catalogue: ``patches/README.md``; what they touch: ``symbols.py``).

Each is idempotent, because vLLM loads plugins in every process and sometimes twice, and
does nothing for other dtypes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Literal, get_args

import torch

from vllm_oscar.core import envs
from vllm_oscar.core.config import PAGE_TOKENS, PRESETS
from vllm_oscar.engine import symbols
from vllm_oscar.engine.refusal import UnsupportedByOscar

MIN_VLLM = (0, 29)
MAX_VLLM = (0, 33)  # inclusive

BACKENDS = {
    "OSCAR": "vllm_oscar.engine.backend.OscarBackend",
    "OSCAR_TAIL": "vllm_oscar.engine.backend.OscarTailBackend",
}


def vllm_version() -> tuple[int, int]:
    """(major, minor) of the vLLM that is imported; (0, 0) if it does not say."""
    import vllm

    found = re.match(r"(\d+)\.(\d+)", getattr(vllm, "__version__", ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def unsupported_version() -> str | None:
    """A sentence if this vLLM is outside the supported range."""
    found = vllm_version()
    if MIN_VLLM <= found <= MAX_VLLM:
        return None
    dotted = [".".join(map(str, version)) for version in (found, MIN_VLLM, MAX_VLLM)]
    return (
        f"vllm-oscar supports vLLM {dotted[1]} to {dotted[2]}, but vLLM {dotted[0]} is installed; "
        "--kv-cache-dtype oscar is unavailable until you install a supported vLLM or a newer vllm-oscar"
    )


class IncompatibleVllm(RuntimeError):
    """This vLLM lacks something that the plugin needs; the message is one sentence."""


def _incompatible(what: str) -> IncompatibleVllm:
    import vllm

    oldest, newest = (".".join(map(str, version)) for version in (MIN_VLLM, MAX_VLLM))
    return IncompatibleVllm(
        f"--kv-cache-dtype oscar does not support this vLLM {vllm.__version__}: {what}; "
        f"install vLLM {oldest} to {newest} unchanged, or a newer vllm-oscar"
    )


def apply() -> None:
    """Apply every patch to the vLLM of this process.

    Raises :class:`IncompatibleVllm` if it lacks something, before anything is changed.
    Should a patch fail all the same, the others remain: they do nothing for other dtypes.
    """
    lacking = symbols.missing()
    if lacking:
        raise _incompatible(lacking)
    try:
        register_environment()
        register_dtypes()
        register_backends()
        register_specs()
        patch_backend_selection()
        patch_config_check()
        patch_page_alignment()
        patch_zeroing()
        patch_attention_layer()
        patch_offloading()
        patch_drafter()
        refuse_unknown_presets()  # last: refuse_dtypes() wraps the same method if anything before fails
    except Exception as error:  # whatever a changed vLLM raises
        raise _incompatible(f"{type(error).__name__}: {error}") from error


def _wrap_once(owner: type, name: str, wrapper) -> None:
    """Replace ``owner.name``, a method or property, by ``wrapper(original)``, unless that was done before."""
    original = owner.__dict__.get(name) or getattr(owner, name)
    if isinstance(original, property):
        kind, function = property, original.fget
    elif isinstance(original, classmethod) or hasattr(original, "__self__"):
        kind, function = classmethod, original.__func__
    else:
        kind, function = None, original
    if getattr(function, "_oscar", False):
        return
    wrapped = functools.wraps(function)(wrapper(function))
    wrapped._oscar = True
    setattr(owner, name, kind(wrapped) if kind else wrapped)


def _refuse_where(sentence: Callable[[object], str | None]) -> None:
    """Refuse a ``--kv-cache-dtype`` that has a ``sentence``, where every entry point makes its configuration."""
    from vllm.engine.arg_utils import EngineArgs

    def wrapper(original):
        def create_engine_config(self, *args, **kwargs):
            if refusal := sentence(self.kv_cache_dtype):
                raise UnsupportedByOscar(refusal)
            return original(self, *args, **kwargs)

        return create_engine_config

    _wrap_once(EngineArgs, "create_engine_config", wrapper)


def refuse_dtypes(sentence: str) -> None:
    """Instead of :func:`apply`: who chooses one of our dtypes is told why it cannot be had.

    Touches as little as possible: the dtypes, so that the command line accepts them, and
    the one method that every entry point makes its configuration with.
    """
    from vllm.engine.arg_utils import EngineArgs

    if "kv_cache_dtype" not in EngineArgs.__dataclass_fields__:
        raise AttributeError("EngineArgs has no kv_cache_dtype")
    _refuse_where(lambda dtype: sentence if dtype in PRESETS else None)
    register_dtypes()


def refuse_unknown_presets() -> None:
    """Answer a preset that is not, or no longer, one of ours with a sentence, where ``LLM`` shows pydantic's error."""

    def sentence(dtype: object) -> str | None:
        if isinstance(dtype, str) and dtype.startswith("oscar") and dtype not in PRESETS:
            return f"--kv-cache-dtype {dtype} is no preset; choose one of {', '.join(PRESETS)}"
        return None

    _refuse_where(sentence)


def register_environment() -> None:
    """Make our variables known to vLLM, which warns of others that begin with ``VLLM_``, or refuses them."""
    from vllm import envs as known

    for name in envs.NAMES:
        known.environment_variables.setdefault(name, functools.partial(os.environ.get, name))


def register_dtypes() -> None:
    """Make every preset a legal ``--kv-cache-dtype``."""
    import vllm.config.cache as cache

    if hasattr(cache, "register_kv_cache_dtype"):  # vLLM >= 0.33
        from vllm.v1.kv_cache_interface import KVQuantMode

        for preset in PRESETS:
            if cache.get_kv_cache_dtype_handler(preset) is None:
                handler = type(
                    "OscarKVCacheDType",
                    (),
                    {
                        "name": preset,
                        "torch_dtype": lambda self: torch.uint8,
                        # Not CUSTOM: in 0.33 that is an alias of another format's mode.
                        "quant_mode": lambda self: KVQuantMode.NONE,
                    },
                )
                cache.register_kv_cache_dtype(preset)(handler)
        return

    from pydantic.dataclasses import rebuild_dataclass
    from vllm.engine import arg_utils
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention import selector

    config, known = cache.CacheConfig, cache.CacheDType
    if set(PRESETS) <= set(get_args(known)):
        return
    # Whatever may be missing is looked up before anything is changed.
    annotations, field, model = config.__annotations__, config.__dataclass_fields__, config.__pydantic_fields__
    field, model, choices = field["cache_dtype"], model["cache_dtype"], arg_utils._compute_kwargs.cache_clear

    def set_literal(literal) -> None:
        cache.CacheDType = selector.CacheDType = literal
        annotations["cache_dtype"] = field.type = model.annotation = literal
        config.__pydantic_complete__ = False
        rebuild_dataclass(config, force=True)

    try:
        set_literal(Literal[(*get_args(known), *PRESETS)])
    except Exception:
        set_literal(known)
        raise
    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(PRESETS, torch.uint8))
    choices()  # the command line's, which it keeps


def register_backends() -> None:
    """Give the backends names that vLLM's registry knows."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not hasattr(AttentionBackendEnum, "register"):  # vLLM < 0.32
        # Strangers have one slot there. It is left to others: a layer only asks whether its
        # backend's name exists, and the class is found by its path.
        from vllm_oscar.engine.backend import OscarBackend

        OscarBackend.name = AttentionBackendEnum.CUSTOM.name
        return
    for name, path in BACKENDS.items():
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, path)


def register_specs() -> None:
    """Tell the block manager how the ring is allocated, and pages in blocks of several."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_oscar.engine.scheduler import OscarPageManager, OscarPageSpec, OscarTailManager, OscarTailSpec

    # Registering into an empty registry would keep vLLM from adding its own specs.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(OscarTailSpec, OscarTailManager, uniform_type_base_spec=OscarTailSpec)
    KVCacheSpecRegistry.register(OscarPageSpec, OscarPageManager, uniform_type_base_spec=FullAttentionSpec)


def patch_backend_selection() -> None:
    """Select our backend by dtype; the platforms' own lists are closed."""
    from vllm.platforms import current_platform

    def wrapper(original):
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
            if attn_selector_config.kv_cache_dtype in PRESETS:
                from vllm_oscar.engine.checks import check_selection

                check_selection(attn_selector_config, cls.get_device_capability())
                return BACKENDS["OSCAR"]
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

        return get_attn_backend_cls

    _wrap_once(type(current_platform), "get_attn_backend_cls", wrapper)


def patch_config_check() -> None:
    """Check the configuration in the process that the user started, before any worker."""
    from vllm.platforms import current_platform

    def wrapper(original):
        def check_and_update_config(cls, vllm_config):
            original(cls, vllm_config)
            speculative = vllm_config.speculative_config
            if vllm_config.cache_config.cache_dtype in PRESETS:
                from vllm_oscar.engine.checks import check_config

                check_config(vllm_config)
            elif speculative is not None and speculative.kv_cache_dtype in PRESETS:
                from vllm_oscar.engine.checks import refuse_drafter_alone

                refuse_drafter_alone(speculative.kv_cache_dtype)

        return check_and_update_config

    _wrap_once(type(current_platform), "check_and_update_config", wrapper)


def patch_page_alignment() -> None:
    """Keep vLLM from making blocks so large that a page of ours takes a layer's page in 16 bits.

    It does so for ``--kv-cache-dtype-skip-layers``; we have pages of different size packed into blocks instead.
    """
    from vllm.platforms import current_platform

    def wrapper(original):
        def _align_heterogeneous_kv_block_size(cls, vllm_config, backend_cls):
            if vllm_config.cache_config.cache_dtype not in PRESETS:
                original(cls, vllm_config, backend_cls)

        return _align_heterogeneous_kv_block_size

    _wrap_once(type(current_platform), "_align_heterogeneous_kv_block_size", wrapper)


def patch_attention_layer() -> None:
    """Give every Attention layer its tail and its compressed page size.

    The impl is not told its layer's name, and ``AttentionBackend.customize_spec`` is not
    told the dtype, so both are done where the layer is at hand. So is telling the backend
    what its layers' tokens cost, which vLLM asks of the backend alone.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

    def wrap_init(original):
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            vllm_config = get_current_vllm_config()
            if self.kv_cache_dtype in PRESETS:
                from vllm_oscar.engine.checks import check_layer
                from vllm_oscar.engine.tail import OscarTail

                check_layer(self, vllm_config.compilation_config.static_forward_context)
                self.oscar_tail = OscarTail(self, vllm_config)
                self.attn_backend.bytes_per_token[self.head_size] = self.impl.fmt.bytes_per_token
                if vllm_config.device_config.device_type == "cpu":
                    patch_cpu_zeroing()
            else:
                from vllm_oscar.engine.checks import check_wide_layer

                check_wide_layer(self, vllm_config)

        return __init__

    def wrap_spec(original):
        def get_kv_cache_spec(self, vllm_config):
            spec = original(self, vllm_config)
            if self.kv_cache_dtype not in PRESETS:
                return spec
            if spec.block_size > PAGE_TOKENS and isinstance(spec, FullAttentionSpec):
                from vllm_oscar.engine.scheduler import OscarPageSpec

                spec = replace_as(spec, OscarPageSpec)
            # What the block manager counts, and so what decides the capacity.
            return dataclasses.replace(spec, state_content_bytes=self.impl.fmt.bytes_per_token)

        return get_kv_cache_spec

    _wrap_once(Attention, "__init__", wrap_init)
    _wrap_once(Attention, "get_kv_cache_spec", wrap_spec)


def patch_offloading() -> None:
    """Tell KV offloading of the rings: how much it may load, and which copies must not be overtaken."""
    if symbols.missing(symbols.OFFLOADING):
        return  # checks.py refuses it then
    from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    from vllm_oscar.engine.scheduler import OscarTailSpec

    def wrap_init(original):
        def __init__(self, spec, vllm_config, kv_cache_config):
            original(self, spec, vllm_config, kv_cache_config)
            specs = enumerate(group.kv_cache_spec for group in kv_cache_config.kv_cache_groups)
            self._oscar_rings = {group: spec.blocks for group, spec in specs if isinstance(spec, OscarTailSpec)}

        return __init__

    # If all of a prompt were loaded, its last token would be computed again, for the logits, and so would the page
    # that it completes: from a ring that holds nothing of that page. So the page of the last token is never loaded.
    def wrap_match(original):
        def get_num_new_matched_tokens(self, request, num_computed_tokens, max_num_new_tokens=None):
            if self._oscar_rings:
                most = max((request.num_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS - num_computed_tokens, 0)
                if most and self._sliding_window_groups:
                    most += 1  # the connector itself leaves out a token
                max_num_new_tokens = most if max_num_new_tokens is None else min(most, max_num_new_tokens)
            return original(self, request, num_computed_tokens, max_num_new_tokens)

        return get_num_new_matched_tokens

    # A page may still wait to be copied to the host when its block has been freed. The connector hurries such copies
    # if the block is given to somebody else, but looks only at groups that it stores, not at rings.
    def wrap_states(original):
        def _update_req_states(self, scheduler_output):
            for _, groups, _ in yield_req_data(scheduler_output) if self._oscar_rings else ():
                for group, blocks in self._oscar_rings.items():
                    self._current_batch_allocated_block_ids.update(groups[group][:blocks] if groups else ())
            original(self, scheduler_output)

        return _update_req_states

    _wrap_once(OffloadingConnectorScheduler, "__init__", wrap_init)
    _wrap_once(OffloadingConnectorScheduler, "get_num_new_matched_tokens", wrap_match)
    _wrap_once(OffloadingConnectorScheduler, "_update_req_states", wrap_states)


def patch_drafter() -> None:
    """Let drafters have layers in our pages (model runner V1; V2 needs nothing).

    V1's takes every attention layer that came with the draft for one that it runs, so for
    one of the page group; the rings are not.
    """
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    def wrap_load(original):
        def load_model(self, target_model):
            original(self, target_model)
            if self.vllm_config.cache_config.cache_dtype in PRESETS:
                from vllm_oscar.engine.tail import OscarTail

                layers = self.vllm_config.compilation_config.static_forward_context
                rings = {name for name in self._draft_attn_layer_names if isinstance(layers[name], OscarTail)}
                self._draft_attn_layer_names -= rings

        return load_model

    def wrap_initialize(original):
        def initialize_attn_backend(self, *args, **kwargs):
            original(self, *args, **kwargs)
            dtype = self.vllm_config.cache_config.cache_dtype
            if dtype in PRESETS:
                from vllm_oscar.engine.checks import check_draft_group

                check_draft_group(self.method, self.kv_cache_gid, dtype)

        return initialize_attn_backend

    _wrap_once(SpecDecodeBaseProposer, "load_model", wrap_load)
    _wrap_once(SpecDecodeBaseProposer, "initialize_attn_backend", wrap_initialize)


def patch_zeroing() -> None:
    """Have new blocks zeroed where layers in the model's dtype lie in them beside ours.

    Their backends may not read what a ring or quantized pages left there. vLLM zeroes for that
    reason, too, but takes the dtype of a group's first layer for that of all.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_oscar.engine.scheduler import OscarTailSpec

    def wrapper(original):
        def needs_kv_cache_zeroing(self) -> bool:
            specs = (group.kv_cache_spec for group in self.kv_cache_groups)
            return original(self) or any(isinstance(spec, OscarTailSpec) and spec.mixed for spec in specs)

        return needs_kv_cache_zeroing

    _wrap_once(KVCacheConfig, "needs_kv_cache_zeroing", wrapper)


def patch_cpu_zeroing() -> None:
    """Let vLLM's CPU runner zero new blocks of those layers that need it: not of ours.

    It takes the number of a block for that of a page, which it is not where a block has several,
    and leaves out groups of layers that differ. Called in the worker, when the runner has been
    imported anyway. Raises :class:`IncompatibleVllm`.
    """
    lacking = symbols.missing(symbols.CPU_RUNNER)
    if lacking:
        raise _incompatible(lacking)
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def wrapper(original):
        def _zero_block_ids(self, block_ids):
            if self.cache_config.cache_dtype not in PRESETS:
                return original(self, block_ids)
            for layer in self.compilation_config.static_forward_context.values():
                if isinstance(layer, Attention) and layer.kv_cache_dtype not in PRESETS and layer.kv_cache.numel():
                    layer.kv_cache[block_ids] = 0

        return _zero_block_ids

    _wrap_once(CPUModelRunner, "_zero_block_ids", wrapper)
