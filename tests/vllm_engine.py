# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines in a process of their own and look inside them.

A test talks to an :class:`EngineHost`: a Python process that imports vLLM once and then
builds one engine after the other, each with its engine arguments and environment. The
engine core runs in that process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so the host can
also fill the KV cache with poison, count free blocks and record what was scheduled.
Requests and answers are lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MODEL = REPO / "examples" / "demo_model"

# Without binding and with passive waiting two threads also share busy cores well.
BASE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
    "OMP_WAIT_POLICY": "passive",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Set by a test or not at all.
SWITCHES = ("VLLM_OSCAR_CODEC", "VLLM_OSCAR_KERNELS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_USE_SIMPLE_KV_OFFLOAD")


def environment(**extra: str) -> dict[str, str]:
    """The environment of a vLLM process: ours without the plugin's switches, plus ``extra``."""
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return env | BASE_ENV | extra


class EngineError(RuntimeError):
    """The engine refused or failed; the message is vLLM's, the log follows."""


class EngineHost:
    """A process that runs one engine at a time. Use as a context manager."""

    def __init__(self, **env: str) -> None:
        self.log = tempfile.NamedTemporaryFile("w+", prefix="vllm_engine_", suffix=".log", errors="replace")
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(write)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=(write,),
            env=environment(**env),
            text=True,
        )
        os.close(write)
        self._answers = os.fdopen(read)

    def __enter__(self) -> EngineHost:
        return self

    def __exit__(self, *exc) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _call(self, command: str, **arguments):
        print(json.dumps({"command": command, **arguments}), file=self._process.stdin, flush=True)
        line = self._answers.readline()
        if not line:
            raise EngineError(f"the engine process died\n{self.log_text()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["result"]

    def log_text(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def call(self, module: str, function: str, *arguments) -> None:
        """Call a function of a module of this folder in the process."""
        self._call("call", module=module, function=function, arguments=arguments)

    def inside(self, module: str, function: str, *arguments):
        """What ``function(engine, *arguments)`` of a module of this folder answers in the process."""
        return self._call("inside", module=module, function=function, arguments=arguments)

    def start(self, kv_cache_dtype: str = "auto", env: dict[str, str] | None = None, **engine_args) -> dict:
        """Replace the running engine. Returns its block count and reported capacity."""
        args = {
            "model": str(MODEL),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 4096,
            "seed": 0,
            "disable_log_stats": False,
            "kv_cache_dtype": kv_cache_dtype,
            "kv_cache_memory_bytes": 1 << 30,
        }
        return self._call("start", args=args | engine_args, env=env or {})

    def run(
        self,
        prompts: list[list[int] | dict],
        max_tokens: int = 12,
        abort: dict[int, int] | None = None,
        resets: tuple[int, ...] = (),
        **options,
    ):
        """Submit all prompts in one step and run them to the end.

        Args:
            prompts: token ids, or a dict with ``ids`` and ``images`` as lists of ``[height, width, seed]`` and
                ``sounds`` of ``[samples at 16 kHz, seed]``: noise; instead of ``ids`` it may have ``embeds`` as
                ``[tokens, channels, seed]``; and a ``priority`` and the folder of a ``lora`` adapter.
            abort: prompt index to the number of output tokens after which it is aborted.
            resets: numbers of engine steps after which everything running is preempted and the prefix cache forgotten.
            options: more sampling parameters. Greedy, 10 logprobs and no early end unless said.

        Returns:
            One dict per prompt: ``outputs`` (per sample: ``tokens``, ``logprobs`` as a list of
            {token: logprob}, ``finish``), ``cached`` (tokens hit in the prefix cache),
            ``arrivals`` (engine steps that delivered something), ``chunks``: what the
            scheduler ran as ``[context, tokens]``, and ``drafts``: the drafted tokens of each
            step that verified some.
        """
        sampling = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": 10, "ignore_eos": True} | options
        return self._call("run", prompts=prompts, sampling=sampling, abort=abort or {}, resets=resets)

    def poison(self, word: int) -> int:
        """Fill the KV cache with a 32-bit word and forget the prefix cache. Returns bytes filled."""
        return self._call("poison", word=word)

    def make_nan(self, token: int) -> None:
        """From now on the embedding of ``token`` is NaN, and so are the keys and values after it."""
        self._call("make_nan", token=token)

    def state(self) -> dict:
        """Free blocks, running requests, tokens that offloading has room for, and counters since the engine started."""
        return self._call("state")

    def stop(self) -> None:
        self._call("stop")


# ---- the process ------------------------------------------------------------------
def _pretend_gpus() -> None:
    """vLLM has no Ray resource for CPUs; fake GPUs serve as one."""
    from vllm.platforms import current_platform

    type(current_platform).ray_device_key = "GPU"


def _start_ray() -> None:
    """Ray in this process and its children, reachable from this machine alone."""
    import ray

    _pretend_gpus()
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        num_cpus=4,
        num_gpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": _pretend_gpus},
    )


class _Engine:
    """Executes the host's commands."""

    def __init__(self) -> None:
        self.llm = None
        self.count = 0
        self.scheduled: dict[str, list[list[int]]] = {}
        self.drafted: dict[str, list[list[int]]] = {}

    def call(self, module: str, function: str, arguments: list) -> None:
        getattr(importlib.import_module(module), function)(*arguments)

    def inside(self, module: str, function: str, arguments: list):
        return getattr(importlib.import_module(module), function)(self, *arguments)

    def start(self, args: dict, env: dict[str, str]) -> dict:
        self.stop()
        from vllm import LLM
        from vllm.platforms import current_platform

        for name in SWITCHES:
            os.environ.pop(name, None)
        os.environ.update(env)
        if args.get("distributed_executor_backend") == "ray":
            _start_ray()
        self.llm = LLM(**args)
        # Once is enough, and the second time vLLM trips over numba if n-gram drafting loaded it.
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
        self._record_schedule()
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {"blocks": cache.num_gpu_blocks, "tokens": cache.kv_cache_size_tokens, "free": self.state()["free"]}

    @property
    def core(self):
        return self.llm.llm_engine.engine_core.engine_core

    def _record_schedule(self) -> None:
        scheduler, original = self.core.scheduler, self.core.scheduler.schedule

        def schedule(*args, **kwargs):
            output = original(*args, **kwargs)
            contexts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
            cached = output.scheduled_cached_reqs
            contexts |= dict(zip(cached.req_ids, cached.num_computed_tokens))
            for request, tokens in output.num_scheduled_tokens.items():
                self.scheduled.setdefault(request, []).append([contexts[request], tokens])
            for request, tokens in output.scheduled_spec_decode_tokens.items():
                self.drafted.setdefault(request, []).append(list(tokens))
            return output

        scheduler.schedule = schedule

    def run(self, prompts: list, sampling: dict, abort: dict, resets: list) -> list:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        sampling = dict(sampling)
        if "structured_outputs" in sampling:
            sampling["structured_outputs"] = StructuredOutputsParams(**sampling["structured_outputs"])
        if sampling.pop("stream", False):
            sampling["output_kind"] = RequestOutputKind.DELTA
        engine, results, index_of = self.llm.llm_engine, [], {}
        self.scheduled.clear()
        self.drafted.clear()
        for index, prompt in enumerate(prompts):
            self.count += 1
            name = f"request-{self.count}"
            index_of[name] = index
            results.append({"outputs": {}, "arrivals": 0, "cached": None})
            engine.add_request(name, _prompt(prompt), SamplingParams(**sampling), **_request(prompt))
        steps = 0
        while engine.has_unfinished_requests():
            steps += 1
            if steps in resets:
                assert engine.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                index = index_of[output.request_id]
                result = results[index]
                result["arrivals"] += 1
                if output.num_cached_tokens is not None:
                    result["cached"] = output.num_cached_tokens
                for sample in output.outputs:
                    self._collect(result["outputs"].setdefault(sample.index, _empty()), sample, sampling)
                limit = abort.get(str(index))
                if limit is not None and len(result["outputs"][0]["tokens"]) >= limit and not output.finished:
                    engine.abort_request([output.request_id])
                    result["outputs"][0]["finish"] = "abort"
        for result in results:
            result["outputs"] = [result["outputs"][i] for i in sorted(result["outputs"])]
        for name, chunks in self.scheduled.items():  # the engine appends to the names it was given
            owner = next((n for n in index_of if name == n or name.startswith(n + "-")), None)
            if owner:
                results[index_of[owner]] |= {"chunks": chunks, "drafts": self.drafted.get(name, [])}
        return results

    @staticmethod
    def _collect(into: dict, sample, sampling: dict) -> None:
        delta = "output_kind" in sampling
        logprobs = [{t: x.logprob for t, x in row.items()} for row in sample.logprobs or []]
        into["tokens"] = into["tokens"] + list(sample.token_ids) if delta else list(sample.token_ids)
        into["logprobs"] = into["logprobs"] + logprobs if delta else logprobs
        into["finish"] = sample.finish_reason

    @property
    def runner(self):
        return self.core.model_executor.driver_worker.worker.model_runner

    def make_nan(self, token: int) -> None:
        def hook(module, inputs, output):
            return output.masked_fill((inputs[0] == token)[:, None], float("nan"))

        self.runner.model.model.embed_tokens.register_forward_hook(hook)

    def _cache_storages(self) -> list:
        storages = {}
        for cache in self.runner.kv_caches:
            for tensor in cache if isinstance(cache, (list, tuple)) else [cache]:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return list(storages.values())

    def poison(self, word: int) -> int:
        import torch

        storages = self._cache_storages()
        for storage in storages:
            signed = word - (1 << 32) if word >> 31 else word
            torch.tensor([], dtype=torch.int32).set_(storage).fill_(signed)
        self.llm.reset_prefix_cache()
        return sum(storage.nbytes() for storage in storages)

    def state(self) -> dict:
        counters = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        scheduler = self.core.scheduler
        return {
            "free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "counters": counters,
            "host_tokens": self._host_tokens(),
        }

    def _host_tokens(self) -> int:
        """Tokens that fit into host memory, if vLLM's ``OffloadingConnector`` is used."""
        offloader = getattr(self.core.scheduler.connector, "connector_scheduler", None)
        if offloader is None:
            return 0
        return offloader.manager._num_chunks * offloader.config.kv_group_configs[0].tokens_per_chunk

    def stop(self) -> None:
        if self.llm is None:
            return
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory

        alone = hasattr(self.core.model_executor, "driver_worker")  # else workers have processes of their own
        storages = self._cache_storages() if alone else []
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        cleanup_dist_env_and_memory()
        gc.collect()
        for storage in storages:  # vLLM keeps some alive, and a hundred engines would fill the machine
            storage.resize_(0)


def _prompt(prompt: list[int] | dict) -> dict:
    """What vLLM takes as a prompt."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    if "embeds" in prompt:
        import torch

        *shape, seed = prompt["embeds"]
        return {"prompt_embeds": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}
    import numpy
    from PIL import Image

    def noise(seed: int, *shape: int):
        return numpy.random.RandomState(seed).rand(*shape)

    images = [Image.fromarray((noise(seed, h, w, 3) * 255).astype("uint8")) for h, w, seed in prompt.get("images", [])]
    sounds = [((noise(seed, samples) - 0.5).astype("float32"), 16000) for samples, seed in prompt.get("sounds", [])]
    data = {name: items for name, items in (("image", images), ("audio", sounds)) if items}
    return {"prompt_token_ids": prompt["ids"]} | ({"multi_modal_data": data} if data else {})


def _request(prompt: list[int] | dict) -> dict:
    """The other arguments of a request."""
    asked = prompt if isinstance(prompt, dict) else {}
    found = {"priority": asked["priority"]} if "priority" in asked else {}
    if "lora" in asked:
        from vllm.lora.request import LoRARequest

        found["lora_request"] = LoRARequest(Path(asked["lora"]).name, 1, asked["lora"])
    return found


def _empty() -> dict:
    return {"tokens": [], "logprobs": [], "finish": None}


def _serve(answers) -> None:
    engine = _Engine()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(engine, request.pop("command"))(**request)}
        except Exception as error:  # reported to the test
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    engine.stop()


if __name__ == "__main__":
    _serve(os.fdopen(int(sys.argv[1]), "w"))
