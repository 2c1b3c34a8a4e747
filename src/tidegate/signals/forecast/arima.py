"""The source ``arima``: an ARIMA whose order is chosen automatically (Hyndman and Khandakar, 2008).

The fit is statsforecast's (extra ``forecast``), which is imported with the first one. DOPD fits such a model
with pmdarima, whose search takes about fifteen times as long.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.signals.forecast.source import Expected, Floats, SeriesSource, filled

LEAST = 20
"""Known periods before the first fit (ours; the released DOPD planner begins with 5)."""
WINDOW = 120
"""Periods that a fit sees (ours; there 50)."""
REFIT = 0.2
"""The share by which the window grows from one fit to the next, a full one by as many new periods. In
between, the same model is carried on over the newest values."""
ORDERS: dict[str, Any] = {"max_p": 3, "max_q": 2, "nmodels": 20}
"""The most terms, and the most models tried, so that one fit stays far below 0.8 s."""
FLOOR = 0.05
"""Where a window has values below this share of its mean, as much is added before logarithms are taken."""
ABSURD = 10.0
"""A forecast beyond so many times the window's largest value is dropped."""


class Arima(SeriesSource):
    """Fits logarithms of the values; the expectation is taken back with the residuals' mean factor (Duan's
    smearing), so that it is no median.

    A day's season is left to ``seasonal-naive``: a seasonal fit of a hundred periods takes minutes. The first
    fit after ``LEAST`` comes ``delay`` periods later, so that those of several series do not fall together.
    """

    name = "arima"
    instead = "ewma"

    def __init__(self, delay: int = 0) -> None:
        self._delay = delay
        self._model: Any = None
        self._until_fit = 0

    def expected(self, history: Floats, steps: int) -> Expected:
        """See ``SeriesSource.expected``."""
        window = history[-WINDOW:]
        known = int(np.isfinite(window).sum())
        if known < LEAST:
            return f"{known} of {LEAST} periods are known"
        if self._delay:
            self._delay -= 1
            return "its first fit comes later"
        values = filled(window)
        mean, largest = float(values.mean()), float(values.max())
        if np.ptp(values) <= 1e-9 * largest:
            return np.full(steps, values[-1])
        added = FLOOR * mean if values.min() < FLOOR * mean else 0.0
        try:
            expected = self._carried(np.log(values + added), steps) - added
        except Exception as error:  # the library raises what it likes
            self._model = None
            return f"the fit failed: {error}"
        expected = np.maximum(expected, 0.0)
        if not np.isfinite(expected).all() or expected.max() > ABSURD * largest:
            self._model = None
            return "the fit makes no sense"
        return expected

    def _carried(self, logs: Floats, steps: int) -> Floats:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._model is None or self._until_fit <= 0:
                from statsforecast.models import AutoARIMA

                self._model = AutoARIMA(season_length=1, **ORDERS).fit(logs)
                self._until_fit = int(REFIT * len(logs))
            self._until_fit -= 1
            ahead = self._model.forward(logs, steps, fitted=True)
        residuals = logs - np.asarray(ahead["fitted"], np.float64)
        smearing = float(np.mean(np.exp(residuals[np.isfinite(residuals)])))
        expected: Floats = np.exp(np.asarray(ahead["mean"], np.float64)) * smearing
        return expected


def arima_installed() -> bool:
    """Tell whether the library is there."""
    return find_spec("statsforecast") is not None


def check_arima() -> None:
    """Raise ConfigError where the library is not installed."""
    if not arima_installed():
        raise ConfigError("the source arima needs statsforecast: pip install 'tidegate[forecast]'")
