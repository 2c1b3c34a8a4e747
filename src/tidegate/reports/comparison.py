"""What a comparison found: systems on traces, each with its goodput, as plain data and as tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.measure.run_view import RunView
from tidegate.measure.summary import share_of


@dataclass(frozen=True, slots=True)
class RunAt:
    """The attainment of one run of a goodput search."""

    rate_rps: float
    seed: int
    attainment: float


@dataclass(frozen=True, slots=True)
class LevelGoodput:
    """A goodput with its confidence interval over seeds.

    ``chosen`` tells the candidate that reached it (``split 3:5``, ``chunk 2048``), empty where there was no
    choice; ``reason`` says why the goodput is 0, or what else is odd about it.
    """

    level: float
    chosen: str
    goodput_rps: float
    low_rps: float
    high_rps: float
    limit_rps: float | None
    probes: tuple[RunAt, ...]
    reason: str = ""

    @property
    def share_of_limit(self) -> float | None:
        return share_of(self.goodput_rps, self.limit_rps)


@dataclass(frozen=True, slots=True)
class ComparedSystem:
    """One system on one trace, as the candidate that did best at the first level.

    ``others`` are the goodputs of all candidates at that level, where there was a choice. ``at_goodput`` and
    ``at_common`` are summaries of runs at the system's own goodput and at the trace's common rate, ``view``
    is of the latter.
    """

    system: str
    levels: tuple[LevelGoodput, ...]
    others: Mapping[str, float] = field(default_factory=dict)
    at_goodput: Mapping[str, Any] | None = None
    at_common: Mapping[str, Any] | None = None
    view: RunView | None = None

    @property
    def chosen(self) -> str:
        """The candidate that is shown."""
        return self.levels[0].chosen if self.levels else ""

    @property
    def title(self) -> str:
        """The system with its candidate in brackets."""
        return f"{self.system} ({self.chosen})" if self.chosen else self.system


@dataclass(frozen=True, slots=True)
class TraceComparison:
    """All systems on one trace. At ``common_rate_rps`` their runs are shown side by side."""

    trace: str
    title: str
    entries: tuple[ComparedSystem, ...]
    common_rate_rps: float | None
    common_rate_is: str
    limit_binding: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison. ``facts`` are shown as they are: versions, where profiles come from."""

    traces: tuple[TraceComparison, ...]
    levels: tuple[float, ...]
    seeds: int
    instances: int
    slo: str
    profile: str
    version: str
    command: str
    facts: Mapping[str, str]

    @property
    def systems(self) -> list[str]:
        """Every system's name once, in the order given."""
        return list(dict.fromkeys(entry.system for trace in self.traces for entry in trace.entries))

    def to_json(self) -> dict[str, Any]:
        """Return one object: the set-up, and ``runs``, with an object per trace and system as of one run.

        A run is the one at the system's goodput at the first level, or at the common rate where that is 0.
        ``goodputs`` has a row per trace, system and level.
        """
        return {
            "version": self.version,
            "command": self.command,
            "profile": self.profile,
            "instances": self.instances,
            "slo": self.slo,
            "seeds": self.seeds,
            "levels": list(self.levels),
            "facts": dict(self.facts),
            "warnings": [f"{trace.title}: {text}" for trace in self.traces for text in trace.warnings],
            "goodputs": list(self.rows()),
            "runs": [dict(run) for trace in self.traces for entry in trace.entries if (run := _shown(entry))],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a flat row per trace, system and level."""
        for trace in self.traces:
            for entry in trace.entries:
                for found in entry.levels:
                    yield _row(trace, entry, found)


def _shown(entry: ComparedSystem) -> Mapping[str, Any] | None:
    return entry.at_goodput or entry.at_common


def _row(trace: TraceComparison, entry: ComparedSystem, found: LevelGoodput) -> dict[str, Any]:
    common = entry.at_common or {}
    view = entry.view
    return {
        "trace": trace.title,
        "system": entry.system,
        "chosen": found.chosen,
        "level": found.level,
        "goodput_rps": found.goodput_rps,
        "low_rps": found.low_rps,
        "high_rps": found.high_rps,
        "limit_rps": found.limit_rps,
        "share_of_limit": found.share_of_limit,
        "reason": found.reason,
        "common_rate_rps": trace.common_rate_rps,
        "attainment_at_common": common.get("attainment"),
        "ttft_p50_s": (common.get("ttft_s") or {}).get("p50"),
        "ttft_p99_s": (common.get("ttft_s") or {}).get("p99"),
        "tpot_p50_s": (common.get("tpot_s") or {}).get("p50"),
        "tpot_p99_s": (common.get("tpot_s") or {}).get("p99"),
        "missed_ttft_p99_s": view.missed_ttft_p99_s if view else None,
        "missed_tpot_p99_s": view.missed_tpot_p99_s if view else None,
        "flips": common.get("flips"),
        "migrations": common.get("migrations"),
        "preemptions": common.get("preemptions"),
        "kv_transfer_bytes": common.get("kv_transfer_bytes"),
        "instance_hours_per_million_attained": cost_per_million(entry.at_goodput),
    }


def cost_per_million(run: Mapping[str, Any] | None) -> float | None:
    """Return instance-hours per million attained requests of a run; None without any."""
    if not run or not run["attained"]:
        return None
    return float(run["instance_hours"] / run["attained"] * 1e6)


PROBE_COLUMNS = ("trace", "system", "chosen", "rate_rps", "seed", "attainment")
CANDIDATE_COLUMNS = ("trace", "system", "candidate", "goodput_rps")
CDF_COLUMNS = ("trace", "system", "quantity", "quantile", "seconds")
TIMELINE_COLUMNS = (
    "at_s", "rate_rps", "attained", "prefill_instances", "decode_instances", "mixed_instances",
    "prefill_requests", "prefill_queue_s", "decode_requests", "kv_share",
)  # fmt: skip


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a header, also above no rows at all, and ``rows``; None becomes an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_tables(folder: Path, comparison: Comparison) -> list[Path]:
    """Write ``goodput.csv``, ``probes.csv``, ``candidates.csv``, ``cdf.csv`` and ``timeline.csv``; return
    their paths."""
    goodputs = list(comparison.rows())
    tables: dict[str, tuple[Sequence[str], Iterable[Sequence[Any]]]] = {
        "goodput.csv": (list(goodputs[0]) if goodputs else (), (list(row.values()) for row in goodputs)),
        "probes.csv": (PROBE_COLUMNS, _probe_rows(comparison)),
        "candidates.csv": (CANDIDATE_COLUMNS, _candidate_rows(comparison)),
        "cdf.csv": (CDF_COLUMNS, _cdf_rows(comparison)),
        "timeline.csv": (("trace", "system", *TIMELINE_COLUMNS), _timeline_rows(comparison)),
    }
    for name, (columns, rows) in tables.items():
        write_csv(folder / name, columns, rows)
    return [folder / name for name in tables]


def _probe_rows(comparison: Comparison) -> Iterator[Sequence[Any]]:
    for trace, entry in _entries(comparison):
        seen = {(p.rate_rps, p.seed): p.attainment for found in entry.levels for p in found.probes}
        for (rate_rps, seed), attainment in sorted(seen.items()):
            yield trace.title, entry.system, entry.chosen, rate_rps, seed, attainment


def _candidate_rows(comparison: Comparison) -> Iterator[Sequence[Any]]:
    for trace, entry in _entries(comparison):
        for candidate, goodput_rps in entry.others.items():
            yield trace.title, entry.system, candidate, goodput_rps


def _cdf_rows(comparison: Comparison) -> Iterator[Sequence[Any]]:
    for trace, entry in _entries(comparison):
        view = entry.view
        if view is None:
            continue
        for quantity, values in (("ttft_s", view.ttft_quantiles_s), ("tpot_s", view.tpot_quantiles_s)):
            for index, seconds in enumerate(values):
                yield trace.title, entry.system, quantity, index / (len(values) - 1), seconds


def _timeline_rows(comparison: Comparison) -> Iterator[Sequence[Any]]:
    for trace, entry in _entries(comparison):
        if entry.view is None:
            continue
        for values in zip(*(getattr(entry.view, name) for name in TIMELINE_COLUMNS), strict=True):
            yield trace.title, entry.system, *values


def _entries(comparison: Comparison) -> Iterator[tuple[TraceComparison, ComparedSystem]]:
    return ((trace, entry) for trace in comparison.traces for entry in trace.entries)
