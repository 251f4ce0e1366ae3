# SPDX-License-Identifier: Apache-2.0
"""Batch generation over a data set with Ray Data and an INT2 KV cache.

    python examples/ray_batch.py [MODEL] [--kv-cache-dtype oscar] [--gpus 1]

Each row is a prompt; ``ray.data.llm`` runs one vLLM engine per replica and streams the
rows through it. Nothing here is special but ``kv_cache_dtype``. Without a GPU, Ray's
default of one GPU per engine cannot be scheduled: the placement group then asks for
CPUs only, which is enough for an engine without tensor parallelism. Engine metrics are
off because they need ``ray[serve]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

PROMPTS = ["import os\n", "def add(a, b):\n", "class Point:\n", "for i in range(", "# Read a file\n", "try:\n    "]


def generate(model: str, kv_cache_dtype: str, gpus: int, prompts: list[str]) -> list[dict]:
    """One row per prompt, with ``prompt`` and ``answer``."""
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={
            "kv_cache_dtype": kv_cache_dtype,
            "max_model_len": 4096,
            "enforce_eager": True,
            **({} if gpus else {"kv_cache_memory_bytes": 256 << 20}),
        },
        batch_size=len(prompts),
        concurrency=1,
        placement_group_config={"bundles": [{"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}]},
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"prompt": row["prompt"], "sampling_params": {"temperature": 0.0, "max_tokens": 24}},
        postprocess=lambda row: {"prompt": row["prompt"], "answer": row["generated_text"]},
    )
    return processor(ray.data.from_items([{"prompt": prompt} for prompt in prompts])).take_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "demo_model"))
    parser.add_argument("--kv-cache-dtype", default="oscar")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs per engine")
    arguments = parser.parse_args()
    ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=4)
    for row in generate(arguments.model, arguments.kv_cache_dtype, arguments.gpus, PROMPTS):
        print(f"{row['prompt']!r} -> {row['answer']!r}")


if __name__ == "__main__":
    main()
