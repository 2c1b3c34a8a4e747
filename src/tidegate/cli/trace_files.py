"""Traces as the verbs of ``tidegate trace`` read and write them: nothing is lost in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from tidegate.core.errors import ConfigError
from tidegate.workloads.readers import open_trace
from tidegate.workloads.trace import Workload
from tidegate.workloads.writers import WriteFormat, format_of, lost_in, write_trace


@dataclass(frozen=True, slots=True)
class Loaded:
    """A whole trace; ``timed`` says whether it has arrival times across sessions."""

    name: str
    timed: bool
    workload: Workload


def load(source: str) -> Loaded:
    """Read a trace whole; raises TraceError, and ConfigError when it holds nothing."""
    with shown(f"reading {source}"):
        loaded = Loaded(source, *open_trace(source))
    if not loaded.workload:
        raise ConfigError(f"{source}: the trace holds no requests")
    return loaded


def load_timed(source: str) -> Workload:
    """Read a trace that has arrival times; raises ConfigError saying how to make them otherwise."""
    loaded = load(source)
    if not loaded.timed:
        raise ConfigError(
            f"{source} has no arrival times; make them first: tidegate trace make OUT --base {source} "
            "--sessions-per-s X (or --poisson RPS for bare lengths)"
        )
    return loaded.workload


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Say on stderr what takes its time, where that is a terminal."""
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else nullcontext():
        yield


def save(path: Path, workload: Workload, form: WriteFormat | None, *, force: bool, lossy: bool) -> None:
    """Write a trace; what the format cannot hold is an error, or with ``lossy`` a warning on stderr."""
    chosen = form or format_of(path)
    lost = lost_in(chosen, workload)
    if lost and not lossy:
        raise ConfigError(
            f"{path}: the {chosen} format cannot hold {', '.join(lost)}; write .jsonl or .csv, "
            "or add --lossy to leave that out"
        )
    if lost:
        warn(f"{path}: left out {', '.join(lost)}, which the {chosen} format cannot hold")
    if chosen is WriteFormat.AZURE and workload and workload.arrival_s[0] > 0:
        warn(f"{path}: readers count from the first request, {workload.arrival_s[0]:g} s into this trace")
    with shown(f"writing {path}"):
        write_trace(path, workload, chosen, force=force)


def warn(text: str) -> None:
    """Tell the user of something that they may not expect."""
    typer.echo(f"warning: {text}", err=True)
