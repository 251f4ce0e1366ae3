# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a server: it ends cleanly or recovers as vLLM does, and never serves garbage."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from test_vllm_lossless import LOSSLESS, assert_same, difference
from vllm_engine import MODEL, REPO, EngineError, EngineHost, environment
from vllm_server import FACTS, VLLM, Server, free_port, recall, serving

from vllm_oscar.core.config import PRESETS
from vllm_oscar.engine import checks
from vllm_oscar.engine.refusal import UnsupportedByOscar

SMALL = ("--kv-cache-dtype", "oscar", "--max-model-len", "4096", "--num-gpu-blocks-override", "200")


# ---- a process is killed


def ask(server: Server, stream: bool):
    """A request that lasts for minutes; what ended it."""
    try:
        reply = server.complete(
            "import os\n", max_tokens=4000, stream=stream, extra_body={"ignore_eos": True, "min_tokens": 4000}
        )
        return list(reply)[-1] if stream else reply
    except Exception as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("victim, options", [("EngineCore", ()), ("Worker", ("--tensor-parallel-size", "2"))])
def test_a_killed_process_ends_the_server(tmp_path, victim, options):
    """Clients get an error and no answer that looks whole, and the next server on the same port answers rightly."""
    port = free_port()
    with serving(tmp_path / "first", *SMALL, *options, port=port) as server, ThreadPoolExecutor(6) as pool:
        children = psutil.Process(server.process.pid).children(recursive=True)
        victims = [child for child in children if victim in f"{child.name()} {' '.join(child.cmdline())}"]
        assert victims, children
        asked = [pool.submit(ask, server, stream) for stream in (True, False) * 3]
        while server.metric("num_requests_running") < len(asked):
            time.sleep(0.2)
        victims[-1].send_signal(signal.SIGKILL)
        for ended in asked:
            assert isinstance(ended.result(timeout=120), openai.APIError)
        server.process.wait(120)  # its status is 0, with any dtype: vLLM's server shuts down in order
        _, left = psutil.wait_procs(children, 60)
        assert not left
    with serving(tmp_path / "second", *SMALL, *options, port=port) as server:
        assert recall(server) == FACTS


# ---- host memory for offloading is too small, full or not to be read


def of_host_memory(device: str = "cpu", size: float | None = None, extra: dict | None = None, connector=None):
    transfer = SimpleNamespace(kv_connector=connector, kv_connector_extra_config=extra) if connector else None
    cache = SimpleNamespace(kv_offloading_size=size)
    return checks._check_host_memory(SimpleNamespace(cache_config=cache, kv_transfer_config=transfer), device)


def test_more_host_memory_than_there_is(monkeypatch, tmp_path):
    """On a GPU the room in shared memory counts, except for the connector that does not use it."""
    from vllm.engine.arg_utils import EngineArgs

    total = psutil.virtual_memory().total / (1 << 30)
    of_host_memory(size=total / 2)
    for arguments in (
        {"size": 2 * total},
        {"extra": {"cpu_bytes_to_use": int(2 * total) << 30}, "connector": "OffloadingConnector"},
    ):
        with pytest.raises(UnsupportedByOscar, match=r"asks for \S+ GiB, but .* has \S+ GiB of memory; lower it$"):
            of_host_memory(**arguments)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: SimpleNamespace(free=1 << 30))
    monkeypatch.setattr(checks, "SHARED_MEMORY", str(tmp_path))
    of_host_memory("cuda", size=0.9)
    with pytest.raises(UnsupportedByOscar, match=f"has 1.0 GiB of room in {tmp_path}; lower it, or enlarge"):
        of_host_memory("cuda", size=1.1)
    of_host_memory("cuda", extra={"cpu_bytes_to_use": 2 << 30}, connector="SimpleCPUOffloadConnector")
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    of_host_memory("cuda", size=1.1)
    with pytest.raises(UnsupportedByOscar, match="--kv-offloading-size asks for"):
        EngineArgs(model=str(MODEL), kv_cache_dtype="oscar", kv_offloading_size=2 * total).create_engine_config()


@pytest.fixture(scope="module")
def offloading(engine_host):
    engine_host.call("offload_on_cpu", "install")
    return engine_host


@pytest.fixture(scope="module")
def many(text) -> list[list[int]]:
    """Of two to four pages each, in all far more than the host has."""
    return [text(260 + 37 * i, at=600 * i) for i in range(8)]


FULL = {"enable_prefix_caching": True, "max_model_len": 1024, "kv_offloading_size": 0.02}


@pytest.mark.slow
def test_a_full_host_forgets_and_never_errs(offloading, many):
    """Twelve pages for the prefixes of twenty."""
    offloading.start("auto", enable_prefix_caching=False, max_model_len=1024)
    expected = offloading.run(many)
    info = offloading.start("oscar", env=LOSSLESS, **FULL)
    pages = offloading.state()["host_tokens"] // 128
    assert 8 <= pages < sum(len(prompt) // 128 for prompt in many)
    hits = 0
    for _ in range(3):
        found = offloading.run(many)
        assert_same(expected, found)
        offloading.poison(0x7FC00000)
        found = offloading.run(many[-2:])
        assert_same(expected[-2:], found)
        hits += sum(result["cached"] for result in found)
        offloading.poison(0x7FC00000)
    assert hits > 0 and offloading.state()["free"] == info["free"]


@pytest.mark.slow
def test_a_host_that_cannot_be_read_ends_the_engine(offloading, many):
    """Instead of answers from pages that never came; the next engine is well."""
    prompts = many[:2]
    for fail in (True, False):
        offloading.start("oscar", env=LOSSLESS, **FULL)
        first = offloading.run(prompts)
        offloading.run([many[3][:9]], max_tokens=2)  # sees the copies through
        offloading.poison(0x7FC00000)
        offloading.call("offload_on_cpu", "let_loads_fail", fail)
        try:
            if fail:
                with pytest.raises(EngineError, match="AssertionError"):
                    offloading.run(prompts)
            else:
                found = offloading.run(prompts)
                assert all(result["cached"] > 0 for result in found)
                assert_same(first, found)
        finally:
            offloading.call("offload_on_cpu", "let_loads_fail", False)


# ---- hostile requests


def fixed_logprobs(server: Server, text, salt: str) -> list:
    """Of one request; another ``salt`` keeps it from the pages of the one before, whose tokens a hit would read."""
    reply = server.complete(text(300, at=3000), max_tokens=16, logprobs=5, extra_body={"cache_salt": salt})
    logprobs = reply.choices[0].logprobs
    return [logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs]


GOOD = {
    "/v1/completions": {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 6},
    "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6},
}


def bombard(server: Server, path: str, mode: str, count: int) -> dict[bytes, int]:
    """Status of ``count`` bodies, made from the server's own schema, and of good ones with one field of those each.

    Nearly all bodies are refused; it is those with one odd field that reach the engine.
    """
    from schemathesis import GenerationMode, openapi

    operation = openapi.from_url(server.url + "/openapi.json")[path]["POST"]
    statuses: dict[bytes, int] = {}

    def send(body) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
        statuses[data] = server.post(path, data)

    @settings(max_examples=count, phases=[Phase.generate], deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=GenerationMode[mode]))
    def post(case) -> None:
        body = case.body
        if not isinstance(body, dict):
            return send(body)
        send(body | {"model": "demo"})
        field = sorted(body)[len(statuses) % len(body)] if body else "model"
        send(GOOD[path] | {field: body.get(field)})

    post()
    return statuses


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hostile_requests_change_nothing(tmp_path, text):
    """More than a thousand of them. A 500 is vLLM's own if ``auto`` gives it, too."""
    common = ("--max-model-len", "384", "--max-num-seqs", "16")
    statuses = {}
    with serving(tmp_path / "oscar", "--kv-cache-dtype", "oscar", *common, VLLM_MAX_N_SEQUENCES="8") as server:
        before = fixed_logprobs(server, text, "before")
        for path in GOOD:
            for mode in ("POSITIVE", "NEGATIVE"):
                for body, status in bombard(server, path, mode, 200).items():
                    statuses[path, body] = status
        server.wait_until_quiet()
        assert fixed_logprobs(server, text, "after") == before
        assert server.process.poll() is None
    counts = {status: list(statuses.values()).count(status) for status in sorted(set(statuses.values()))}
    assert len(statuses) > 800 and counts.get(200, 0) > 100 and counts.get(400, 0) > 300, counts
    failed = [request for request, status in statuses.items() if status >= 500]
    if failed:
        with serving(tmp_path / "auto", "--kv-cache-dtype", "auto", *common, VLLM_MAX_N_SEQUENCES="8") as server:
            for path, body in failed:
                assert server.post(path, body) == statuses[path, body], (path, body)


# ---- broken adapters


BROKEN = ("nan", "inf")


def beside_an_adapter(host, text, folder, broken: str, dtype: str, env: dict) -> list[list[dict]]:
    """What requests with the adapter and without one get in the same steps, and others in their blocks afterwards.

    vLLM's CPU build gives requests without an adapter the last of ``max_loras``: here an empty one.
    """
    host.call("engine_features", "adapter", str(folder), broken)
    host.start(
        dtype, env=env, max_model_len=512, max_num_batched_tokens=200, num_gpu_blocks_override=70,
        enable_prefix_caching=True, enable_lora=True, max_loras=2, max_lora_rank=8,
    )  # fmt: skip
    host.poison(0)
    shared = text(300, at=3000)
    plain = [shared, text(250, at=100), shared[:150] + text(130, at=6000)[1:]]
    asked = [{"ids": prompt, "lora": str(folder)} for prompt in (shared, text(140, at=700))]
    mixed = host.run(asked + plain, max_tokens=20)
    later = host.run([text(300, at=9000 + 500 * i) for i in range(4)] + plain, max_tokens=20)
    return [mixed[:2], mixed[2:], later]


@pytest.mark.parametrize(
    "dtype, codec", [("oscar", {}), pytest.param("oscar", LOSSLESS, marks=pytest.mark.slow)], ids=["oscar", "lossless"]
)
@pytest.mark.parametrize("broken", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_broken_adapter_breaks_its_own_requests_alone(engine_host, text, tmp_path, broken, dtype, codec):
    """Others get the same bits as beside a sound adapter."""
    _, *sound = beside_an_adapter(engine_host, text, tmp_path / "sound", "0", dtype, codec)
    bad, *found = beside_an_adapter(engine_host, text, tmp_path / broken, broken, dtype, codec)
    values = [value for result in bad for row in result["outputs"][0]["logprobs"] for value in row.values()]
    assert any(map(math.isnan, values))
    for expected, others in zip(sound, found):
        assert difference(expected, others) == 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_adapter_answers_as_with_auto(engine_host, text, tmp_path, broken):
    answers = [
        beside_an_adapter(engine_host, text, tmp_path / broken, broken, dtype, env)[0]
        for dtype, env in (("auto", {}), ("oscar", LOSSLESS))
    ]
    auto, ours = ([[sample["tokens"], str(sample["logprobs"])] for r in a for sample in r["outputs"]] for a in answers)
    assert auto == ours


# ---- what an older version had


def test_a_preset_of_another_version():
    """In Python; nothing is started."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(UnsupportedByOscar) as caught:
        EngineArgs(model=str(MODEL), kv_cache_dtype="oscar_old").create_engine_config()
    assert str(caught.value) == f"--kv-cache-dtype oscar_old is no preset; choose one of {', '.join(PRESETS)}"


@pytest.mark.slow
def test_a_preset_of_another_version_on_the_command_line():
    command = [VLLM, "serve", str(MODEL), "--kv-cache-dtype", "oscar_old"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0 and "invalid choice: 'oscar_old' (choose from" in last and "oscar_small" in last


@pytest.mark.slow
def test_a_stale_library_is_not_used(text, tmp_path):
    """Not even by a server: the log says how to build it, and the answers are those of the reference."""
    for name in ("vllm_oscar", "csrc", "setup.py"):
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, tmp_path / name)
    prompts = [text(150, at=70), text(40, at=500)]
    with EngineHost(PYTHONPATH=str(tmp_path)) as host:
        host.start("oscar", env={"VLLM_OSCAR_KERNELS": "reference"}, max_model_len=512)
        expected = host.run(prompts, max_tokens=4)
    with (tmp_path / "csrc/cpu/dispatch.cpp").open("a") as source:
        source.write("// changed since\n")
    with EngineHost(PYTHONPATH=str(tmp_path)) as host:
        host.start("oscar", max_model_len=512)
        assert difference(expected, host.run(prompts, max_tokens=4)) == 0
        assert "is stale: it was made from other sources" in host.log_text()
        assert f"run `OSCAR_NATIVE=cpu pip install --no-deps -e .` in {tmp_path}" in host.log_text()
