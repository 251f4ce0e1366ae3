# SPDX-License-Identifier: Apache-2.0
"""What works and what is refused, feature by feature: the one table from which all others are made.

``vllm-oscar features`` prints it, the README has it between two markers. ``tests/test_support.py`` holds it against
``checks.py``, so that each refusal is in a row and each row's refusals are real, and against the tests that it names.
"""

from __future__ import annotations

from typing import NamedTuple

TESTED = "tested"  # a test runs it
TRIED = "tried"  # run by hand on that device
UNRUN = "unrun"  # nothing speaks against it, but nobody ran it
REFUSED = "refused"  # at start-up, in one sentence that says what to change
ABSENT = "-"  # vLLM has it not on that device


class Feature(NamedTuple):
    """A row.

    Attributes:
        kind: under which heading.
        name: as users call it.
        cpu, gpu: one of the words above, for vLLM's CPU build and for NVIDIA GPUs.
        note: one sentence, or nothing.
        test: ``file::function`` below ``tests/``, of what is tested.
        refusals: how the refusals of ``checks.py`` begin that belong here.
    """

    kind: str
    name: str
    cpu: str
    gpu: str
    note: str = ""
    test: str = ""
    refusals: tuple[str, ...] = ()


def _refused(kind: str, name: str, *refusals: str, note: str = "") -> Feature:
    return Feature(kind, name, REFUSED, REFUSED, note, refusals=refusals)


_LOSSLESS, _FEATURES = "test_vllm_lossless.py::test_", "test_vllm_features.py::test_"
_ENTRY = "test_vllm_entrypoints.py::test_"

FEATURES = (
    # ---- models
    Feature(
        "models",
        "decoders with multi-head or grouped-query attention",
        TESTED,
        TRIED,
        "Head size 64, 80, 96, 112, 128, 192 or 256; on a GPU 64 and 128 were run.",
        _LOSSLESS + "prompts_of_every_length",
        ("head size {",),
    ),
    Feature(
        "models",
        "sliding windows beside full layers, sinks, soft-caps (Gemma 2 and 3, gpt-oss)",
        TESTED,
        TRIED,
        "On a GPU for speed, with dummy weights of gpt-oss and Gemma 3.",
        "test_vllm_windows.py::test_everything_together",
    ),
    Feature(
        "models",
        "state-space and linear-attention layers beside attention (Qwen3-Next, LFM2)",
        TESTED,
        UNRUN,
        "Not with drafters that have a KV cache, skipped layers or offloading.",
        "test_vllm_hybrid.py::test_everything_together",
        ("KV-cache offloading with {}",),
    ),
    Feature(
        "models",
        "Qwen2 and 3 with `layer_types` that vLLM ignores",
        TESTED,
        UNRUN,
        "All layers keep every token, as with `auto`.",
        _FEATURES + "models",
    ),
    Feature("models", "mixtures of experts (Qwen3-MoE, gpt-oss)", TESTED, TRIED, "", _FEATURES + "models"),
    Feature(
        "models",
        "images (Qwen2.5-VL, Qwen3-VL, LLaVA)",
        TESTED,
        UNRUN,
        "Prefix hits may end inside an image; videos were not run.",
        "test_vllm_multimodal.py::test_images",
    ),
    Feature(
        "models",
        "sounds (thinker of Qwen2.5-Omni)",
        TESTED,
        UNRUN,
        "",
        "test_vllm_multimodal.py::test_sounds",
    ),
    Feature(
        "models",
        "a multimodal model for text alone",
        TESTED,
        UNRUN,
        "`--limit-mm-per-prompt` 0.",
        "test_vllm_multimodal.py::test_the_text_side_alone",
    ),
    _refused("models", "models of sliding windows alone", "models whose layers all have a sliding window"),
    _refused("models", "models without attention (Mamba)", "models without attention"),
    _refused(
        "models",
        "layers that differ in KV heads or head size (Nemotron-NAS, OpenELM)",
        "layers that differ in KV heads or head size",
        "{}{}",
        "values of {",
    ),
    _refused("models", "layers that share a KV cache (Gemma 3n)", "layers that share a KV cache"),
    _refused("models", "MLA and sparse attention (DeepSeek)", "multi-head latent attention (MLA)", "sparse attention"),
    _refused("models", "chunked local attention (Llama 4)", "chunked local attention"),
    _refused("models", "ALiBi", "ALiBi"),
    _refused(
        "models",
        "encoders, encoder-decoders, pooling and non-causal attention",
        "encoder",
        "non-causal attention",
    ),
    _refused("models", "bidirectional multimodal prefixes (Gemma 3 with images)", "bidirectional multimodal prefixes"),
    _refused("models", "sliding windows beside a prompt that stays visible", "sliding windows beside a prompt"),
    _refused("models", "attention classes of a model's own", "the attention of {"),
    _refused("models", "checkpoints with KV scales per head", "a checkpoint with KV scales per head"),
    # ---- devices
    Feature(
        "devices",
        "bf16 and fp16",
        TESTED,
        TRIED,
        "On a GPU only bf16 was run.",
        "test_vllm_capacity.py::test_the_reported_requests_really_fit",
    ),
    Feature(
        "devices",
        "fp32",
        TESTED,
        REFUSED,
        "",
        _LOSSLESS + "prompts_of_every_length",
        ("the model dtype {",),
    ),
    _refused("devices", "GPUs before sm_80, and other devices", "this GPU", "the device {"),
    # ---- scheduling
    Feature("scheduling", "prefix caching", TESTED, TRIED, "", _LOSSLESS + "prefix_hits_of_earlier_requests"),
    Feature("scheduling", "chunked prefill", TESTED, TRIED, "", _LOSSLESS + "chunked_prefill"),
    Feature("scheduling", "preemption", TESTED, TRIED, "", _LOSSLESS + "preemption"),
    Feature("scheduling", "abort", TESTED, UNRUN, "", _LOSSLESS + "abort"),
    Feature("scheduling", "priorities", TESTED, UNRUN, "", _FEATURES + "priorities"),
    Feature(
        "scheduling", "`reset_prefix_cache` while requests run", TESTED, UNRUN, "", _FEATURES + "reset_in_mid_decode"
    ),
    Feature("scheduling", "KV events", TESTED, UNRUN, "Of pages; rings have none.", _FEATURES + "events"),
    _refused("scheduling", "sleep mode", "sleep mode"),
    _refused("scheduling", "batch-invariant mode", "batch-invariant mode"),
    _refused(
        "scheduling", "block sizes other than 128, hits inside a page", "--block-size", "prefix hits that end inside"
    ),
    # ---- requests
    Feature("requests", "`n > 1`", TESTED, UNRUN, "", _LOSSLESS + "several_samples"),
    Feature("requests", "beam search", TESTED, UNRUN, "", _FEATURES + "beam_search"),
    Feature("requests", "structured output", TESTED, UNRUN, "", _FEATURES + "structured_output"),
    Feature("requests", "prompt embeddings", TESTED, UNRUN, "", _FEATURES + "prompt_embeddings"),
    Feature("requests", "LoRA", TESTED, UNRUN, "", _FEATURES + "lora"),
    # ---- speculation
    Feature("speculation", "n-gram", TESTED, TRIED, "", _LOSSLESS + "speculation"),
    Feature(
        "speculation",
        "draft models, EAGLE, EAGLE-3, MTP",
        TESTED,
        TRIED,
        "In pages and rings like the target's; EAGLE-3 and MTP were not run on a GPU.",
        "test_vllm_drafts.py::test_lossless_with_hits_and_chunks",
    ),
    Feature(
        "speculation",
        "a drafter in the model's dtype",
        TESTED,
        UNRUN,
        '`"kv_cache_dtype": "auto"` in `--speculative-config`.',
        "test_vllm_drafts.py::test_a_drafter_in_the_models_dtype",
        ("a drafter with KV-cache dtype", "a drafter whose target has another"),
    ),
    Feature("speculation", "suffix decoding", UNRUN, UNRUN, "It has no KV cache of its own, like n-gram."),
    _refused(
        "speculation",
        "parallel drafting and other drafters, drafters beside state-space or skipped layers",
        "speculative decoding with method {",
        "adaptive verification of drafts",
        "parallel drafting",
        "drafts of the kind",
        "a drafter with a KV cache",
        "a draft model whose pages are not in the first",
    ),
    # ---- parallel
    Feature(
        "parallel", "tensor parallelism (mp and Ray)", TESTED, TRIED, "Two ranks.", "test_vllm_tp.py::test_two_ranks"
    ),
    Feature("parallel", "pipeline and expert parallelism", ABSENT, UNRUN, "vLLM's CPU build fails with `auto`, too."),
    Feature(
        "parallel",
        "data parallelism",
        TESTED,
        UNRUN,
        "Of engines behind one server.",
        "test_vllm_tp.py::test_data_parallel",
    ),
    _refused("parallel", "DCP and PCP", "--{} {}", "decode context parallelism", "prefill context parallelism"),
    # ---- cache
    Feature(
        "cache",
        "offloading to host memory (`--kv-offloading-size`)",
        TESTED,
        TRIED,
        "Pages travel compressed; vLLM's CPU build has no copies, the test stands in for them.",
        "test_vllm_offload.py::test_reloaded_prefixes",
        ("KV-cache offloading with this vLLM",),
    ),
    _refused("cache", "offloading to disk and other tiers", "KV-cache offloading with {} {}"),
    _refused("cache", "LMCache, NIXL and other KV connectors", "LMCache", "NIXL", "the KV connector {"),
    Feature(
        "cache",
        "layers in the model's dtype (`--kv-cache-dtype-skip-layers`)",
        TESTED,
        UNRUN,
        "Pages of both sizes share blocks without padding.",
        "test_vllm_skip_layers.py::test_everything_together",
        ("{} ", "layers in the model's dtype with"),
    ),
    # ---- compilation
    Feature("compilation", "`torch.compile`", TESTED, TRIED, "", _LOSSLESS + "compiled"),
    Feature("compilation", "full and piecewise CUDA graphs", ABSENT, TRIED),
    Feature("compilation", "both model runners", ABSENT, TRIED, "The CPU build has the first alone."),
    # ---- tools
    Feature(
        "tools",
        "`vllm serve`, streaming, logprobs",
        TESTED,
        TRIED,
        "",
        "test_vllm_server.py::test_completion_and_streaming",
    ),
    Feature("tools", "`LLM.generate`, `LLM.chat`", TESTED, TRIED, "", _ENTRY + "generate_and_chat"),
    Feature("tools", "`vllm bench`", TESTED, TRIED, "", _ENTRY + "bench_throughput"),
    Feature("tools", "`ray.data.llm`", TESTED, UNRUN, "", _ENTRY + "ray_data"),
    Feature(
        "tools",
        "`ray.serve.llm`",
        TESTED,
        UNRUN,
        "",
        "test_ray.py::test_replicas_serve_one_address_and_a_killed_one_comes_back",
    ),
)


def markdown() -> str:
    """The table as the README has it: what runs, row by row, and what is refused in a sentence."""
    lines = ["| | | on the CPU | on a GPU | |", "|---|---|---|---|---|"]
    kind = None
    for feature in FEATURES:
        if (feature.cpu, feature.gpu) != (REFUSED, REFUSED):
            heading = feature.kind if feature.kind != kind else ""
            kind = feature.kind
            lines.append(f"| {heading} | {feature.name} | {feature.cpu} | {feature.gpu} | {feature.note} |")
    refused = [feature.name for feature in FEATURES if (feature.cpu, feature.gpu) == (REFUSED, REFUSED)]
    return "\n".join([*lines, "", f"Refused: {'; '.join(refused)}."])
