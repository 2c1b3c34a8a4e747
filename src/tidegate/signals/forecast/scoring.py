"""How good sources are on a series that is known whole: errors, coverage, and which one to choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.signals.forecast.series import SeriesForecaster
from tidegate.signals.forecast.source import Floats, SeriesSource

CONFIDENT = 2.86
"""Standard errors by which a source must be worse to be passed over for one that is less simple: 5 % of error
over the 24 comparisons that a trace makes, six series with four sources beside ``last`` (Bonferroni)."""


@dataclass(frozen=True, slots=True)
class SourceScore:
    """A source on one series, some steps ahead.

    ``mape`` is the mean of abs(expected - value) / value over the periods of the first and of the second
    half that have a value above 0; ``coverage`` is the share of the second half's values inside of the
    interval, of which 0.8 is asked. ``answered`` is the share of the second half's forecasts that it made
    itself. The curves have one value per period of the series, NaN where there is none.
    """

    source: str
    chosen: bool
    mape: tuple[float, float]
    coverage: float
    answered: float
    mean: Floats
    low: Floats
    high: Floats


def score(
    values: Floats, sources: Sequence[SeriesSource], steps: int, advance: Callable[[float], None]
) -> list[SourceScore]:
    """Push a series through the sources and score each, ``steps`` ahead; ``advance`` hears the share done."""
    forecaster = SeriesForecaster(sources, steps)
    names, count = forecaster.names, len(values)
    curves = {name: np.full((4, count), np.nan) for name in names}
    for at, value in enumerate(values.tolist()):
        forecaster.push(value)
        if at + steps < count:
            for name in names:
                ahead = forecaster.forecast(name)
                itself = float(ahead.source == name)
                curves[name][:, at + steps] = ahead.mean[-1], ahead.low[-1], ahead.high[-1], itself
        advance((at + 1) / count)
    usable = np.isfinite(values) & (values > 0) & np.isfinite(curves[names[0]][0])
    half = np.arange(count) < count // 2
    errors = {name: np.abs(curves[name][0] - values) / np.where(usable, values, 1.0) for name in names}
    chosen = choose({name: errors[name][usable & half] for name in names}, steps)
    second = usable & ~half
    scores = []
    for name in names:
        means, low, high, own = curves[name]
        inside = (low <= values) & (values <= high)
        scores.append(
            SourceScore(
                name,
                name == chosen,
                (_mean(errors[name][usable & half]), _mean(errors[name][second])),
                _mean(inside[second].astype(np.float64)),
                _mean(own[second]),
                means,
                low,
                high,
            )
        )
    return scores


def choose(errors: dict[str, Floats], steps: int) -> str:
    """Return the first source, they come from the simplest on, that is not clearly worse than the best one.

    ``errors`` has those of each, period by period. Clearly: by ``CONFIDENT`` standard errors of the mean
    difference, whose autocorrelation up to ``steps`` - 1 counts (Diebold and Mariano, 1995). A small
    advantage over a few dozen periods is chance as a rule, and would be paid for in the second half.
    """
    best = min(errors, key=lambda name: _mean(errors[name]))
    for name, found in errors.items():
        worse = found - errors[best]
        if name == best or len(worse) < 2 or worse.mean() <= CONFIDENT * _standard_error(worse, steps):
            return name
    return best


def _standard_error(values: Floats, steps: int) -> float:
    centred, count = values - values.mean(), len(values)
    variance = float(np.dot(centred, centred)) / count
    for lag in range(1, min(steps, count)):
        variance += 2.0 * (1.0 - lag / steps) * float(np.dot(centred[lag:], centred[:-lag])) / count
    return math.sqrt(max(variance, 0.0) / count)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan
