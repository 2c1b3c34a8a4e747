"""What verbs write beside their result: remarks, and bars while they work.

Bars are imported where they are drawn: they take longer to import than a short command to run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer


def warn(text: str) -> None:
    """Tell of what is suspicious."""
    typer.echo(f"tidegate: warning: {text}", err=True)


def note(text: str) -> None:
    """Tell of what is good to know."""
    typer.echo(f"tidegate: {text}", err=True)


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int, int | None, str], None]]:
    """Give ``show(done, total, text)``, which redraws a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, total, text: progress.update(task, completed=done, total=total, description=text)


@contextmanager
def share_bar(first: str = "") -> Iterator[Callable[[float, str], None]]:
    """Give ``advance(share, what)``, which redraws a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(first, total=1.0)
        yield lambda share, what: progress.update(task, completed=share, description=what)
