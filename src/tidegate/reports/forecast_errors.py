"""How far forecasts of the load were off, and who made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tidegate.journal.schema import ExpectedSeries, ForecastLine


@dataclass(frozen=True, slots=True)
class ForecastErrors:
    """What was expected of one series, a period ahead, beside what came.

    ``periods`` are those in which both are known and something came: ``mape`` is their mean absolute error
    over what came, and ``inside`` the share within the interval of 80 %. ``sources`` counts who answered, and
    ``reasons`` why it was not the one that was asked.
    """

    series: str
    periods: int
    mape: float | None
    inside: float | None
    sources: dict[str, int]
    reasons: dict[str, int]


def forecast_errors(lines: Iterable[ForecastLine]) -> tuple[ForecastErrors, ...]:
    """Return the errors by series, in the order in which they stand in the lines."""
    found: dict[str, list[ExpectedSeries]] = {}
    for line in lines:
        for name, expected in line.series.items():
            found.setdefault(name, []).append(expected)
    return tuple(_errors(name, each) for name, each in found.items())


def forecast_rows(errors: Iterable[ForecastErrors]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table: series, periods, error, share inside, sources, reasons."""
    for each in errors:
        shares = ("-" if share is None else f"{100 * share:.1f} %" for share in (each.mape, each.inside))
        yield each.series, str(each.periods), *shares, _counted(each.sources), _counted(each.reasons)


def _errors(name: str, found: list[ExpectedSeries]) -> ForecastErrors:
    rows = [
        (each.observed, each.mean, each.low, each.high)
        for each in found
        if each.observed and None not in (each.mean, each.low, each.high)
    ]
    mape = inside = None
    if rows:
        observed, mean, low, high = np.array(rows, np.float64).T
        mape = float((np.abs(mean - observed) / observed).mean())
        inside = float(((low <= observed) & (observed <= high)).mean())
    sources = Counter(each.source for each in found if each.source)
    reasons = Counter(each.reason for each in found if each.reason)
    return ForecastErrors(name, len(rows), mape, inside, dict(sources), dict(reasons))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "-"
