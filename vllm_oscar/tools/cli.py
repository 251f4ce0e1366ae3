# SPDX-License-Identifier: Apache-2.0
"""``vllm-oscar``: plan a deployment, examine an installation, check the kernels, compare KV caches."""

from __future__ import annotations

import subprocess
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_oscar.core.config import MEASURED_LOSS
from vllm_oscar.tools.bench.cli import app as bench
from vllm_oscar.tools.failure import fail

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
console = Console()


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Model folder, or its config.json. Nothing is loaded.")],
    memory: Annotated[str, typer.Option(help="Memory for the KV cache, per rank, e.g. 24GiB.")] = "24GiB",
    context: Annotated[int, typer.Option(min=1, help="Tokens per request (--max-model-len).")] = 32768,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)] = 1,
    speculative_tokens: Annotated[int, typer.Option(min=0, help="num_speculative_tokens, if any.")] = 0,
    draft_layers: Annotated[int, typer.Option(min=0, help="Attention layers of a drafter: 1 of EAGLE or MTP.")] = 0,
    batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", min=1, help="Of a step; matters with sliding windows.")
    ] = 8192,
    prefix_caching: Annotated[bool, typer.Option(help="Matters with state-space layers.")] = True,
    skip_layers: Annotated[
        str | None, typer.Option(help="--kv-cache-dtype-skip-layers: 0,1,34,35, say, or sliding_window.")
    ] = None,
) -> None:
    """Tokens and concurrent requests that a memory budget holds, per KV-cache dtype."""
    from vllm_oscar.tools import plan as planner

    try:
        shape = planner.ModelShape.load(model, tensor_parallel)
        skipped = planner.Skipped.parse(skip_layers, shape) if skip_layers else None
        load = planner.Load(context, batched_tokens, speculative_tokens, prefix_caching)
        rows = planner.plan(shape.with_drafter(draft_layers), planner.parse_bytes(memory), load, skipped)
    except ValueError as error:
        fail(str(error))
    base = rows[0]
    layers = f"{shape.layers} layers" + (f" ({len(shape.windows)} with a sliding window)" if shape.windows else "")
    layers += f" and {shape.states.layers} with a state" if shape.states else ""
    layers += f" and {draft_layers} of a drafter" if draft_layers else ""
    title = (
        f"{escape(memory)} for the KV cache, {context:,} tokens per request; "
        f"{layers}, {shape.kv_heads} KV heads per rank, head_dim {shape.head_dim}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("dtype", no_wrap=True)
    for header in ("bits", "block", "tail", "tokens", "requests", "vs auto", "loss"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bits:.2f}",
            f"{row.block_tokens:,}",
            str(row.tail_blocks) if row.tail_blocks else "-",
            f"{row.tokens:,}",
            f"{row.requests:,.1f}",
            f"{row.tokens / base.tokens:.2f}x" if base.tokens else "-",
            _loss(row.name),
        )
    console.print(table)
    console.print(
        "Block: its tokens, of a group of layers; tail: blocks in each group that hold a request's newest tokens. "
        "Tokens and requests are what vLLM logs at start-up. Loss: divergence from exact attention against "
        "oscar_paper's, on SmolLM2-135M at 2k and 8k tokens (docs/fidelity.md)."
    )
    if rows[-1].name not in MEASURED_LOSS:
        console.print(f"[yellow]OScaR does not support head_dim {shape.head_dim}.[/]")
    if base.requests < 1:
        console.print(f"[yellow]auto cannot hold one request of {context:,} tokens in {memory}.[/]")


def _loss(dtype: str) -> str:
    low, high = MEASURED_LOSS.get(dtype, (None, None))
    return "-" if low is None else f"{low:.2f}-{high:.2f}" if low < high else f"{low:.2g}"


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended, after naming it.")] = False,
) -> None:
    """Which vLLM, device and kernels are here, what is patched, and everything that is wrong."""
    from vllm_oscar.tools import doctor as diagnosis

    findings = diagnosis.examine()
    table = Table(show_header=False, box=None, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[bold red]error[/]"}
    for finding in findings:
        table.add_row(marks[finding.level], finding.subject, escape(finding.detail))
    console.print(table)
    repairs = [finding.repair for finding in findings if finding.repair]
    if repairs:
        console.print(f"\n[bold]vllm-oscar doctor --fix[/] will{':' if fix else ', if you run it:'}")
        for repair in repairs:
            console.print(f"- {escape(repair.plan)}", highlight=False)
    if repairs and fix:
        for repair in repairs:
            try:
                repair.run()
            except (OSError, subprocess.CalledProcessError) as error:
                console.print(f"[bold red]failed:[/] {escape(f'{repair.plan}: {error}')}", highlight=False)
        console.print("\nAfter that:")
        console.file.flush()  # before the other process writes
        raise typer.Exit(diagnosis.examine_again())
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def features(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the README has it.")] = False,
) -> None:
    """What of vLLM works with an OScaR KV cache, on the CPU and on GPUs, and what is refused."""
    from vllm_oscar.engine import support

    if markdown:
        typer.echo(support.markdown())
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in ("", "feature", "CPU", "GPU", "note"):
        table.add_column(header)
    colors = {support.REFUSED: "red", support.UNRUN: "yellow", support.ABSENT: "dim"}
    kind = ""
    for feature in support.FEATURES:
        devices = (f"[{colors.get(word, 'green')}]{word}[/]" for word in (feature.cpu, feature.gpu))
        heading, kind = feature.kind if feature.kind != kind else "", feature.kind
        table.add_row(heading, escape(feature.name.replace("`", "")), *devices, escape(feature.note.replace("`", "")))
    console.print(table)
    console.print(
        "tested: a test of the project runs it. tried: run by hand on such a device. unrun: nobody ran it. "
        "refused: at start-up, in one sentence that says what to change."
    )


@app.command()
def verify(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
) -> None:
    """Compare this machine's kernels with the reference on random inputs, for every preset."""
    from vllm_oscar.tools import verify as verification

    table = Table(title=f"worst error relative to the reference, device {device}", title_justify="left")
    for header in ("kernels", "preset", "head_dim", "store", "attention", "sliding window", ""):
        table.add_column(header)
    failed = False
    try:
        for result in verification.verify(device, seed):
            failed |= not result.passed
            table.add_row(
                result.kernels,
                result.preset,
                str(result.head_dim),
                f"{result.store_error:.1e}",
                f"{result.attention_error:.1e}",
                f"{result.window_error:.1e}",
                "[green]ok[/]" if result.passed else "[bold red]wrong[/]",
            )
    except (RuntimeError, ValueError) as error:
        fail(str(error))
    console.print(table)
    if failed:
        fail("a kernel disagrees with the reference; please report this with the output of `vllm-oscar doctor`")


if __name__ == "__main__":
    app()
