# SPDX-License-Identifier: Apache-2.0
"""Batch generation over a data set with Ray Data and an INT2 KV cache.

    python examples/ray_batch.py [MODEL] [--kv-cache-dtype oscar] [--replicas 2] [--gpus 1] [--rows 24]

Each row is a prompt; ``ray.data.llm`` runs one vLLM engine per replica and streams the rows through them, a few batches
at a time. Nothing here is special but ``kv_cache_dtype``. Answers are printed as they arrive, in any order.

A replica that dies loses nothing: Ray Data starts it again and gives it the batches that were with it once more
(``max_restarts`` and ``max_task_retries`` of its actors are unlimited unless said otherwise), so every row is answered
exactly once. Batches are small, so that little is generated twice.

Without a GPU, Ray's default of one GPU per engine cannot be scheduled: the placement group then asks for CPUs only,
which is enough for an engine without tensor parallelism. Engine metrics are off because they need ``ray[serve]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

PROMPTS = ["import os\n", "def add(a, b):\n", "class Point:\n", "for i in range(", "# Read a file\n", "try:\n    "]
BATCH = 4  # rows that a replica takes at once, and has to do again if it dies


def generate(
    model: str, kv_cache_dtype: str, gpus: int, prompts: list[str], replicas: int = 1, tokens: int = 24
) -> Iterator[dict]:
    """One row per prompt, with its index ``row``, ``prompt`` and ``answer``, as they arrive."""
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={
            "kv_cache_dtype": kv_cache_dtype,
            "max_model_len": 4096,
            "enforce_eager": True,
            **({} if gpus else {"kv_cache_memory_bytes": 256 << 20}),
        },
        batch_size=BATCH,
        max_concurrent_batches=2,
        concurrency=(replicas, replicas),
        placement_group_config={"bundles": [{"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}]},
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    processor = build_processor(
        config,
        preprocess=lambda row: {"prompt": row["prompt"], "row": row["row"], "sampling_params": sampling},
        postprocess=lambda row: {"row": row["row"], "prompt": row["prompt"], "answer": row["generated_text"]},
    )
    rows = [{"row": index, "prompt": prompt} for index, prompt in enumerate(prompts)]
    # A block is what Ray hands to a replica: as many as there are batches.
    yield from processor(ray.data.from_items(rows, override_num_blocks=-(-len(rows) // BATCH))).iter_rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "demo_model"))
    parser.add_argument("--kv-cache-dtype", default="oscar")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs per engine")
    parser.add_argument("--replicas", type=int, default=1, help="engines")
    parser.add_argument("--rows", type=int, default=len(PROMPTS), help="prompts; the same few again and again")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    arguments = parser.parse_args()
    ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=3 + arguments.replicas)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(arguments.rows)]
    answers = generate(
        arguments.model, arguments.kv_cache_dtype, arguments.gpus, prompts, arguments.replicas, arguments.tokens
    )
    for row in answers:
        print(f"{row['row']} {row['prompt']!r} -> {row['answer']!r}", flush=True)


if __name__ == "__main__":
    main()
