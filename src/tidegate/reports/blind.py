"""A suite whose subject's constants are chosen without the workload that they are judged on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tidegate.reports.comparison import ComparedSystem, LevelGoodput
from tidegate.reports.suite import SuiteReport, SuiteRow

LEAST_SHARE = 0.01
"""Of the best variant's goodput: what one that serves nothing counts as, so that it is not out for good."""


def left_out(report: SuiteReport, variants: Sequence[str], name: str) -> SuiteReport:
    """Return the suite with ``variants`` of one system as three: NAME:blind, NAME:first and NAME:hindsight.

    On every row NAME:blind is the variant of the highest geometric mean of goodputs, as shares of the best
    variant's, at the first level, over the rows of all other workloads; the order of ``variants`` decides
    between equals. NAME:first is the first of them, NAME:hindsight the one that does best on the row itself,
    which no choice beats. The subject is NAME:blind. A suite of one workload leaves the first to be chosen.
    """
    rows = tuple(_row(report, row, variants, name) for row in report.rows)
    return replace(report, subject=f"{name}:blind", rows=rows)


def _row(report: SuiteReport, row: SuiteRow, variants: Sequence[str], name: str) -> SuiteRow:
    if row.comparison is None:
        return row
    level = report.levels[0]
    entries = {entry.system: entry for entry in row.comparison.entries}
    goodputs = {each: entries[each].levels[0].goodput_rps for each in variants}
    best = max(variants, key=lambda each: goodputs[each])
    others = [other for other in report.rows if other.workload != row.workload]
    told = {"blind": chosen_on(others, variants, level), "first": variants[0], "hindsight": best}
    made = [_named(entries[variant], f"{name}:{kind}", variant) for kind, variant in told.items()]
    kept = [entry for entry in row.comparison.entries if entry.system not in variants]
    return replace(row, comparison=replace(row.comparison, entries=(*made, *kept)))


def chosen_on(rows: Sequence[SuiteRow], variants: Sequence[str], level: float) -> str:
    """Return the variant that does best over ``rows``, the first where they have nothing to say."""

    def score(variant: str) -> float:
        return sum(math.log(max(LEAST_SHARE, share)) for share in _shares(rows, variants, variant, level))

    return max(variants, key=score)


def _shares(rows: Sequence[SuiteRow], variants: Sequence[str], variant: str, level: float) -> list[float]:
    found: list[Mapping[str, LevelGoodput]] = [row.at(level) for row in rows]
    best = [max((row[each].goodput_rps for each in variants if each in row), default=0.0) for row in found]
    return [row[variant].goodput_rps / rps for row, rps in zip(found, best, strict=True) if rps > 0]


def _named(entry: ComparedSystem, system: str, variant: str) -> ComparedSystem:
    short = variant.rpartition(":")[2]
    levels = tuple(
        replace(each, chosen=f"{short}, {each.chosen}" if each.chosen else short) for each in entry.levels
    )
    return replace(entry, system=system, levels=levels)
