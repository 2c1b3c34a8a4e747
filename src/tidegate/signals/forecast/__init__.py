"""FORECAST: what the load will be some periods ahead.

A load is six series, one value per period each. Sources say what is expected of a series;
``SeriesForecaster`` pushes values through them, keeps their errors and makes intervals of those.
"""

from tidegate.core.load_forecast import LoadForecast, SeriesForecast
from tidegate.signals.forecast.feed import Earlier, LoadFeed
from tidegate.signals.forecast.load import SERIES, LoadForecaster, LoadPeriod
from tidegate.signals.forecast.series import SeriesForecaster
from tidegate.signals.forecast.source import SeriesSource

__all__ = [
    "SERIES",
    "Earlier",
    "LoadFeed",
    "LoadForecast",
    "LoadForecaster",
    "LoadPeriod",
    "SeriesForecast",
    "SeriesForecaster",
    "SeriesSource",
]
