"""What all verbs share: exit statuses, remarks on stderr, and bars while they work.

Tables and bars are imported where they are drawn: they take longer to import than a short command to run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Container, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer

from tidegate.cli.durations import duration

if TYPE_CHECKING:
    from rich.table import Table

FAILURE = 1
"""The work was done badly: requests failed, a level was missed, an engine broke."""
WRONG_INPUT = 2
"""The user has to correct something first."""
INTERRUPTED = 130
FIRST_LINE_S, LINE_EVERY_S = 2.0, 10.0
"""When a command whose output is piped says first how far it is, and how often from then on."""
LEAST_SHARE = 0.03
"""Of the work: less tells no pace."""
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


def note_cold_start(source: object) -> None:
    """Print that a system that was to begin with the answers in ``source`` begins without any."""
    note(f"--warm-start {source}: no request was answered in it yet, so nothing is known at the start")


def tell_of_traces() -> None:
    """Print what trace files are taken for as they are read."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log = logging.getLogger("tidegate.workloads")
    log.handlers = [Notes()]
    log.setLevel(logging.INFO)


def plain_table(**options: Any) -> Table:
    """Return a table without lines around it."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), **options)


def run_until_interrupted(work: Coroutine[Any, Any, T], kept: str) -> T:
    """Run ``work``. Ctrl-C ends it at once, also in the middle of a call, and then says what is ``kept``, or
    where that is empty nothing."""
    import asyncio
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # With a handler of one's own asyncio does not wait until the running call is over.
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        if kept:
            note(f"interrupted; {kept}")
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class Advance(Protocol):
    """Is told the share of the work that is done, and what is under way. ``fresh`` is the share that was done
    since the start where that is less, as some of it was done before."""

    def __call__(self, share: float, what: str, fresh: float | None = None) -> None: ...


@contextmanager
def share_bar(first: str = "") -> Iterator[Advance]:
    """Give ``advance``, which redraws a bar on stderr, or prints lines there now and then where that is no
    terminal, with what is left at the pace so far."""
    begun_s = time.monotonic()
    if not sys.stderr.isatty():
        next_s = begun_s + FIRST_LINE_S

        def line(share: float, what: str, fresh: float | None = None) -> None:
            nonlocal next_s
            now_s = time.monotonic()
            if now_s >= next_s:
                next_s = now_s + LINE_EVERY_S
                left = _left(share, fresh, now_s - begun_s)
                note(f"{share:.0%} in {now_s - begun_s:.0f} s{left}{what and f'; {what}'}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(first, total=1.0)

        def draw(share: float, what: str, fresh: float | None = None) -> None:
            left = _left(share, fresh, time.monotonic() - begun_s)
            progress.update(task, completed=share, description=f"{left.removeprefix(', ')}  {what}")

        yield draw


def _left(share: float, fresh: float | None, elapsed_s: float) -> str:
    """Say how long the rest takes at the pace so far; "" before that can be told."""
    done = share if fresh is None else fresh
    if done < LEAST_SHARE:
        return ""
    return f", about {duration(elapsed_s * (1.0 - share) / done)} left"
