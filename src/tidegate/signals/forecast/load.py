"""The load as series: what a period showed, and forecasts of all that a plan of the fleet needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.core.load_forecast import SeriesForecast
from tidegate.signals.forecast.series import SeriesForecaster
from tidegate.signals.forecast.source import Floats, SeriesSource
from tidegate.workloads.trace import Workload


class LoadPeriod(NamedTuple):
    """What one period showed; NaN where nothing is known.

    ``rate_rps`` counts all that were offered, refused ones too. ``*_squared`` are means of squares: prefill
    is convex, and its mean cost is not the cost of the mean prompt. ``long_share`` is that of the prompts
    above a threshold.
    """

    rate_rps: float
    input_tokens: float
    input_tokens_squared: float
    output_tokens: float
    output_tokens_squared: float
    long_share: float

    @classmethod
    def of(cls, plain: Sequence[float | None]) -> LoadPeriod:
        """Return the period of plain values, None where nothing is known."""
        return cls(*(float("nan") if value is None else value for value in plain))


SERIES = LoadPeriod._fields
UNKNOWN_PERIOD = LoadPeriod(*[float("nan")] * len(SERIES))
WARM_PERIODS = 60
"""How many of the periods of an earlier run go through the sources, the newest ones (ours)."""


class LoadForecaster:
    """Forecasts each series of ``SERIES`` for ``steps`` periods.

    ``sources`` makes the sources of one series from its number. Of the sources ``wanted`` answers, a name or
    ``ensemble``.
    """

    def __init__(
        self, sources: Callable[[int], Sequence[SeriesSource]], steps: int, wanted: str = "ensemble"
    ) -> None:
        self._series = {name: SeriesForecaster(sources(at), steps) for at, name in enumerate(SERIES)}
        self._wanted = wanted
        known = self._series[SERIES[0]].names
        if wanted not in known:
            raise ConfigError(f"no source of forecasts is called {wanted!r}; there are: {', '.join(known)}")

    def push(self, period: LoadPeriod) -> None:
        """Take the period that ended."""
        for name, value in zip(SERIES, period, strict=True):
            self._series[name].push(value)

    def warm(self, periods: Sequence[LoadPeriod]) -> None:
        """Take the periods of an earlier run, oldest first."""
        for name, values in zip(
            SERIES, np.array(periods, np.float64).reshape(-1, len(SERIES)).T, strict=True
        ):
            self._series[name].warm(values, WARM_PERIODS)

    @property
    def forecast(self) -> Mapping[str, SeriesForecast]:
        """What is expected from the period on that began last, by series."""
        return {name: series.forecast(self._wanted) for name, series in self._series.items()}


def load_periods(workload: Workload, period_s: float, long_tokens: float) -> list[LoadPeriod]:
    """Return the whole periods of a trace, or of a journal of an earlier run, by arrival.

    An answer belongs to the period of its request's arrival. A gateway knows it only when it ends.
    """
    count = int(workload.arrival_s[-1] // period_s) if len(workload) else 0
    at = (workload.arrival_s // period_s).astype(np.int64)
    inside = at < count
    at = at[inside]
    inputs = workload.input_tokens[inside].astype(np.float64)
    outputs = np.maximum(workload.output_tokens[inside], 1).astype(np.float64)
    requests = np.bincount(at, minlength=count).astype(np.float64)

    def mean(values: Floats | NDArray[np.bool_]) -> Floats:
        sums = np.bincount(at, weights=values, minlength=count)
        means: Floats = np.divide(sums, requests, out=np.full(count, np.nan), where=requests > 0)
        return means

    columns = (
        requests / period_s,
        mean(inputs),
        mean(inputs * inputs),
        mean(outputs),
        mean(outputs * outputs),
        mean(inputs > long_tokens),
    )
    return [LoadPeriod(*row) for row in np.array(columns).T.tolist()]
