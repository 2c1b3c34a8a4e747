"""Intervals of time that prove misses: where in a trace more comes in than the fleet can pay for.

A second of the fleet costs one and no step is worth more than its time, so the work of attaining requests
that lies inside an interval is worth at most the interval's length. A prefill lies inside when its request
arrives at the start or later and its TTFT deadline is no later than the end, an answer when its latest end
is no later either. Of a prefill whose time sticks out all but what an instance can do outside lies inside: a
prompt is computed by one instance at a time (the energetic reasoning of cumulative scheduling).
``missed`` counts from multipliers on such inequalities how many requests must miss, whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tidegate.bound.demand import ROUNDING, Demand
from tidegate.core.slo import Slo
from tidegate.costs.forms import Values


@dataclass(frozen=True, slots=True, eq=False)
class Worth:
    """What the prefill and the answer of each request (rows) are worth under each price list (columns).

    ``second`` is what a second of the dearest instance costs under each list.
    """

    prefill: Values
    answer: Values
    second: Values

    def times(self, factor: float) -> Worth:
        """Return all of it ``factor`` times as dear."""
        return Worth(*(factor * each for each in (self.prefill, self.answer, self.second)))


class Interval(NamedTuple):
    """Real time from the arrival of request ``first`` to a deadline of request ``last``.

    That is the latest end of its answer if ``whole``, else of its prefill. What lies inside counts under the
    price list ``prices``. Named by requests, an interval means something at every scale of the trace's time.
    """

    first: int
    last: int
    whole: bool
    prices: int


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Seconds, per request in order of arrival, of a trace that is played at some scale.

    If a request attains, its prefill lies between ``arrival`` and ``prefill_end``, its answer between
    ``arrival`` and ``answer_end``.
    """

    arrival: Values
    prefill_end: Values
    answer_end: Values

    @classmethod
    def of(cls, demand: Demand, scale: float, slo: Slo) -> Spans:
        """Play ``demand`` at ``scale`` times its own speed."""
        arrival = (demand.arrival_s - demand.arrival_s[0]) / scale
        prefill_end = (arrival + slo.ttft_s) * (1.0 + ROUNDING)
        answer_end = prefill_end + slo.tpot_s * demand.decodes * (1.0 + ROUNDING)
        return cls(arrival * (1.0 - ROUNDING), prefill_end, answer_end)

    def end(self, interval: Interval) -> float:
        """Return when ``interval`` ends."""
        return float((self.answer_end if interval.whole else self.prefill_end)[interval.last])

    def length(self, interval: Interval) -> float:
        """Return how long ``interval`` lasts, and so what work inside it may be worth."""
        return self.end(interval) - float(self.arrival[interval.first])

    def inside(self, interval: Interval, worth: Worth) -> tuple[Values, Values]:
        """Return, per request, what its prefill and its answer are worth inside ``interval`` at least."""
        start, end = float(self.arrival[interval.first]), self.end(interval)
        outside = np.maximum(start - self.arrival, 0.0) + np.maximum(self.prefill_end - end, 0.0)
        done_outside = worth.second[interval.prices] * outside * (1.0 + ROUNDING)
        meets = (self.arrival < end) & (self.prefill_end > start)
        left = np.maximum(worth.prefill[:, interval.prices] - done_outside, 0.0)
        answer = np.where(self.answer_end <= end, worth.answer[:, interval.prices], 0.0)
        answer[: interval.first] = 0.0
        return np.where(meets, left, 0.0), answer


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """``multipliers``, none negative, of what ``intervals`` allow."""

    intervals: Sequence[Interval]
    multipliers: Values

    def weighed(self, spans: Spans, worth: Worth) -> tuple[Values, Values]:
        """Return each request's prefill and answer inside the intervals, times their multipliers."""
        prefill, answer = np.zeros(len(spans.arrival)), np.zeros(len(spans.arrival))
        for interval, multiplier in zip(self.intervals, self.multipliers, strict=True):
            inside = spans.inside(interval, worth)
            prefill += multiplier * inside[0]
            answer += multiplier * inside[1]
        return prefill, answer


def missed(spans: Spans, worth: Worth, certificate: Certificate) -> float:
    """Return how many requests miss at least, under any schedule.

    What attains is worth at most the intervals' lengths, weighed alike. Every miss frees what its request is
    worth, and counts one: so of the excess each miss takes away as many ones as it is worth, at most itself.
    """
    prefill, answer = certificate.weighed(spans, worth)
    lengths = np.array([spans.length(interval) for interval in certificate.intervals])
    income = float(lengths @ certificate.multipliers) * (1.0 + ROUNDING)
    return float(np.minimum(prefill + answer, 1.0).sum()) - income
