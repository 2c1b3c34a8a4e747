"""The sources that fit nothing: the last value, a smoothed one, the one a season ago, and the truth."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from tidegate.signals.forecast.source import Expected, Floats, SeriesSource, filled

UNKNOWN = "nothing is known yet"
WEIGHTS = (0.2, 0.4, 0.7, 1.0)
"""Of the newest value, in the levels of ``Ewma`` (ours)."""
SMOOTHED = 200
"""Known values that ``Ewma`` looks back over (ours): what is older has no weight left."""


class LastValue(SeriesSource):
    """Expects what was last known: what the released DOPD planner does without enough history."""

    name = "last"
    instead = ""

    def expected(self, history: Floats, steps: int) -> Expected:
        """See ``SeriesSource.expected``."""
        known = history[np.isfinite(history)]
        return np.full(steps, known[-1]) if len(known) else UNKNOWN


class Ewma(SeriesSource):
    """Expects an exponentially weighted mean of what is known; gaps take no part.

    Of four weights it takes the one whose level was nearest to the value after it, by the same weighting.
    """

    name = "ewma"
    instead = "last"

    def expected(self, history: Floats, steps: int) -> Expected:
        """See ``SeriesSource.expected``."""
        known = history[np.isfinite(history)][-SMOOTHED:]
        if not len(known):
            return UNKNOWN
        levels = [_level(known, weight) for weight in WEIGHTS]
        errors = [np.abs(known[1:] - level[:-1]) for level in levels]
        recent = 0.95 ** np.arange(len(known) - 2, -1, -1.0)
        best = min(range(len(WEIGHTS)), key=lambda at: float(recent @ errors[at]))
        return np.full(steps, levels[best][-1])


class SeasonalNaive(SeriesSource):
    """Expects what was one season ago, ``season`` periods; a gap there counts as bridged."""

    name = "seasonal-naive"
    instead = "last"

    def __init__(self, season: int) -> None:
        self._season = season

    def expected(self, history: Floats, steps: int) -> Expected:
        """See ``SeriesSource.expected``."""
        season, count = self._season, len(history)
        if season < 1 or count < season:
            return "there is no season of history yet" if season > 0 else "no season is set"
        if not np.isfinite(history[-season:]).any():
            return "nothing is known of the last season"
        return filled(history)[count - season + np.arange(steps) % season]


class OracleSeries(SeriesSource):
    """Expects what will be: ``truth`` has all periods of a simulation. Behind its end it repeats the last."""

    name = "oracle"
    instead = "last"

    def __init__(self, truth: Floats) -> None:
        self._truth = truth
        self._periods = 0

    def expected(self, history: Floats, steps: int) -> Expected:
        """See ``SeriesSource.expected``."""
        self._periods += 1
        if not np.isfinite(self._truth).any():
            return UNKNOWN
        at = np.minimum(self._periods + np.arange(steps), len(self._truth) - 1)
        return filled(self._truth)[at]


def _level(values: Floats, weight: float) -> Floats:
    return np.array(list(accumulate(values.tolist(), lambda level, value: level + weight * (value - level))))
