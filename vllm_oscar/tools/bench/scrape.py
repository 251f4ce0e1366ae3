# SPDX-License-Identifier: Apache-2.0
"""What the server counted during a measurement; called by ``vllm bench sweep`` after each."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

COUNTERS = {
    "vllm:num_preemptions": "preemptions",
    "vllm:prefix_cache_queries": "prefix_queries",
    "vllm:prefix_cache_hits": "prefix_hits",
}
RESETS = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")


def counters(text: str) -> dict:
    """Sums over engines of what ``/metrics`` counts, the start of the server's process and the tokens in its cache."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict = dict.fromkeys(COUNTERS.values(), 0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            if name in COUNTERS:
                found[COUNTERS[name]] += int(sample.value)
            elif name == "process_start_time_seconds":
                found["server"] = sample.value
            elif name == "vllm:cache_config_info":
                tokens = sample.labels.get("kv_cache_size_tokens", "")
                found["kv_tokens"] = int(tokens) if tokens.isdigit() else None
    return found


def commit() -> str:
    """Of this checkout, with ``-dirty`` if files are changed; ``OSCAR_COMMIT`` where they were copied without it; or ""
    in an installed package."""
    if "OSCAR_COMMIT" in os.environ:
        return os.environ["OSCAR_COMMIT"]
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip()


def device() -> str:
    """The accelerators or the processor, in words."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def stamp() -> dict[str, str]:
    """What a record needs to be believed, except its device: versions, commit and date."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    for package in ("vllm-oscar", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def scrape(url: str, folder: Path) -> None:
    """Write the counters beside the newest result below ``folder``, then empty the server's caches."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        found = counters(answer.read().decode())
    with urllib.request.urlopen(f"{url}/version", timeout=60) as answer:
        found["vllm"] = json.load(answer)["version"]
    newest = max(folder.rglob("run=*[0-9].json"), key=lambda path: path.stat().st_mtime)
    record = found | {"time": time.time()} | stamp()
    newest.with_suffix(".counters.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in RESETS:
        urllib.request.urlopen(urllib.request.Request(url + path, method="POST"), timeout=60).close()
