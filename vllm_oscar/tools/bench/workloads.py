# SPDX-License-Identifier: Apache-2.0
"""The workloads by name, as arguments of ``vllm bench serve``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

TURNS = 6
TRACE_CHUNK = 16  # tokens for which one hash of a trace stands


def point_name(workload: str, concurrency: int) -> str:
    """What a workload at so many requests in flight is called, in files and logs."""
    return f"{workload}-c{concurrency}"


@dataclass(frozen=True)
class Workload:
    """Requests of one kind. Lengths in tokens.

    Attributes:
        name: what the user calls it.
        about: one line for the report.
        kind: ``random`` (nothing shared), ``prefix`` (all requests share a prefix) or ``turns`` (conversations).
        shared: tokens of the shared prefix (``prefix``), or that each turn adds to the one before (``turns``).
        input: other input tokens of a request; of the first turn (``turns``).
        output: output tokens of a request.
        concurrency: requests in flight that are measured unless the user says otherwise.
    """

    name: str
    about: str
    kind: str
    shared: int
    input: int
    output: int
    concurrency: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its output included."""
        prompt = self.input + (TURNS - 1) * self.shared if self.kind == "turns" else self.shared + self.input
        return prompt + self.output

    def scaled(self, factor: Fraction) -> Workload:
        """The same with all lengths times ``factor``, in multiples of 16 and no shorter than 16."""
        lengths = {
            name: max(16, int(getattr(self, name) * factor) // 16 * 16) if getattr(self, name) else 0
            for name in ("shared", "input", "output")
        }
        return replace(self, **lengths)

    def prompts(self, concurrency: int, rounds: int) -> int:
        """Requests of a run: ``rounds`` for each in flight and at least four, or all turns of as many conversations."""
        return concurrency * TURNS if self.kind == "turns" else max(4, concurrency * rounds)

    def arguments(self, concurrency: int, rounds: int, folder: Path) -> dict[str, object]:
        """Arguments of ``vllm bench serve`` for this many requests in flight."""
        common = {"num_prompts": self.prompts(concurrency, rounds), "max_concurrency": concurrency}
        if self.kind == "random":
            return {"dataset_name": "random", "random_input_len": self.input, "random_output_len": self.output} | common
        if self.kind == "prefix":
            return {
                "dataset_name": "prefix_repetition",
                "prefix_repetition_prefix_len": self.shared,
                "prefix_repetition_suffix_len": self.input,
                "prefix_repetition_num_prefixes": 1,
                "prefix_repetition_output_len": self.output,
            } | common
        return {
            "dataset_name": "timed_trace",
            "dataset_path": str(self.trace_path(concurrency, folder)),
            "timed_trace_chunk_hash_size": TRACE_CHUNK,
            "self_timed": False,
        } | common

    def trace_path(self, concurrency: int, folder: Path) -> Path:
        return folder / f"{point_name(self.name, concurrency)}.jsonl"

    def write_trace(self, concurrency: int, folder: Path) -> None:
        """Write the conversations as a trace, if this workload has any.

        One conversation for each request in flight, a turn of all of them before the next turn: with so many in
        flight, a turn starts when about that of the same conversation before it is answered. What a turn adds stands
        for the answer before it and the new question.
        """
        if self.kind != "turns":
            return
        lines = []
        for turn in range(TURNS):
            length = self.input + turn * self.shared
            for conversation in range(concurrency):
                chunks = [conversation << 20 | index for index in range(-(-length // TRACE_CHUNK))]
                entry = {"timestamp": 0, "input_length": length, "output_length": self.output, "hash_ids": chunks}
                lines.append(json.dumps(entry) + "\n")
        self.trace_path(concurrency, folder).write_text("".join(lines))


K = 1024
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("8k-1k", "8k tokens in, 1k out", "random", 0, 8 * K, K, (1, 4, 16, 64, 256)),
        Workload("1k-2k", "1k in, 2k out: nearly all decoding", "random", 0, K, 2 * K, (1, 4, 16, 64, 256)),
        Workload("32k-1k", "32k in, 1k out", "random", 0, 32 * K, K, (1, 4, 16, 64)),
        Workload("128k-1k", "128k in, 1k out", "random", 0, 128 * K, K, (1, 4, 16)),
        Workload("shared-prefix", "16k that all share and 512 of its own in, 512 out", "prefix", 16 * K, 512, 512,
                 (1, 4, 16, 64, 256)),
        Workload("multi-turn", f"conversations of {TURNS} turns: 2k in, each turn adds 1k, 256 out", "turns", K, 2 * K,
                 256, (1, 4, 16, 64)),
    )
}  # fmt: skip
