"""Waiting in the two pools, in closed form: how likely a queue is short enough.

*Prefill* is a queue with one server per instance and first come, first served: GI/G/c. Nothing exact is known
of it, so the mean wait is Allen and Cunneen's: that of M/M/c (Erlang's C) times half the sum of the squared
coefficients of variation of gaps and service times. It is exact for M/M/c and for M/G/1
(Pollaczek-Khinchine), takes the second moment of service times, which mixed lengths raise and equal lengths
lower, and asks for no more of their distribution. A target is missed by the tail, so the tail is needed, too:
given that a request waits, its wait is taken as exponential. That is exact for M/M/c and the limit of every
GI/G/c near saturation.

*Decode* is no such queue: an instance takes everybody at once and slows down. Requests share it evenly, and
its speed depends on their number alone: a generalised processor-sharing queue. With Poisson arrivals the
number of requests has the product form of ``Occupancy``, whatever the distribution of answers' lengths
(Cohen, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
POINTS = 2048
"""Of an occupancy's distribution, about: for larger pools only every so many counts are worked out."""


def erlang_c(load: float, servers: int) -> float:
    """Return the share of arrivals that wait in M/M/c; ``load`` is arrival rate times mean service time."""
    if load >= servers:
        return 1.0
    blocked = 1.0
    for busy in range(1, servers + 1):
        blocked = load * blocked / (busy + load * blocked)
    return servers * blocked / (servers - load * (1.0 - blocked))


@dataclass(frozen=True, slots=True)
class Waits:
    """The wait for one of ``servers``: ``waiting`` is the share that waits at all, ``mean_s`` theirs.

    ``mean_s`` is infinite where more work comes than can be done.
    """

    waiting: float
    mean_s: float

    @classmethod
    def of(cls, rate_rps: float, servers: int, service_s: float, variability: float) -> Waits:
        """Return Allen and Cunneen's waits; ``variability`` is half the sum of the two squared CVs."""
        load = rate_rps * service_s
        if load >= servers:
            return cls(1.0, math.inf)
        return cls(erlang_c(load, servers), variability * service_s / (servers - load))

    def within(self, slack_s: Values) -> Values:
        """Return the probability of a wait of at most ``slack_s``; 0 where that is negative."""
        if math.isinf(self.mean_s):
            return np.zeros_like(slack_s)
        late = self.waiting * np.exp(-np.maximum(slack_s, 0.0) / max(self.mean_s, 1e-12))
        return np.where(slack_s >= 0.0, 1.0 - late, 0.0)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How many requests decode in a pool, as an arriving one sees it.

    ``count[k]`` requests have the cumulative probability ``share[k]``, the arriving one included in the
    count. With n there, a request gets a token every ``gap(n)`` seconds, so they end at a rate of ``n /
    (steps * gap(n))``, and balance gives p(n) = p(n-1) * rate * steps * gap(n) / n.
    """

    count: Values
    share: Values

    @classmethod
    def of(cls, rate_rps: float, steps: float, gap_s: Callable[[Values], Values], most: float) -> Occupancy:
        """Return the distribution up to ``most`` requests; all shares are 0 where more come than end."""
        stride = max(1.0, most / POINTS)
        count = np.arange(0.0, most + stride, stride)
        # The logarithm grows by a sum over the counts in between, here their number times the middle one.
        middle = count[1:] - 0.5 * (stride - 1.0)
        growth = stride * np.log(rate_rps * steps * gap_s(middle) / middle)
        if not growth[-1] < 0.0:
            return cls(count + 1.0, np.zeros_like(count))
        logs = np.concatenate(([0.0], np.cumsum(growth)))
        mass = np.exp(logs - logs.max())
        ratio = math.exp(growth[-1])
        beyond = mass[-1] * ratio / (1.0 - ratio)
        return cls(count + 1.0, np.cumsum(mass) / (mass.sum() + beyond))

    def at_most(self, limit: Values) -> Values:
        """Return the probability that an arriving request makes it at most ``limit``."""
        return np.interp(limit, self.count, self.share, left=0.0)
