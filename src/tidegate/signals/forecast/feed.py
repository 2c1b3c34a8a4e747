"""What a control plane owns of FORECAST: the period under way, and who hears of it when it ends."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tidegate.core.load_forecast import LoadForecast, SeriesForecast
from tidegate.signals.forecast.load import UNKNOWN_PERIOD, LoadForecaster, LoadPeriod

PERIOD_S = 30.0
"""Length of a period (ours; DOPD's experiments adjust every 10 to 20 s, its default is 180 s)."""
STEPS = 6
"""Periods ahead (ours): three minutes, four times what a decode instance takes to start."""
REMEMBERED = 512
"""The newest requests whose lengths are kept (ours): enough for the 99th percentile."""
FITTING = "the fit is not done yet"
"""Why simpler sources answer, until ``LoadFeed.revised``."""
Fit = Callable[[int, Sequence[LoadPeriod]], None]
"""Takes the period of a number, or with 0 those of an earlier run."""
Earlier = Mapping[str, Sequence[Sequence[float | None]]]
"""The load of an earlier run as plain values: ``periods``, the oldest first, and ``lengths`` of its newest
requests that were answered, prompt and answer."""


class LoadFeed:
    """Counts a period's load, and makes a forecast at its end.

    Periods end at whole multiples of their length after the start, or with the first call of ``passed``
    behind that; one without a call is a gap. An answer counts in the period in which it ended: its length is
    not known before. ``forecast`` is the newest, None in the first period unless an earlier run is known;
    ``observed`` is the period that ended last. ``fit``, where set, is given every period by number, and
    ``revised`` hears what a slower source makes of it.
    """

    def __init__(self, forecaster: LoadForecaster, period_s: float = PERIOD_S) -> None:
        self.period_s = period_s
        self.forecast: LoadForecast | None = None
        self.observed = UNKNOWN_PERIOD
        self.fit: Fit | None = None
        self._forecaster = forecaster
        self._number = 0
        self._start_s = self._ends_s = math.inf
        self._long_tokens = math.nan
        self._lengths: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._begin()

    def start(self, now: float, earlier: Earlier | None = None) -> None:
        """Begin the first period; forecasts go on from an earlier run, whose last period ends now."""
        self._start_s = now
        self._ends_s = now + self.period_s
        if earlier is not None:
            periods = [LoadPeriod.of(period) for period in earlier["periods"]]
            self._forecaster.warm(periods)
            self._lengths.extend((int(row[0] or 0), int(row[1] or 0)) for row in earlier["lengths"])
            self._expect(now, self._fitting(periods))

    def arrived(self, prompt_tokens: int) -> None:
        """Count a request that is offered."""
        self._requests += 1
        self._input_tokens += prompt_tokens
        self._input_squares += prompt_tokens * prompt_tokens
        self._long += prompt_tokens > self._long_tokens

    def answered(self, prompt_tokens: int, tokens: int) -> None:
        """Count a request that was answered in full."""
        self._lengths.append((prompt_tokens, tokens))
        self._answers += 1
        self._output_tokens += tokens
        self._output_squares += tokens * tokens

    def passed(self, now: float) -> bool:
        """Make a forecast if the period has ended by ``now``; tell whether it has."""
        if now < self._ends_s:
            return False
        span_s = now - self._start_s
        while now >= self._ends_s + self.period_s:
            self._next(UNKNOWN_PERIOD)
            self._ends_s += self.period_s
        self._ends_s += self.period_s
        requests, answers = self._requests or math.nan, self._answers or math.nan
        period = LoadPeriod(
            self._requests / span_s,
            self._input_tokens / requests,
            self._input_squares / requests,
            self._output_tokens / answers,
            self._output_squares / answers,
            self._long / requests if self._long_tokens == self._long_tokens else math.nan,
        )
        self.observed = period
        self._expect(now, self._next(period))
        self._start_s = now
        self._begin()
        return True

    def revised(self, number: int, expected: Mapping[str, Sequence[Any]]) -> bool:
        """Take what a slower source expects from the end of a period on, as plain values.

        Tells whether that is the newest period. Otherwise it comes too late, and the simpler sources' stays.
        With nothing ``expected`` the slower source is gone, and is not asked any more.
        """
        if not expected:
            self.fit = None
            return False
        newest = self.forecast
        if number != self._number or newest is None:
            return False
        revised = {name: SeriesForecast.of(each) for name, each in expected.items()}
        self.forecast = LoadForecast(
            newest.at_s, newest.period_s, newest.long_tokens, **revised, lengths=newest.lengths
        )
        return True

    def _next(self, period: LoadPeriod) -> Mapping[str, SeriesForecast]:
        self._number += 1
        self._forecaster.push(period)
        return self._fitting((period,))

    def _fitting(self, periods: Sequence[LoadPeriod]) -> Mapping[str, SeriesForecast]:
        """Have the slower source take the periods, and return what the others expect meanwhile."""
        expected = self._forecaster.forecast
        if self.fit is None:
            return expected
        self.fit(self._number, periods)
        return {name: each._replace(reason=FITTING) for name, each in expected.items()}

    def _expect(self, now: float, expected: Mapping[str, SeriesForecast]) -> None:
        lengths = np.array(self._lengths, np.float64).reshape(-1, 2)
        self.forecast = LoadForecast(now, self.period_s, self._long_tokens, **expected, lengths=lengths)
        self._long_tokens = float(expected["input_tokens"].mean[0])

    def _begin(self) -> None:
        self._requests = self._input_tokens = self._input_squares = self._long = 0
        self._answers = self._output_tokens = self._output_squares = 0
