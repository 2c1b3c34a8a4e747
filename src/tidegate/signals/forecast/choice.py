"""Sources of forecasts by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.core.load_forecast import SeriesForecast
from tidegate.signals.forecast.arima import Arima, check_arima
from tidegate.signals.forecast.feed import PERIOD_S, STEPS, LoadFeed
from tidegate.signals.forecast.load import SERIES, LoadForecaster, LoadPeriod, load_periods
from tidegate.signals.forecast.series import ENSEMBLE
from tidegate.signals.forecast.simple import Ewma, LastValue, OracleSeries, SeasonalNaive
from tidegate.signals.forecast.source import SeriesSource
from tidegate.workloads.trace import Workload

FITTING_NOTHING = ("last", "seasonal-naive", "ewma")
NAMES = (*FITTING_NOTHING, "arima")
"""From the simplest one on."""
SIMULATED = (*NAMES, ENSEMBLE, "oracle")
"""What a simulation may ask for."""
DAY_S = 86400.0
"""The season of loads."""


def check_source(name: str) -> None:
    """Raise ConfigError unless a simulation may ask for the source, and its library is installed."""
    if name not in SIMULATED:
        raise ConfigError(f"no source of forecasts is called {name!r}; there are: {', '.join(SIMULATED)}")
    if name == "arima":
        check_arima()


def simulated_feed(name: str, workload: Workload, period_s: float) -> LoadFeed:
    """Return the feed of a simulation, which fits as it goes; the ensemble is of sources that fit nothing.

    ``oracle`` knows the workload by arrival, and its mean prompt as the bound of long ones.
    """
    season = round(DAY_S / period_s)
    names = NAMES if name == "arima" else FITTING_NOTHING
    truth = np.empty((0, len(SERIES)))
    if name == "oracle":
        long_tokens = float(workload.input_tokens.mean()) if len(workload) else 0.0
        truth = np.array(load_periods(workload, period_s, long_tokens)).reshape(-1, len(SERIES))

    def sources(series: int) -> Sequence[SeriesSource]:
        known = series_sources(names, season=season, series=series)
        return [*known, OracleSeries(truth[:, series])] if name == "oracle" else known

    return _feed(LoadForecaster(sources, STEPS, name), period_s)


def deployed_feed(*, needed: bool) -> LoadFeed | None:
    """Return the feed of a gateway, where its system needs one: the ensemble of the sources that fit nothing,
    which takes a millisecond in its event loop once per period."""
    return _feed(gateway_forecaster(fitting=False), PERIOD_S) if needed else None


def gateway_forecaster(*, fitting: bool) -> LoadForecaster:
    """Return the ensemble that a gateway asks: of the sources that fit nothing, or of all."""
    season, names = round(DAY_S / PERIOD_S), NAMES if fitting else FITTING_NOTHING
    return LoadForecaster(lambda series: series_sources(names, season=season, series=series), STEPS, ENSEMBLE)


def _feed(forecaster: LoadForecaster, period_s: float) -> LoadFeed:
    def push(period: LoadPeriod) -> Mapping[str, SeriesForecast]:
        forecaster.push(period)
        return forecaster.forecast

    return LoadFeed(push, period_s)


def series_sources(names: Collection[str], *, season: int, series: int = 0) -> Sequence[SeriesSource]:
    """Return new sources of one series, those that are asked and those that answer in their place; without
    ``names`` all that fit nothing.

    ``season`` is its length in periods, 0 for none; ``series`` the series' number among several that are
    pushed together. Raises ConfigError for an unknown name, and for arima where its library is missing.
    """
    unknown = sorted(set(names).difference(NAMES, (ENSEMBLE,)))
    if unknown:
        there = ", ".join((*NAMES, ENSEMBLE))
        raise ConfigError(f"no source of forecasts is called {', '.join(unknown)}; there are: {there}")
    if "arima" in names:
        check_arima()
    all_sources = (LastValue(), SeasonalNaive(season), Ewma(), Arima(series))
    wanted = {"last", "ewma", *names} if names else FITTING_NOTHING
    return [source for source in all_sources if source.name in wanted]
