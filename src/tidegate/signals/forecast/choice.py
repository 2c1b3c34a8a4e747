"""Sources of forecasts by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.signals.forecast.arima import Arima, arima_installed, check_arima
from tidegate.signals.forecast.feed import PERIOD_S, STEPS, LoadFeed
from tidegate.signals.forecast.load import SERIES, LoadForecaster, load_periods
from tidegate.signals.forecast.series import ENSEMBLE
from tidegate.signals.forecast.simple import Ewma, LastValue, OracleSeries, SeasonalNaive
from tidegate.signals.forecast.source import SeriesSource
from tidegate.workloads.trace import Workload

FITTING_NOTHING = ("last", "seasonal-naive", "ewma")
NAMES = (*FITTING_NOTHING, "arima")
"""From the simplest one on."""
SIMULATED = (*NAMES, ENSEMBLE, "oracle")
"""What a simulation may ask for."""
AUTO = "auto"
"""``ensemble`` where a system needs forecasts, else nobody."""
DEPLOYED = (AUTO, *NAMES, ENSEMBLE)
"""What a gateway may be asked for."""
DAY_S = 86400.0
"""The season of loads."""


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """Who forecasts the load of a gateway, by which periods, and how many of them ahead.

    ``source`` is one of ``DEPLOYED``. Raises ConfigError for what cannot be.
    """

    source: str = AUTO
    period_s: float = PERIOD_S
    steps: int = STEPS

    def __post_init__(self) -> None:
        check_source(self.source, DEPLOYED)
        if not (0 < self.period_s < float("inf") and self.steps >= 1):
            raise ConfigError("forecasts need periods of a positive number of seconds, and one at least")

    @property
    def fitted(self) -> bool:
        """Whether a source that fits takes part where its library is installed."""
        return self.source == "arima" or (self.source in (AUTO, ENSEMBLE) and arima_installed())


def check_source(name: str, among: Sequence[str] = SIMULATED) -> None:
    """Raise ConfigError unless the source is one of ``among``, and its library is installed."""
    if name not in among:
        raise ConfigError(f"no source of forecasts is called {name!r}; there are: {', '.join(among)}")
    if name == "arima":
        check_arima()


def simulated_feed(name: str, workload: Workload, period_s: float, steps: int = STEPS) -> LoadFeed:
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

    return LoadFeed(LoadForecaster(sources, steps, name), period_s)


def deployed_feed(settings: ForecastSettings, *, needed: bool) -> LoadFeed | None:
    """Return the feed of a gateway, where its system needs one or a source is named: of the sources that fit
    nothing, which take a millisecond in its event loop once per period."""
    if settings.source == AUTO and not needed:
        return None
    return LoadFeed(gateway_forecaster(settings, fitting=False), settings.period_s)


def gateway_forecaster(settings: ForecastSettings, *, fitting: bool) -> LoadForecaster:
    """Return what a gateway asks: with ``fitting`` what was chosen, else what stands in for it meanwhile."""
    season, names = round(DAY_S / settings.period_s), NAMES if fitting else FITTING_NOTHING
    wanted = ENSEMBLE if settings.source == AUTO else settings.source
    if wanted == "arima" and not fitting:
        wanted = Arima.instead

    def sources(series: int) -> Sequence[SeriesSource]:
        return series_sources(names, season=season, series=series)

    return LoadForecaster(sources, settings.steps, wanted)


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
