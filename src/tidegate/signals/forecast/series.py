"""One series through several sources: their errors, intervals made of those, and the ensemble."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.core.load_forecast import SeriesForecast
from tidegate.signals.forecast.source import Floats, SeriesSource

ENSEMBLE = "ensemble"
REMEMBERED = 30.0
"""Periods after which an error has lost two thirds of its weight in the ensemble (ours)."""
SHARPNESS = 4.0
"""The ensemble weighs its members by their mean error to the power of minus this (ours)."""
LEAST_ERROR = 0.01
"""Smaller mean errors count as this."""
ERRORS = 100
"""The newest errors of a source, of which intervals are made (ours)."""
FEWEST = 9
"""Errors below which there is no 0.1 quantile: the interval goes from half the mean to twice the mean."""
FLOOR = 0.05
"""Errors are ratios of value and forecast, both with this share of the mean added: values may be 0."""
LONGEST = 20_000
"""Periods of history that are kept (ours): a week by half minutes."""
LEVEL_PERIODS = 100
"""The newest periods, whose mean that is."""


class SeriesForecaster:
    """Pushes a series through sources. Deterministic: the same values make the same forecasts.

    A source's interval is made of its own errors so many steps ahead: quantiles of the ratio of what came to
    what was expected, over the newest ``ERRORS``. The ensemble is the mean of the sources that answered
    themselves, each weighted by its recent error at that many steps.

    ``sources`` come with all that they name as ``instead``; raises ConfigError where one is missing.
    """

    def __init__(self, sources: Sequence[SeriesSource], steps: int) -> None:
        self._sources = {source.name: source for source in sources}
        for source in sources:
            if source.instead and source.instead not in self._sources:
                raise ConfigError(f"the source {source.name} needs {source.instead} beside it")
        self.names = (*self._sources, ENSEMBLE)
        self.steps = steps
        self._history: list[float] = []
        self._expected: dict[str, deque[Floats]] = {name: deque(maxlen=steps) for name in self.names}
        self._ratios: dict[str, list[deque[float]]] = {
            name: [deque(maxlen=ERRORS) for _ in range(steps)] for name in self.names
        }
        self._loss = {name: np.zeros(steps) for name in self.names}
        self._weight = np.zeros(steps)
        self._floor = 0.0
        self._answers: dict[str, tuple[Floats, str, str]] = {}

    def push(self, value: float) -> None:
        """Take the value of the period that ended; NaN, or what no value can be, says that it is unknown."""
        value = value if 0.0 <= value < float("inf") else float("nan")
        self._history.append(value)
        del self._history[:-LONGEST]
        history = np.array(self._history)
        newest = history[-LEVEL_PERIODS:]
        known = newest[np.isfinite(newest)]
        floor = (FLOOR * float(known.mean()) if len(known) else 0.0) or 1e-9
        if value == value:
            self._note_errors(value, floor)
        said = {name: source.expected(history, self.steps) for name, source in self._sources.items()}
        answers = {name: each for name, each in said.items() if not isinstance(each, str)}
        for name in self._sources:
            answer, reason = name, said[name]
            while answer and answer not in answers:
                answer = self._sources[answer].instead
            if answer:
                self._answers[name] = answers[answer], answer, reason if isinstance(reason, str) else ""
        if answers:
            self._answers[ENSEMBLE] = self._weighed(answers), ENSEMBLE, ""
        for name, (mean, _, _) in self._answers.items():
            self._expected[name].append(mean)
        self._floor = floor

    def forecast(self, name: str) -> SeriesForecast:
        """Return what a source expects from the newest value on."""
        if name not in self._answers:
            nothing = np.full(self.steps, np.nan)
            return SeriesForecast(nothing, nothing, nothing, "")
        mean, source, reason = self._answers[name]
        low, high = self._interval(source, mean, self._floor)
        return SeriesForecast(mean, low, high, source, reason)

    def warm(self, values: Floats, pushed: int) -> None:
        """Take the values of an earlier run; only the newest ``pushed`` of them go through the sources."""
        start = max(0, len(values) - pushed)
        self._history += values[:start].tolist()
        for value in values[start:].tolist():
            self.push(value)

    def _note_errors(self, value: float, floor: float) -> None:
        """Compare the value with what was expected of it one step ahead, two steps, and so on."""
        fading = 1.0 - 1.0 / REMEMBERED
        steps = max(len(expected) for expected in self._expected.values())
        self._weight[:steps] = fading * self._weight[:steps] + 1.0
        for name, expected in self._expected.items():
            for step in range(len(expected)):
                ratio = (value + floor) / (float(expected[-1 - step][step]) + floor)
                self._ratios[name][step].append(ratio)
                loss = 1.0 - min(ratio, 1.0 / ratio)
                self._loss[name][step] = fading * self._loss[name][step] + loss

    def _weighed(self, answers: dict[str, Floats]) -> Floats:
        seen = np.maximum(self._weight, 1.0)
        errors = np.maximum([self._loss[name] / seen for name in answers], LEAST_ERROR)
        weights = errors**-SHARPNESS
        weighed: Floats = (weights * np.array(list(answers.values()))).sum(axis=0) / weights.sum(axis=0)
        return weighed

    def _interval(self, source: str, mean: Floats, floor: float) -> tuple[Floats, Floats]:
        ratios = np.tile((0.5, 2.0), (self.steps, 1))
        for step, found in enumerate(self._ratios[source]):
            if len(found) >= FEWEST:
                ratios[step] = np.quantile(found, (0.1, 0.9), method="weibull")
        bounds = (mean + floor)[:, None] * ratios - floor
        return np.clip(bounds[:, 0], 0.0, mean), np.maximum(bounds[:, 1], mean)
