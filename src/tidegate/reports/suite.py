"""What a suite found: a comparison per row, and what all of them say together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tidegate.reports.comparison import ComparedSystem, LevelGoodput, TraceComparison, write_rows

AS_GOOD = 0.98
"""Of the best goodput of a row: from here on a system counts as good as the best."""
SUITE_TABLES = ("rows.csv", "summary.csv", "claims.csv")


@dataclass(frozen=True, slots=True)
class ClaimFound:
    """A figure of a paper beside what was measured: ``found`` is the ratio, None where there was none.
    Without ``against`` both are the figure itself."""

    row: str
    says: str
    measure: str
    system: str
    against: str
    paper: float
    found: float | None


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """A finished row; ``comparison`` is None where it could not be run, and ``failed`` says why."""

    name: str
    workload: str
    fleet: str
    world: str
    slo: str
    comparison: TraceComparison | None
    failed: str = ""
    claims: tuple[ClaimFound, ...] = ()

    def at(self, level: float) -> dict[str, LevelGoodput]:
        """Return every system's goodput at a level."""
        entries: Sequence[ComparedSystem] = () if self.comparison is None else self.comparison.entries
        return {e.system: found for e in entries for found in e.levels if found.level == level}

    def best(self, level: float) -> tuple[str, float]:
        """Return the system of the highest goodput and that; no system and 0 where none reaches the level."""
        found = {system: each.goodput_rps for system, each in self.at(level).items()}
        name = max(found, key=lambda system: found[system], default="")
        return (name, found[name]) if name and found[name] > 0 else ("", 0.0)

    def share(self, system: str, level: float) -> float | None:
        """Return a system's goodput over the best; None where it was not run or none has a goodput."""
        found, (_, best_rps) = self.at(level).get(system), self.best(level)
        return None if found is None or best_rps <= 0 else found.goodput_rps / best_rps


@dataclass(frozen=True, slots=True)
class Mean:
    """A geometric mean of ratios over ``rows`` rows; ``left_out`` rows had a goodput of 0 on one side."""

    world: str
    level: float
    against: str
    mean: float | None
    least: float | None
    rows: int
    left_out: int


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """A finished suite, with what it takes to judge and to repeat it.

    ``subject`` is the system that all others are held against; ``missing`` are names of systems that this
    installation lacks.
    """

    suite: str
    subject: str
    missing: tuple[str, ...]
    rows: tuple[SuiteRow, ...]
    levels: tuple[float, ...]
    seeds: int
    tolerance: float
    version: str
    command: str
    facts: Mapping[str, str]

    @property
    def systems(self) -> list[str]:
        """Every system's name once, in the order given."""
        done = [row.comparison for row in self.rows if row.comparison is not None]
        return list(dict.fromkeys(entry.system for each in done for entry in each.entries))

    @property
    def worlds(self) -> list[str]:
        return list(dict.fromkeys(row.world for row in self.rows))

    def ranked(self, level: float) -> list[SuiteRow]:
        """Return the rows in which something has a goodput, the subject's worst first."""
        shares = {row.name: row.share(self.subject, level) for row in self.rows}
        return sorted(
            (row for row in self.rows if shares[row.name] is not None),
            key=lambda row: shares[row.name] or 0.0,
        )

    def losses(self, level: float) -> list[SuiteRow]:
        """Return the rows where the subject is further behind the best than ``AS_GOOD``, worst first."""
        return [row for row in self.ranked(level) if (row.share(self.subject, level) or 0.0) < AS_GOOD]

    def means(self, level: float) -> Iterator[Mean]:
        """Yield the subject's geometric means: against every other system, and its share of the limit."""
        for world in self.worlds:
            rows = [row.at(level) for row in self.rows if row.world == world]
            mine = [row for row in rows if self.subject in row]
            for other in (each for each in self.systems if each != self.subject):
                pairs = [
                    (row[self.subject].goodput_rps, row[other].goodput_rps) for row in mine if other in row
                ]
                yield _mean(world, level, other, pairs)
            limited = [
                (row[self.subject].goodput_rps, row[self.subject].limit_rps or 0.0)
                for row in mine
                if row[self.subject].limit_rps
            ]
            if limited:
                yield _mean(world, level, "the fluid limit", limited)

    def table(self) -> Iterator[dict[str, Any]]:
        """Yield a flat row per experiment, system and level."""
        for row in self.rows:
            for level in self.levels:
                for system, found in row.at(level).items():
                    yield {
                        "row": row.name,
                        "workload": row.workload,
                        "fleet": row.fleet,
                        "world": row.world,
                        "slo": row.slo,
                        "system": system,
                        "chosen": found.chosen,
                        "level": level,
                        "goodput_rps": found.goodput_rps,
                        "low_rps": found.low_rps,
                        "high_rps": found.high_rps,
                        "seeds": found.seeds,
                        "share_of_best": row.share(system, level),
                        "limit_rps": found.limit_rps,
                        "share_of_limit": found.share_of_limit,
                        "reason": found.reason,
                    }

    def to_json(self) -> dict[str, Any]:
        """Return one object: the set-up, ``rows`` as of ``table``, ``means`` and ``claims``."""
        return {
            "suite": self.suite,
            "version": self.version,
            "command": self.command,
            "subject": self.subject,
            "missing": list(self.missing),
            "seeds": self.seeds,
            "levels": list(self.levels),
            "failed": {row.name: row.failed for row in self.rows if row.failed},
            "rows": list(self.table()),
            "means": [_fields(mean) for level in self.levels for mean in self.means(level)],
            "claims": [_fields(claim) for row in self.rows for claim in row.claims],
        }


def _fields(value: Mean | ClaimFound) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def _mean(world: str, level: float, against: str, pairs: Sequence[tuple[float, float]]) -> Mean:
    ratios = [mine / other for mine, other in pairs if mine > 0 and other > 0]
    mean = geometric_mean(ratios) if ratios else None
    left_out = len(pairs) - len(ratios)
    return Mean(world, level, against, mean, min(ratios, default=None), len(ratios), left_out)


def write_suite_tables(folder: Path, report: SuiteReport) -> None:
    """Write the files of ``SUITE_TABLES``."""
    shown = report.to_json()
    for name, found in zip(SUITE_TABLES, (shown["rows"], shown["means"], shown["claims"]), strict=True):
        write_rows(folder / name, found)
