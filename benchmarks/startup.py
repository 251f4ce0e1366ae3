# SPDX-License-Identifier: Apache-2.0
"""How long ``vllm serve`` takes until it answers, with ``oscar`` beside ``auto``; on the CPU, one after the other.

    python benchmarks/startup.py [--model path] [--pairs 3] [--json startup.json]

Seconds on the clock, and of processors, user and system, over all processes of the server until ``/health`` answers.
On a busy machine the latter say more.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

from vllm_oscar.tools.bench import scrape
from vllm_oscar.tools.bench.sweep import script

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo_model"


def processor_seconds(process: psutil.Process) -> float:
    """Of a process, its children, and theirs that have ended."""
    times = process.cpu_times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + sum(map(processor_seconds, process.children()))


def start(model: str, dtype: str) -> dict:
    """One start and end of a server: ``clock`` and ``processors``, seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *script("vllm", "vllm.entrypoints.cli.main"), "serve", model, "--host", "127.0.0.1", "--port", str(port),
        "--kv-cache-dtype", dtype, "--kv-cache-memory-bytes", str(1 << 28), "--max-model-len", "1024",
        "--enforce-eager",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"VLLM_HOST_IP": "127.0.0.1"})
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        sys.exit(log.read().decode(errors="replace")[-2000:])
                    time.sleep(0.1)
            clock = time.monotonic() - begin
            return {"clock": round(clock, 1), "processors": round(processor_seconds(psutil.Process(process.pid)), 1)}
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    import vllm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    starts: dict[str, list[dict]] = {"auto": [], "oscar": []}
    for number in range(arguments.pairs):
        for dtype in ("auto", "oscar") if number % 2 == 0 else ("oscar", "auto"):
            starts[dtype].append(start(arguments.model, dtype))
            print(dtype, starts[dtype][-1], "load", os.getloadavg()[0], flush=True)
    for unit in ("clock", "processors"):
        auto, oscar = (statistics.median(found[unit] for found in starts[dtype]) for dtype in starts)
        print(f"{unit}: auto {auto:.1f} s, oscar {oscar:.1f} s, {oscar - auto:+.1f} s")
    record = {"device": scrape.device(), **scrape.stamp(), "vllm": vllm.__version__}
    record |= {"load": os.getloadavg()[0], "model": Path(arguments.model).name}
    if arguments.json:
        arguments.json.write_text(json.dumps(record | {"starts": starts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
