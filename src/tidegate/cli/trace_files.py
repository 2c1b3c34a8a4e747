"""Traces as the verbs of ``tidegate trace`` read and write them: nothing is lost in silence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from tidegate.bound.phase_load import PhaseLoad
from tidegate.cli.durations import duration
from tidegate.cli.options import Flag
from tidegate.cli.terminal import warn
from tidegate.core.errors import ConfigError
from tidegate.workloads.readers import open_trace
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_statistics import Spread, Statistics
from tidegate.workloads.writers import WriteFormat, format_of, lost_in, write_trace


@dataclass(frozen=True, slots=True)
class Described:
    """A trace with its statistics and, on a profile, its load by phase; ``timed`` says whether it has arrival
    times across sessions."""

    name: str
    workload: Workload
    timed: bool
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


def load(source: str, columns: str = "") -> tuple[bool, Workload]:
    """Read a trace whole, and whether it is timed; raises TraceError, and ConfigError when it is empty."""
    with shown(f"reading {source}"):
        timed, workload = open_trace(source, columns)
    if not workload:
        raise ConfigError(f"{source}: the trace holds no requests")
    return timed, workload


def load_timed(source: str, columns: str = "") -> Workload:
    """Read a trace that has arrival times; raises ConfigError saying how to make them otherwise."""
    timed, workload = load(source, columns)
    if not timed:
        raise ConfigError(
            f"{source} has no arrival times; make them first: tidegate trace make OUT --base {source} "
            "--sessions-per-s X (or --poisson RPS for bare lengths)"
        )
    return workload


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Show on stderr what takes its time, where that is a terminal."""
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


def show_traces(described: Sequence[Described]) -> None:
    """Print each trace as a block of lines."""
    console = Console()
    for number, one in enumerate(described):
        if number:
            console.print()
        table = Table.grid(padding=(0, 2))
        for label, text in _trace_lines(one):
            table.add_row(label, text)
        console.print(one.name, style="bold", highlight=False, soft_wrap=True)
        console.print(table, highlight=False)


def _trace_lines(one: Described) -> list[tuple[str, str]]:
    s = one.statistics
    lines = [("requests", f"{s.requests:,}")]
    if s.arrivals is None:
        lines.append(("arrivals", "none in the file: choose a process with trace make"))
    else:
        a = s.arrivals
        busiest = f"{a.busiest_minute_rps:.3g}/s ({a.peak_to_mean:.2f}x)"
        lines += [
            ("duration", duration(a.duration_s)),
            ("rate", f"{a.rate_rps:.3g}/s, busiest minute {busiest}"),
            ("burstiness", f"CV {_number(a.cv)} of gaps, IDC60 {_number(a.idc60)} (Poisson: 1, 1)"),
        ]
    lines += [
        ("input tokens", _spread(s.input_tokens)),
        ("output tokens", _spread(s.output_tokens)),
        ("input:output", _ratio(s)),
    ]
    if s.sessions is not None:
        agents = f", {s.sessions.agents} agents" if s.sessions.agents != s.sessions.count else ""
        lines.append(("sessions", f"{s.sessions.count:,}{agents}; rounds {_spread(s.sessions.rounds)}"))
        think = s.sessions.think_s
        lines.append(("think time", "not in the file" if think is None else f"{_spread(think)} s"))
    if s.reuse is not None:
        lines.append(("prefix reuse", f"{s.reuse.tokens:.1%} of prompt tokens, unbounded cache"))
    if one.load:
        lines.append(("estimated load", f"{one.profile}\n{_load(one.load)}"))
    return lines


def _ratio(s: Statistics) -> str:
    if s.ratio_range is None:
        return f"{s.ratio:.3g}"
    minutes = s.windows[0].length_s / 60 if len(s.windows) > 1 else 0
    by = f"by {minutes:g} min" if minutes else "in one window"
    return f"{s.ratio:.3g}, {by} {s.ratio_range[0]:.3g} to {s.ratio_range[1]:.3g}"


def _load(load: Sequence[PhaseLoad]) -> str:
    whole = [w for w in load if w.decode is not None]
    if len(whole) < len(load):
        return f"in {len(load) - len(whole)} of {len(load)} windows no batch keeps the TPOT: relax --slo"
    prefill = [w.prefill for w in load]
    decode = [w.decode or 0.0 for w in load]
    shares = [w.prefill_share for w in load if w.prefill_share is not None]
    mean_prefill, mean_decode = sum(prefill) / len(load), sum(decode) / len(load)
    return (
        f"prefill {mean_prefill:.3g} instances, peak {max(prefill):.3g}\n"
        f"decode {mean_decode:.3g} instances, peak {max(decode):.3g}\n"
        f"P:D {_pair(mean_prefill / ((mean_prefill + mean_decode) or 1.0))} on average, "
        f"{_pair(min(shares, default=0.0))} to {_pair(max(shares, default=0.0))} over time"
    )


def _pair(share: float) -> str:
    return f"{100 * share:.0f}:{100 * (1 - share):.0f}"


def _spread(s: Spread) -> str:
    mean = f"{s.mean:.0f}" if s.mean >= 1000 else f"{s.mean:.4g}"
    return f"mean {mean}  p50 {s.p50:g}  p90 {s.p90:g}  p99 {s.p99:g}  max {s.max:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
