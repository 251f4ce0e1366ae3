# SPDX-License-Identifier: Apache-2.0
"""The commands: measure, measure through vLLM, and report."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import measures, methods, tasks
from . import report as reporting
from .records import Records

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
transformers.utils.logging.disable_progress_bar()
console = Console(stderr=True)

MEASURES = ("text", "norms", "layers", "recall", "greedy", "heads")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    documents: int = 8
    length: int = 2048
    seeds: int = 8
    recall_lengths: tuple[int, ...] = (1024, 2048, 4096)
    prompt: int = 1024
    generated: int = 512
    texts: int = 8
    text: str = ""  # its name, if it is not the default

    def settings(self, **numbers) -> dict:
        """What a record says about how it was measured."""
        return numbers | ({"text": self.text} if self.text else {})


QUICK = Plan(documents=2, length=1024, seeds=1, recall_lengths=(1024,), prompt=256, generated=64, texts=2)

Models = Annotated[
    list[str], typer.Option("--model", help="Folder of a causal LM (Llama, Qwen3, Mistral layouts). May be repeated.")
]
Out = Annotated[Path, typer.Option(help="Results folder; what it already holds is not measured again.")]
Added = Annotated[Path, typer.Option(help="Results folder; records are added to it.")]
Dtypes = Annotated[str, typer.Option(help="KV-cache dtypes, comma-separated. 'auto' is always measured.")]
ALL_PRESETS = ",".join(methods.PRESETS)
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="Folder with text, or 'manual': the Python reference manual, English prose. "
        "[default: held-out files of the running Python's library]",
    ),
]
Methods = Annotated[
    str, typer.Option(help="'main', 'all' (with ablations), 'grid', 'windows', or names, comma-separated.")
]


def choose(names: str) -> list[methods.Method]:
    """Methods by their names or by the name of a set of them."""
    known = methods.registry()
    chosen: dict[str, methods.Method] = {}
    for name in names.split(","):
        if name == "all":
            chosen |= known
        elif name == "grid":
            chosen |= {m.name: m for m in methods.grid()}
        elif name == "windows":
            chosen |= {m.name: m for m in methods.windows()}
        elif name == "main":
            chosen |= {n: known[n] for n in methods.MAIN}
        elif name in known:
            chosen[name] = known[name]
        else:
            sets = "main, all, grid, windows"
            raise typer.BadParameter(f"unknown method {name!r}; use {sets} or one of: {', '.join(known)}")
    return list(chosen.values())


def named(folders: list[Path] | None) -> str:
    """What records call a text; nothing if it is the default."""
    return ",".join(folder.name for folder in folders or ())


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    )


@app.command()
def run(
    model: Models,
    out: Out = Path("fidelity"),
    method: Methods = "all",
    measure: Annotated[str, typer.Option(help=f"Which measures, comma-separated: {', '.join(MEASURES)}.")] = ",".join(
        MEASURES[:-1]
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Two short documents and one seed: a first look.")] = False,
    documents: Annotated[int | None, typer.Option(help="Documents of text and of layer errors.")] = None,
    length: Annotated[int | None, typer.Option(help="Their tokens.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Recall documents per length and task.")] = None,
    recall_lengths: Annotated[str | None, typer.Option(help="Tokens of recall documents, comma-separated.")] = None,
    text: Texts = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda if there is one]")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 0,
):
    """Measure methods on models, through transformers."""
    wanted = measure.split(",")
    if unknown := set(wanted) - set(MEASURES):
        raise typer.BadParameter(f"unknown measure {', '.join(unknown)}; use {', '.join(MEASURES)}")
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    lengths = tuple(int(n) for n in recall_lengths.split(",")) if recall_lengths else None
    name = named(text)
    changed = {"documents": documents, "length": length, "seeds": seeds, "recall_lengths": lengths, "text": name}
    plan = replace(QUICK if quick else Plan(), **{k: v for k, v in changed.items() if v is not None})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen, records, start = choose(method), Records(out), time.monotonic()
    texts, failed = tasks.read_texts(text), 0
    for path in model:
        lab = measures.Lab.load(path, texts, device)
        fitting = tuple(n for n in plan.recall_lengths if n <= lab.context)
        here = replace(plan, length=min(plan.length, lab.context), recall_lengths=fitting)
        failed += _measure(lab, chosen, wanted, here, records)
    console.print(f"{records.path}: {len(records.all)} records, {time.monotonic() - start:.0f} s")
    reporting.write(records, out)
    if failed:
        raise typer.Exit(1)


def _measure(lab: measures.Lab, chosen: list[methods.Method], wanted: list[str], plan: Plan, records: Records) -> int:
    """All measures of one model that are not recorded yet; returns how many failed."""
    main = [m for m in chosen if m.family not in ("grid", "ablation")]
    jobs = [job for name in wanted for job in _JOBS[name](lab, chosen, main, plan, records)]
    failed = 0
    with progress() as bar:
        task = bar.add_task(lab.name, total=len(jobs))
        for label, job in jobs:
            bar.update(task, description=f"{lab.name}: {label}")
            try:
                job()
            except Exception:  # one method that does not run here must not cost the others
                failed += 1
                console.print_exception(max_frames=4)
            bar.advance(task)
    return failed


def _text_jobs(lab, chosen, main, plan, records):
    settings = plan.settings(documents=plan.documents, length=plan.length) | {"from": measures.TAIL}
    todo = [(m, Records.new(lab.name, m, lab.head_dim, "text", settings)) for m in chosen]
    todo = [(m, record) for m, record in todo if record not in records]
    if not todo:
        return
    documents = lab.tasks.documents(plan.documents, plan.length)
    exact: list[torch.Tensor] = []
    yield "text, exact", lambda: exact.extend(lab.hidden(d[None], None)[0].cpu() for d in documents)
    for m, record in todo:
        yield f"text, {m.name}", lambda m=m, record=record: records.add(
            record, measures.text(lab, m, documents, exact)
        )


def _layer_jobs(lab, chosen, main, plan, records):
    settings = plan.settings(documents=min(plan.documents, 2), length=plan.length) | {"from": measures.TAIL}
    todo = [(m, Records.new(lab.name, m, lab.head_dim, "layers", settings)) for m in chosen if m.family != "grid"]
    todo = [(m, record) for m, record in todo if record not in records]
    if not todo:
        return
    found: dict[str, list] = {m.name: [] for m, _ in todo}

    def one(tokens):
        for name, values in measures.layers(lab, [m for m, _ in todo], tokens).items():
            found[name].append(values)

    for i, tokens in enumerate(lab.tasks.documents(settings["documents"], plan.length)):
        yield f"layers, document {i + 1}", lambda tokens=tokens: one(tokens)
    yield "layers", lambda: [records.add(record, found[m.name]) for m, record in todo]


def _recall_jobs(lab, chosen, main, plan, records):
    for length in plan.recall_lengths:
        for task in tasks.FORMS:
            for m in [None, *main]:
                settings = plan.settings(task=task, length=length, seeds=plan.seeds)
                record = Records.new(lab.name, m, lab.head_dim, "recall", settings)
                if record not in records:
                    label = f"recall, {task} at {length}, {record['method']}"
                    yield label, lambda m=m, record=record, task=task, length=length: records.add(
                        record, measures.recall(lab, m, task, length, plan.seeds)
                    )


def _greedy_jobs(lab, chosen, main, plan, records):
    settings = plan.settings(texts=plan.texts, prompt=plan.prompt, generated=plan.generated)
    todo = [(m, Records.new(lab.name, m, lab.head_dim, "greedy", settings)) for m in main]
    todo = [(m, record) for m, record in todo if record not in records]
    if not todo:
        return
    prompts = lab.tasks.documents(plan.texts, plan.prompt)
    exact: list[torch.Tensor] = []
    yield "greedy, exact", lambda: exact.append(measures.generate(lab, None, prompts, plan.generated))
    for m, record in todo:
        yield f"greedy, {m.name}", lambda m=m, record=record: records.add(
            record, measures.agreement(measures.generate(lab, m, prompts, plan.generated), exact[0])
        )


def _norm_jobs(lab, chosen, main, plan, records):
    record = Records.new(lab.name, None, lab.head_dim, "norms", plan.settings(length=plan.length))
    if record not in records:
        yield "key norms", lambda: records.add(record, measures.norms(lab, lab.tasks.documents(1, plan.length)[0]))


def _head_jobs(lab, chosen, main, plan, records):
    settings = plan.settings(documents=min(plan.documents, 4), length=plan.length) | {"from": measures.TAIL}
    for m in main:
        record = Records.new(lab.name, m, lab.head_dim, "heads", settings)
        if not m.family.startswith("OScaR") or record in records:
            continue
        documents, found = lab.tasks.documents(settings["documents"], plan.length), []
        layers = measures.heads(lab, methods.parts(m), documents)
        for layer in range(lab.model.config.num_hidden_layers):
            yield f"heads of layer {layer}, {m.name}", lambda f=found, i=layers: f.extend(next(i))
        yield f"heads, {m.name}", lambda record=record, found=found: records.add(record, found)


_JOBS = {
    "text": _text_jobs,
    "norms": _norm_jobs,
    "layers": _layer_jobs,
    "recall": _recall_jobs,
    "greedy": _greedy_jobs,
    "heads": _head_jobs,
}


@app.command()
def vllm(
    model: Models,
    out: Added = Path("fidelity"),
    dtype: Dtypes = ALL_PRESETS,
    documents: Annotated[int, typer.Option(help="Documents of text.")] = 4,
    length: Annotated[int, typer.Option(help="Their tokens, and those of recall documents.")] = 1536,
    seeds: Annotated[int, typer.Option(help="Recall documents per task.")] = 4,
    task: Annotated[str, typer.Option(help="Recall tasks, comma-separated.")] = ",".join(tasks.FORMS),
    chunk: Annotated[int, typer.Option(help="Tokens per step: the history of each chunk is read from the cache.")] = 32,
    served: Annotated[
        bool, typer.Option("--served", help="Recall only, by generating with vLLM's own chunks and prefix hits.")
    ] = False,
    text: Texts = None,
):
    """Measure the presets through vLLM itself: divergence, perplexity and recall as users get them."""
    from . import through_vllm

    forms = task.split(",")
    if unknown := set(forms) - set(tasks.FORMS):
        raise typer.BadParameter(f"unknown task {', '.join(unknown)}; use {', '.join(tasks.FORMS)}")
    records = Records(out)
    plan = through_vllm.Plan(documents, length, seeds, chunk, named(text))
    with progress() as bar:
        run = through_vllm.measure_served if served else through_vllm.measure
        run(model, dtype.split(","), forms, plan, tasks.read_texts(text), records, bar)
    reporting.write(records, out)


@app.command()
def generate(
    model: Models,
    out: Added = Path("fidelity"),
    dtype: Dtypes = ALL_PRESETS,
    texts: Annotated[int, typer.Option(help="Greedy continuations.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of text before each.")] = 1024,
    generated: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    quizzes: Annotated[int, typer.Option(help="Quizzes: words to be sorted into kinds.")] = 4,
    items: Annotated[int, typer.Option(help="Questions of a quiz.")] = 50,
    examples: Annotated[int, typer.Option(help="Tokens of its solved examples: whole pages.")] = 1536,
    chunk: Annotated[int, typer.Option(help="Tokens per step: what is older is read from the cache.")] = 128,
    text: Texts = None,
):
    """Generate with the presets through vLLM itself: greedy agreement, and a quiz with right and wrong answers."""
    from . import through_vllm

    records = Records(out)
    plan = through_vllm.Generation(texts, prompt, generated, quizzes, items, examples, chunk, named(text))
    with progress() as bar:
        through_vllm.measure_generation(model, dtype.split(","), plan, tasks.read_texts(text), records, bar)
    reporting.write(records, out)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A results folder.")]):
    """Write the table and the plots again from the records."""
    for path in reporting.write(Records(folder), folder):
        typer.echo(path)
