"""What a comparison found: systems on traces, each with its goodput, as plain data and as tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.measure.attainment import class_title
from tidegate.measure.run_view import RunView
from tidegate.measure.summary import share_of

SET_UP = ("version", "command", "profile", "instances", "slo", "seeds")
TABLES = ("goodput.csv", "probes.csv", "candidates.csv", "cdf.csv", "timeline.csv")
TIMELINE_COLUMNS = (
    "at_s", "rate_rps", "attained", "prefill_instances", "decode_instances", "mixed_instances",
    "prefill_requests", "prefill_queue_s", "decode_requests", "kv_share",
)  # fmt: skip


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
    choice; ``reason`` says why the goodput is 0, or what else is odd about it. ``by_seed`` are the goodputs
    of the single seeds, in their order; of one alone the interval says nothing. Of a candidate that misses
    where another attains only that rate is known: ``below_rps``, and the goodput is 0. ``achievable_rps`` is
    what a clairvoyant search attains, the mean of the seeds; None where none was asked for.
    """

    level: float
    chosen: str
    goodput_rps: float
    low_rps: float
    high_rps: float
    limit_rps: float | None
    probes: tuple[RunAt, ...]
    reason: str = ""
    by_seed: tuple[float, ...] = ()
    below_rps: float | None = None
    achievable_rps: float | None = None

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def shown_rps(self) -> float:
        """The goodput of the first seed, whose run attained the level there; at the mean it may not."""
        return self.by_seed[0] if self.by_seed else self.goodput_rps

    @property
    def share_of_limit(self) -> float | None:
        return share_of(self.goodput_rps, self.limit_rps)

    @property
    def share_of_achievable(self) -> float | None:
        return share_of(self.goodput_rps, self.achievable_rps)


@dataclass(frozen=True, slots=True)
class ComparedSystem:
    """One system on one trace, as the candidate that did best at the first level.

    ``others`` are what is known of all candidates at that level. ``at_goodput`` and ``at_common`` are the
    summaries of the first seed's runs at its goodput and at the trace's common rate, ``view`` shows the
    latter.
    """

    system: str
    levels: tuple[LevelGoodput, ...]
    others: Mapping[str, LevelGoodput] = field(default_factory=dict)
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
    """All systems on one trace, whose own rate is ``own_rate_rps``.

    At ``common_rate_rps`` their runs are shown side by side. ``achieved_by`` says how the achievable rates
    were reached.
    """

    trace: str
    title: str
    entries: tuple[ComparedSystem, ...]
    common_rate_rps: float | None
    common_rate_is: str
    limit_binding: str
    warnings: tuple[str, ...] = ()
    own_rate_rps: float | None = None
    achieved_by: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison. ``facts`` are shown as they are: versions, where profiles come from.

    ``tolerance`` is the relative width at which its searches ended. Of a fleet that grows, ``instances`` are
    the most and ``least`` the fewest. ``price_per_h`` is that of an instance, where it was told.
    """

    traces: tuple[TraceComparison, ...]
    levels: tuple[float, ...]
    seeds: int
    instances: int
    slo: str
    profile: str
    version: str
    command: str
    facts: Mapping[str, str]
    tolerance: float = 0.02
    least: int | None = None
    price_per_h: float | None = None

    @property
    def systems(self) -> list[str]:
        """Every system's name once, in the order given."""
        return list(dict.fromkeys(entry.system for _, entry in self.entries))

    def to_json(self) -> dict[str, Any]:
        """Return one object: the set-up, and ``runs``, with an object per trace and system as of one run.

        A run is the one at the system's goodput at the first level, or at the common rate where that is 0.
        ``goodputs`` has a row per trace, system and level.
        """
        return {
            **{name: getattr(self, name) for name in SET_UP},
            "levels": list(self.levels),
            "facts": dict(self.facts),
            "warnings": [f"{trace.title}: {text}" for trace in self.traces for text in trace.warnings],
            "goodputs": list(self.rows()),
            "runs": [dict(run) for _, entry in self.entries if (run := entry.at_goodput or entry.at_common)],
        }

    @property
    def entries(self) -> list[tuple[TraceComparison, ComparedSystem]]:
        """Every system on every trace, with the trace."""
        return [(trace, entry) for trace in self.traces for entry in trace.entries]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a flat row per trace, system and level."""
        for trace, entry in self.entries:
            for found in entry.levels:
                yield _row(trace, entry, found) | self.used(entry)

    def used(self, entry: ComparedSystem) -> dict[str, float | None]:
        """Return what a system's run at the common rate took: instance-hours, and its cost with a price."""
        hours = (entry.at_common or {}).get("instance_hours")
        used: dict[str, float | None] = {"instance_hours_at_common": hours}
        if self.price_per_h is not None:
            used["cost_at_common"] = None if hours is None else hours * self.price_per_h
        return used


def _row(trace: TraceComparison, entry: ComparedSystem, found: LevelGoodput) -> dict[str, Any]:
    common = entry.at_common or {}
    view = entry.view
    latencies = {
        f"{name}_{p}_s": (common.get(f"{name}_s") or {}).get(p)
        for name in ("ttft", "tpot")
        for p in ("p50", "p99")
    }
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
        "achievable_rps": found.achievable_rps,
        "share_of_achievable": found.share_of_achievable,
        "reason": found.reason,
        "common_rate_rps": trace.common_rate_rps,
        "attainment_at_common": common.get("attainment"),
        **latencies,
        "missed_ttft_p99_s": view.missed_ttft_p99_s if view else None,
        "missed_tpot_p99_s": view.missed_tpot_p99_s if view else None,
        **{name: common.get(name) for name in ("flips", "migrations", "preemptions", "kv_transfer_bytes")},
        "instance_hours_per_million_attained": cost_per_million(entry.at_goodput),
    }


def cost_per_million(run: Mapping[str, Any] | None) -> float | None:
    """Return instance-hours per million attained requests of a run; None without any."""
    if not run or not run["attained"]:
        return None
    return float(run["instance_hours"] / run["attained"] * 1e6)


def class_rows(trace: TraceComparison) -> list[list[str]]:
    """Return a table with its head: what each system attained of each SLO class at the common rate.

    Empty where the trace names no class.
    """
    runs = [(entry.title, entry.at_common["classes"]) for entry in trace.entries if entry.at_common]
    titles = {name: class_title(name, each["slo"]) for _, found in runs for name, each in found.items()}
    rate = "" if trace.common_rate_rps is None else f" at {trace.common_rate_rps:.2f} requests/s"
    shares = [
        [title, *(f"{100 * found[name]['attainment']:.1f} %" if name in found else "-" for name in titles)]
        for title, found in runs
    ]
    return [[f"system{rate}", *titles.values()], *shares] if titles else []


def write_tables(folder: Path, comparison: Comparison) -> list[Path]:
    """Write the files of ``TABLES``; return their paths."""
    goodputs = list(comparison.rows())
    probes: list[Sequence[Any]] = []
    candidates: list[Sequence[Any]] = []
    cdf: list[Sequence[Any]] = []
    timeline: list[Sequence[Any]] = []
    for trace, entry in comparison.entries:
        of = (trace.title, entry.system)
        seen = {(p.rate_rps, p.seed): p.attainment for found in entry.levels for p in found.probes}
        probes += [(*of, entry.chosen, *run, attainment) for run, attainment in sorted(seen.items())]
        candidates += [
            (*of, name, found.goodput_rps if found.below_rps is None else None, found.below_rps)
            for name, found in entry.others.items()
        ]
        if entry.view is None:
            continue
        for name in ("ttft", "tpot"):
            values = getattr(entry.view, f"{name}_quantiles_s")
            cdf += [(*of, f"{name}_s", k / (len(values) - 1), seconds) for k, seconds in enumerate(values)]
        series = (getattr(entry.view, name) for name in TIMELINE_COLUMNS)
        timeline += [(*of, *values) for values in zip(*series, strict=True)]
    of_columns = ("trace", "system")
    return [
        write_rows(folder / "goodput.csv", goodputs),
        _write_csv(folder / "probes.csv", (*of_columns, "chosen", "rate_rps", "seed", "attainment"), probes),
        _write_csv(
            folder / "candidates.csv", (*of_columns, "candidate", "goodput_rps", "below_rps"), candidates
        ),
        _write_csv(folder / "cdf.csv", (*of_columns, "quantity", "quantile", "seconds"), cdf),
        _write_csv(folder / "timeline.csv", (*of_columns, *TIMELINE_COLUMNS), timeline),
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows that have the same columns, under their names."""
    return _write_csv(path, list(rows[0]) if rows else (), [row.values() for row in rows])


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Path:
    """Write a header, also above no rows at all, and ``rows``; None becomes an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path
