"""What all verbs share: exit statuses, remarks on stderr, and bars while they work.

Tables and bars are imported where they are drawn: they take longer to import than a short command to run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.table import Table

FAILURE = 1
"""The work was done badly: requests failed, a level was missed, an engine broke."""
WRONG_INPUT = 2
"""The user has to correct something first."""
INTERRUPTED = 130
LINE_EVERY_S = 10.0
"""How often a command whose output is piped says how far it is."""
T = TypeVar("T")


def debugging() -> bool:
    """Tell whether TIDEGATE_DEBUG asks for tracebacks and debug logs."""
    return os.environ.get("TIDEGATE_DEBUG", "") not in ("", "0")


def note(text: str) -> None:
    """Print a remark."""
    typer.echo(f"tidegate: {text}", err=True)


def warn(text: str) -> None:
    """Print what is suspicious."""
    note(f"warning: {text}")


def note_classes(all_of: Iterable[str], given: Container[str], slo: object) -> None:
    """Print which SLO classes of a trace have no targets of their own."""
    without = [name for name in all_of if name not in given]
    if without:
        note(f"no --slo-class for {', '.join(without)}: scored by {slo}")


def tell_of_traces() -> None:
    """Print what trace files are taken for as they are read."""
    import logging

    log, handler = logging.getLogger("tidegate.workloads"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("tidegate: %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)


def plain_table(**options: Any) -> Table:
    """Return a table without lines around it."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), **options)


def run_until_interrupted(work: Coroutine[Any, Any, T], kept: str) -> T:
    """Run ``work``. Ctrl-C ends it at once, also in the middle of a call, and then says what is ``kept``."""
    import asyncio
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # With a handler of one's own asyncio does not wait until the running call is over.
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        note(f"interrupted; {kept}")
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class _Lines:
    """Progress for what is no terminal: a line every ``LINE_EVERY_S``."""

    def __init__(self, what: str) -> None:
        self._what, self._begun_s = what, time.monotonic()
        self._told_s = self._begun_s

    def __call__(self, done: int, total: int | None, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s < LINE_EVERY_S:
            return
        self._told_s = now_s
        of = "" if total is None else f" of {total:,}"
        note(f"{done:,}{of} {self._what} in {now_s - self._begun_s:.0f} s{f': {text}' if text else ''}")


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int, int | None, str], None]]:
    """Give ``show(done, total, text)``, which redraws a bar on stderr, or prints lines there now and then."""
    if not sys.stderr.isatty():
        yield _Lines(what)
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
