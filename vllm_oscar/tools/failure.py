# SPDX-License-Identifier: Apache-2.0
"""How a command ends that cannot do what it was asked for."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape


def fail(message: str) -> NoReturn:
    """Print one sentence and exit with status 1."""
    Console().print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    raise typer.Exit(1)
