# SPDX-License-Identifier: Apache-2.0
"""Serve a model with several replicas behind one OpenAI address, with Ray Serve LLM and an INT2 KV cache.

    pip install 'vllm-oscar[serve]'
    python examples/ray_serve.py [MODEL] [--kv-cache-dtype oscar] [--replicas 2] [--gpus 1] [--port 8000]

Nothing here is special but ``kv_cache_dtype``: the plugin is loaded by vLLM in each replica. Ray Serve spreads requests
over the replicas and starts a replica that died again. A request that was with it fails, as with any server; clients
repeat it (the ``openai`` client does so twice by itself, before anything was streamed).

HTTP binds 127.0.0.1. Without a GPU the replicas ask Ray for CPUs. It takes two minutes on two quiet cores until it
answers, ten on busy ones: each of Ray's processes imports vLLM for itself.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.llm import LLMConfig, LLMServingArgs, build_openai_app


def application(model: str, kv_cache_dtype: str, replicas: int, gpus: int):
    """The Ray Serve application; its model is called by the name of its folder."""
    config = LLMConfig(
        model_loading_config={"model_id": Path(model).name, "model_source": model},
        engine_kwargs={
            "kv_cache_dtype": kv_cache_dtype,
            "max_model_len": 4096,
            "enforce_eager": True,
            **({"tensor_parallel_size": gpus} if gpus else {"kv_cache_memory_bytes": 256 << 20}),
        },
        deployment_config={"num_replicas": replicas, "health_check_period_s": 5},
        log_engine_metrics=False,
        **({} if gpus else {"accelerator_config": {"kind": "cpu"}}),
    )
    return build_openai_app(LLMServingArgs(llm_configs=[config]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "demo_model"))
    parser.add_argument("--kv-cache-dtype", default="oscar")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs per replica")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    cpus = 3 + 2 * arguments.replicas
    ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=cpus)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=arguments.port))
    serve.run(application(arguments.model, arguments.kv_cache_dtype, arguments.replicas, arguments.gpus))
    print(f"http://127.0.0.1:{arguments.port}/v1", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
