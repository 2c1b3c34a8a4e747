"""Sources of forecasts by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tidegate.core.errors import ConfigError
from tidegate.signals.forecast.arima import Arima, check_arima
from tidegate.signals.forecast.series import ENSEMBLE
from tidegate.signals.forecast.simple import Ewma, LastValue, SeasonalNaive
from tidegate.signals.forecast.source import SeriesSource

FITTING_NOTHING = ("last", "seasonal-naive", "ewma")
NAMES = (*FITTING_NOTHING, "arima")
"""From the simplest one on."""


def series_sources(names: Collection[str], *, season: int, series: int = 0) -> Sequence[SeriesSource]:
    """Return new sources of one series, those that are asked and those that answer in their place.

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
    wanted = {"last", "ewma", *names}
    return [source for source in all_sources if source.name in wanted]
