# SPDX-License-Identifier: Apache-2.0
"""Measured records on disk: one JSON line each, appended, so that a run can go on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

from .methods import Method

FILE = "records.jsonl"


class Records:
    """The records of one results folder.

    A record is ``{"model", "method", "measure", "settings", "definition", "family", "bytes",
    "bits", "values"}``. The first five are its identity: a preset whose numbers change is
    measured again. The last record of an identity counts.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self.all: list[dict] = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    self.all.append(json.loads(line))
                except json.JSONDecodeError:  # the line that an interrupted run was writing
                    continue
        self._known = {self.identity(r) for r in self.all}

    @staticmethod
    def identity(record: dict) -> str:
        return json.dumps([record[k] for k in ("model", "method", "measure", "settings", "definition")], sort_keys=True)

    @staticmethod
    def new(model: str, method: Method | None, head_dim: int, measure: str, settings: dict) -> dict:
        """A record without its values. ``method`` None: exact, or of no method."""
        described = {"method": "exact", "definition": "", "family": "exact", "bytes": 4.0 * head_dim, "bits": 16.0}
        if method is not None:
            described = {
                "method": method.name,
                "definition": method.definition,
                "family": method.family,
                "bytes": method.bytes_per_token(head_dim),
                "bits": round(method.bits(head_dim), 4),
            }
        return {"model": model, "measure": measure, "settings": settings, "head_dim": head_dim} | described

    def __contains__(self, record: dict) -> bool:
        return self.identity(record) in self._known

    def add(self, record: dict, values) -> None:
        record = record | {"values": values}
        with self.path.open("a") as file:
            file.write(json.dumps(_rounded(record)) + "\n")
        self.all.append(record)
        self._known.add(self.identity(record))

    def current(self, measure: str, **wanted) -> list[dict]:
        """The latest record of every model, method and settings of a measure."""
        latest = {}
        for record in self.all:
            if record["measure"] == measure and all(record[k] == v for k, v in wanted.items()):
                latest[json.dumps([record["model"], record["method"], record["settings"]], sort_keys=True)] = record
        return list(latest.values())


def by_settings(records: list[dict]) -> list[list[dict]]:
    """Records of the same settings together, in the order in which they were first measured."""
    parts: dict[str, list[dict]] = {}
    for record in records:
        parts.setdefault(json.dumps(record["settings"], sort_keys=True), []).append(record)
    return list(parts.values())


def _rounded(value):
    """Six significant digits are more than any measurement here has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value
