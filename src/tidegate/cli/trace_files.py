"""Traces as the verbs of ``tidegate trace`` read and write them: nothing is lost in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tidegate.bound.phase_load import PhaseLoad
from tidegate.cli.options import Flag
from tidegate.core.errors import ConfigError
from tidegate.workloads.readers import open_trace
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_statistics import Statistics
from tidegate.workloads.writers import WriteFormat, format_of, lost_in, write_trace


@dataclass(frozen=True, slots=True)
class Loaded:
    """A whole trace; ``timed`` says whether it has arrival times across sessions."""

    name: str
    timed: bool
    workload: Workload


@dataclass(frozen=True, slots=True)
class Described:
    """A trace's name, its statistics and, on a profile, its load by phase."""

    name: str
    statistics: Statistics
    profile: str = ""
    load: tuple[PhaseLoad, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data; null where something does not apply."""
        load = [{**asdict(w), "prefill_share": w.prefill_share} for w in self.load]
        return {
            "trace": self.name,
            **self.statistics.to_json(),
            "profile": self.profile or None,
            "phase_load": load or None,
        }


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


@dataclass(frozen=True, slots=True)
class Saved:
    """How a trace is written."""

    form: Annotated[
        WriteFormat | None,
        Flag("Default by suffix: .jsonl is mooncake, .csv is tidegate's own.", name="--format"),
    ] = None
    lossy: Annotated[bool, Flag("Leave out what the format cannot hold, with a warning.")] = False
    force: Annotated[bool, Flag("Replace OUT.")] = False

    def save(self, path: Path, workload: Workload) -> None:
        """Write a trace; what the format cannot hold is an error, or with ``lossy`` a warning on stderr."""
        chosen = self.form or format_of(path)
        lost = lost_in(chosen, workload)
        if lost and not self.lossy:
            raise ConfigError(
                f"{path}: the {chosen} format cannot hold {', '.join(lost)}; write .jsonl or .csv, "
                "or add --lossy to leave that out"
            )
        if lost:
            warn(f"{path}: left out {', '.join(lost)}, which the {chosen} format cannot hold")
        if chosen is WriteFormat.AZURE and workload and workload.arrival_s[0] > 0:
            warn(f"{path}: readers count from the first request, {workload.arrival_s[0]:g} s into this trace")
        with shown(f"writing {path}"):
            write_trace(path, workload, chosen, force=self.force)


def warn(text: str) -> None:
    """Tell the user of something that they may not expect."""
    typer.echo(f"warning: {text}", err=True)
