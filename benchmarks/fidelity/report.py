# SPDX-License-Identifier: Apache-2.0
"""One Markdown table and the plots, from the records alone."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev

from . import plots, quiz
from .methods import MAIN, known
from .records import Records, by_settings


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _pm(values: list[float], digits: int) -> str:
    centre, error = spread(values)
    return f"{centre:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def perplexity_gain(record: dict) -> list[float]:
    """Extra perplexity per document, in percent."""
    return [100 * (math.exp(v["loss"] - v["exact_loss"]) - 1) for v in record["values"]]


def _recalled(record: dict) -> list[float]:
    """Right answers per document, in percent."""
    return [100 * mean(document.values()) for document in record["values"]]


def _order(records: list[dict]) -> list[dict]:
    rank = {name: i for i, name in enumerate(("auto", "exact", *MAIN))}
    return sorted(records, key=lambda r: (rank.get(r["method"], len(rank)), r["method"]))


def _columns(records: Records, model: str, method: str) -> dict[str, str]:
    """What else was measured of a method on a model, as table cells."""
    cells = {}
    for record in records.current("layers", model=model, method=method):
        errors = [v["error"] for document in record["values"] for v in document]
        cells["attention error"] = f"{mean(errors):.3f}"
        cells["attention KL"] = f"{mean([v['kl'] for document in record['values'] for v in document]):.4f}"
    recall: dict[str, list[float]] = {}
    for record in records.current("recall", model=model, method=method):
        recall.setdefault(record["settings"]["task"], []).extend(_recalled(record))
    for task, values in recall.items():
        cells[f"{task} %"] = _pm(values, 1)
    for record in records.current("greedy", model=model, method=method):
        cells["greedy prefix %"] = _pm([100 * v["prefix"] for v in record["values"]], 0)
    return cells


def _table(rows: list[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.get(n, "") for n in names) + " |" for row in rows])


def _text_rows(chosen: list[dict], paper: dict | None) -> list[dict[str, str]]:
    rows = []
    for record in _order(chosen):
        kl = [v["kl"] for v in record["values"]]
        row = {
            "method": record["method"],
            "bytes": f"{record['bytes']:g}",
            "bits": f"{record['bits']:.2f}",
            "smaller": f"{16 / record['bits']:.2f}x",
            "KL": _pm(kl, 4),
            "perplexity": f"{math.exp(mean(v['loss'] for v in record['values'])):.3f}",
            "extra %": _pm(perplexity_gain(record), 2),
            "top-1 %": f"{100 * mean(v['top1'] for v in record['values']):.1f}",
        }
        if paper:
            row["KL / paper"] = f"{mean(kl) / mean(v['kl'] for v in paper['values']):.2f}"
        rows.append(row)
    return rows


def _recall_rows(recall: list[dict]) -> list[dict[str, str]]:
    """One row per method and settings, with the paired difference to ``auto``."""
    rows = []
    for record in recall:
        s = record["settings"]
        auto = next(r for r in recall if r["method"] == "auto" and r["settings"] == s)
        own = _recalled(record)
        rows.append(
            {
                "method": record["method"],
                "task": s["task"],
                "tokens": str(s["length"]),
                "steps": "as served" if s.get("served") else f"chunks of {s['chunk']}",
                "questions": str(sum(len(document) for document in record["values"])),
                "right %": _pm(own, 2),
                "points from auto": _pm([x - y for x, y in zip(own, _recalled(auto), strict=True)], 2),
            }
        )
    return rows


def _greedy_rows(greedy: list[dict]) -> list[dict[str, str]]:
    return [
        {"method": r["method"], "same prefix %": _pm([100 * v["prefix"] for v in r["values"]], 0)}
        for r in _order(greedy)
    ]


def _quiz_rows(quizzes: list[dict]) -> list[dict[str, str]]:
    """One row per method, with the paired difference to ``auto``."""
    auto = sum(next(r for r in quizzes if r["method"] == "auto")["values"], [])
    rows = []
    for record in _order(quizzes):
        own = sum(record["values"], [])
        points, error, lost, won = quiz.difference(own, auto)
        rows.append(
            {
                "method": record["method"],
                "right %": _pm([100 * x for x in own], 1),
                "points from auto": f"{points:.1f} ± {error:.1f}",
                "lost": str(lost),
                "won": str(won),
            }
        )
    return rows


def _generated_tables(records: Records, model: str) -> list[str]:
    """The generated texts and quizzes of a model, those with the same settings together."""
    parts = []
    for greedy in by_settings(records.current("greedy through vLLM", model=model)):
        s = greedy[0]["settings"]
        head = (
            f"{s['texts']} texts: how much of {s['generated']} tokens after {s['prompt']} passes before the first "
            f"that is not `auto`'s. Prefilled in chunks of {s['chunk']}."
        ) + _text_of(s)
        parts.append(f"## {model}: greedy texts through vLLM\n\n{head}\n\n{_table(_greedy_rows(greedy))}")
    for quizzes in by_settings(records.current("quiz through vLLM", model=model)):
        s = quizzes[0]["settings"]
        head = (
            f"Answers: {s['answers']}. "
            f"{s['quizzes'] * s['items']} questions, {s['items']} after each of {s['quizzes']} sets of examples of "
            f"{s['examples']} tokens, all read from quantized pages; chance is {100 / len(quiz.KINDS):.0f} %."
        )
        parts.append(f"## {model}: a quiz through vLLM\n\n{head}\n\n{_table(_quiz_rows(quizzes))}")
    return parts


def _text_of(settings: dict) -> str:
    return f" Text: {settings['text']}." if "text" in settings else ""


def _text_tables(records: Records, model: str, measured: list[dict]) -> list[str]:
    """Sections of the methods, the ablations and the grid, all measured on the same documents."""
    paper = next((r for r in measured if r["method"] == "oscar_paper"), None)
    settings, parts = measured[0]["settings"], []
    head = f"{settings['documents']} documents of {settings['length']} tokens, head_dim {measured[0]['head_dim']}."
    head += _text_of(settings)
    for title, family in (("", None), (": ablations", "ablation"), (": grid", "grid")):
        part = [r for r in measured if (r["family"] == family if family else r["family"] not in ("ablation", "grid"))]
        if not part:
            continue
        rows = _text_rows(part, paper)
        if not family:
            exact = _columns(records, model, "exact")
            loss = mean(v["exact_loss"] for v in part[0]["values"])
            first = {"method": "exact", "bits": "16.00", "perplexity": f"{math.exp(loss):.3f}"}
            rows = [first | exact, *rows]
            order = list(rows[1])
            rows = [row | _columns(records, model, row["method"]) for row in rows]
            rows[0] = {name: rows[0].get(name, "") for name in [*order, *rows[0]]}
        parts.append(f"## {model}{title}\n\n{head}\n\n{_table(rows)}")
    return parts


def markdown(records: Records) -> str:
    parts = ["# Fidelity", "By `python -m benchmarks.fidelity report`; docs/fidelity.md says what the columns mean."]
    for model in dict.fromkeys(r["model"] for r in records.all):
        for measured in by_settings(records.current("text", model=model)):
            parts += _text_tables(records, model, measured)
        for through in by_settings(records.current("text through vLLM", model=model)):
            rows = _text_rows(through, next((r for r in through if r["method"] == "oscar_paper"), None))
            s = through[0]["settings"]
            head = (
                f"{s['documents']} documents of {s['length']} tokens, prefilled in chunks of {s['chunk']}; "
                "the model computes in bf16 and `auto` is the reference."
            ) + _text_of(s)
            parts.append(f"## {model}: through vLLM\n\n{head}\n\n{_table(rows)}")
        recall = _order(records.current("recall through vLLM", model=model))
        if recall:
            head = "Right answers, and the difference to `auto` on the same questions."
            parts.append(f"## {model}: recall through vLLM\n\n{head}\n\n{_table(_recall_rows(recall))}")
        parts += _generated_tables(records, model)
    measured = {r["method"] for r in records.all}
    notes = [f"- {m.name}: {m.note}" for m in known().values() if m.note and m.name in measured]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def write(records: Records, folder: Path) -> list[Path]:
    """Table and plots into ``folder``; returns the files written."""
    if not records.all:
        return []
    table = folder / "table.md"
    table.write_text(markdown(records))
    return [table, *plots.write(records, folder)]
