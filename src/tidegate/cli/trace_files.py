"""Traces as the verbs of ``tidegate trace`` read and write them: nothing is lost in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from tidegate.core.errors import ConfigError
from tidegate.workloads import TraceRecord, WriteFormat, lost_in, open_trace, write_trace
from tidegate.workloads.writers import format_of

REPORT_EVERY = 5000


@dataclass(frozen=True, slots=True)
class Loaded:
    """A whole trace; ``timed`` says whether it has arrival times across sessions."""

    name: str
    timed: bool
    records: list[TraceRecord]


def load(source: str) -> Loaded:
    """Read a trace whole; raises TraceError, and ConfigError when it holds nothing."""
    timed, records = open_trace(source)
    loaded = Loaded(source, timed, list(counted(f"reading {source}", records)))
    if not loaded.records:
        raise ConfigError(f"{source}: the trace holds no requests")
    return loaded


def load_timed(source: str) -> list[TraceRecord]:
    """Read a trace that has arrival times; raises ConfigError saying how to make them otherwise."""
    loaded = load(source)
    if not loaded.timed:
        raise ConfigError(
            f"{source} has no arrival times; make them first: tidegate trace make OUT --base {source} "
            "--sessions-per-s X (or --poisson RPS for bare lengths)"
        )
    return loaded.records


def counted(what: str, records: Iterable[TraceRecord]) -> Iterator[TraceRecord]:
    """Pass records through; on a terminal, show on stderr how many there were so far."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from records
        return
    with console.status(what) as status:
        for number, record in enumerate(records, start=1):
            if number % REPORT_EVERY == 0:
                status.update(f"{what}: {number:,} requests")
            yield record


def save(
    path: Path, records: Sequence[TraceRecord], form: WriteFormat | None, *, force: bool, lossy: bool
) -> None:
    """Write a trace; what the format cannot hold is an error, or with ``lossy`` a warning on stderr."""
    chosen = form or format_of(path)
    lost = lost_in(chosen, records)
    if lost and not lossy:
        raise ConfigError(
            f"{path}: the {chosen} format cannot hold {', '.join(lost)}; write .jsonl or .csv, "
            "or add --lossy to leave that out"
        )
    if lost:
        warn(f"{path}: left out {', '.join(lost)}, which the {chosen} format cannot hold")
    if chosen is WriteFormat.AZURE and records and records[0].arrival_s > 0:
        warn(f"{path}: readers count from the first request, {records[0].arrival_s:g} s into this trace")
    write_trace(path, counted(f"writing {path}", records), chosen, force=force)


def warn(text: str) -> None:
    """Tell the user of something that they may not expect."""
    typer.echo(f"warning: {text}", err=True)
