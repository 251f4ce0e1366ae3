# SPDX-License-Identifier: Apache-2.0
"""The record of a benchmark: one flat dict per measurement, from what vLLM's tools wrote."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from vllm_oscar.tools.bench.sweep import WARM_UP, Sweep
from vllm_oscar.tools.bench.workloads import point_name

# Of a result of `vllm bench serve`, and what we call it. Times in milliseconds.
_KEPT = {
    "max_concurrency": "concurrency",
    "completed": "completed",
    "failed": "failed",
    "duration": "seconds",
    "total_input_tokens": "input_tokens",
    "total_output_tokens": "output_tokens",
    "output_throughput": "output_tokens_per_s",
    "p50_ttft_ms": "ttft_p50",
    "p99_ttft_ms": "ttft_p99",
    "p50_tpot_ms": "tpot_p50",
    "p99_tpot_ms": "tpot_p99",
    "spec_decode_acceptance_rate": "acceptance_percent",
    "spec_decode_acceptance_length": "acceptance_length",
}


def _counted(folder: Path) -> dict[Path, dict]:
    """What the server counted during each measurement below ``folder``, by the path of its result."""
    scraped = [(path, json.loads(path.read_text())) for path in folder.rglob("*.counters.json")]
    before: dict = {}
    result = {}
    for path, after in sorted(scraped, key=lambda item: item[1]["time"]):
        if before.get("server") != after.get("server"):
            before = {}  # a server starts counting at 0
        counted = {name: after[name] - before.get(name, 0) for name in ("preemptions", "prefix_queries", "prefix_hits")}
        kept = {name: after[name] for name in after if name not in counted and name not in ("time", "server")}
        result[path.with_name(path.name.replace(".counters", ""))] = counted | kept
        before = after
    return result


def name_of(point: dict) -> str:
    """The point that a measurement is of, as the sweep calls it."""
    return point_name(point["workload"], point["concurrency"])


def collect(sweep: Sweep) -> list[dict]:
    """One dict per measurement that is complete, in the order of dtypes and workloads.

    ``output_tokens_per_s`` is of all ranks together, ``per_user`` and ``per_device`` are that divided.
    """
    points = []
    for dtype in sweep.dtypes:
        counted = _counted(sweep.folder / dtype)
        for path in sorted((sweep.folder / dtype).rglob("run=*[0-9].json")):
            found = json.loads(path.read_text())
            # The sweep adds the name last; a result without counters belongs to a measurement that was cut off.
            name = found.get("_benchmark_name", WARM_UP)
            if name == WARM_UP or path not in counted:
                continue
            point = {"dtype": dtype, "workload": name.rsplit("-c", 1)[0], "run": found["run_number"]}
            point |= {new: found[old] for old, new in _KEPT.items() if found.get(old) is not None}
            point["per_user"] = point["output_tokens_per_s"] / point["concurrency"]
            point["per_device"] = point["output_tokens_per_s"] / sweep.settings.tensor_parallel
            counts = counted[path]
            queries, hits = counts.pop("prefix_queries"), counts.pop("prefix_hits")
            points.append(point | {"prefix_hit_percent": 100 * hits / queries if queries else 0.0} | counts)
    order = {name: index for index, name in enumerate(sweep.bench_params())}
    measured = [point for point in points if name_of(point) in order]
    return sorted(measured, key=lambda point: order[name_of(point)])


def missing(sweep: Sweep, dtype: str) -> list[str]:
    """The points of which not all measurements are there, or in which a request failed, by name."""
    complete = [p for p in collect(sweep) if p["dtype"] == dtype and not p["failed"]]
    done = Counter(map(name_of, complete))
    return [name for name in sweep.bench_params() if name != WARM_UP and done[name] < sweep.runs]


def failed(sweep: Sweep, dtype: str) -> list[dict]:
    """The measurements in which requests failed."""
    return [point for point in collect(sweep) if point["dtype"] == dtype and point["failed"]]


def collect_offline(sweep: Sweep) -> list[dict]:
    """One dict per finished ``vllm bench throughput``."""
    return [
        {
            "dtype": dtype,
            "workload": workload.name,
            "requests": requests,
            "seconds": found["elapsed_time"],
            "output_tokens_per_s": requests * workload.output / found["elapsed_time"],
            **found["stamp"],
        }
        for dtype in sweep.dtypes
        for path, workload, requests in sweep.batch_results(dtype)
        if path.exists() and "stamp" in (found := json.loads(path.read_text()))
    ]


def stamp_batch(result: Path) -> None:
    """Add versions, commit and date to what ``vllm bench throughput`` wrote."""
    from vllm_oscar.tools.bench.scrape import stamp

    result.write_text(json.dumps(json.loads(result.read_text()) | {"stamp": stamp()}, indent=1) + "\n")


def write_record(sweep: Sweep, command: str) -> Path:
    """Write ``bench.json``: settings, workloads, commands, measurements. Returns its path."""
    settings = sweep.settings
    record = {
        "command": command,
        "model": settings.shape or settings.model,
        "dummy_weights": bool(settings.shape),
        "device": settings.device,
        "kv_memory": settings.kv_memory,
        "scale": settings.scale,
        "devices": settings.tensor_parallel,
        "dtypes": sweep.dtypes,
        "workloads": [
            {
                "name": workload.name,
                "about": workload.about,
                "shared": workload.shared,
                "input": workload.input,
                "output": workload.output,
                "concurrency": concurrency,
            }
            for workload, concurrency in sweep.points
        ],
        "commands": {dtype: sweep.single_commands(dtype) for dtype in sweep.dtypes},
        "points": collect(sweep),
        "offline": collect_offline(sweep),
    }
    path = sweep.folder / "bench.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
