# SPDX-License-Identifier: Apache-2.0
"""What a prefix hit reads, out of an engine's cache. Runs in the engine's process (see ``vllm_engine``)."""

from __future__ import annotations


def of_prefix(engine, tokens: list[int]) -> list[dict[int, str]]:
    """The pages that a request of ``tokens`` would find in the prefix cache.

    Per layer, in the model's order, page number to the hexadecimal bytes of its heads; without what is before the
    layer's sliding window, of which a hit has nothing.
    """
    from vllm import SamplingParams
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.request import Request

    scheduler, hasher = engine.core.scheduler, engine.core.request_block_hasher
    request = Request("probe", tokens, SamplingParams(), pooling_params=None, block_hasher=hasher)
    found, *_ = scheduler.kv_cache_manager.get_computed_blocks(request)
    layers = engine.runner.vllm_config.compilation_config.static_forward_context
    pages = {}
    for group, blocks in zip(scheduler.kv_cache_config.kv_cache_groups, found.blocks):
        held = {number: block.block_id for number, block in enumerate(blocks) if not block.is_null}
        for name in group.layer_names if held else ():  # rings are not cached
            memory = layers[name].impl._cache(layers[name].kv_cache).pages
            pages[extract_layer_index(name)] = {n: bytes(memory[block].flatten()).hex() for n, block in held.items()}
    return [pages[index] for index in sorted(pages)]
