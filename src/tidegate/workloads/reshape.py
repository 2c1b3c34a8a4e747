"""More or fewer requests on the same wall clock: thinning, copies and spikes.

Unlike ``scale_rate``, which compresses time, these keep the day's shape. They decide per session (a
request without one is its own): every turn of a session is kept, copied or dropped with its first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.copies import renamed
from tidegate.workloads.trace import Workload

DEFAULT_JITTER_S = 2.0
"""Longest delay of a copy: short beside a minute's rate, long beside the gaps inside a burst."""


@dataclass(frozen=True, slots=True)
class Spike:
    """Rate times ``factor`` in ``[start_s, start_s + duration_s)``, again every ``period_s`` if given.

    A factor below 1 is a dip. Raises ConfigError for values that make no spike.
    """

    factor: float
    start_s: float
    duration_s: float
    period_s: float | None = None

    def __post_init__(self) -> None:
        sizes_ok = 0 <= self.factor < math.inf and 0 <= self.start_s < math.inf and self.duration_s > 0
        if not (sizes_ok and (self.period_s is None or self.duration_s <= self.period_s < math.inf)):
            raise ConfigError(
                "a spike needs FACTOR >= 0, START >= 0, DURATION > 0 and PERIOD >= DURATION, got "
                f"{self.factor}:{self.start_s}:{self.duration_s}:{self.period_s}"
            )

    @classmethod
    def parse(cls, text: str) -> Spike:
        """Read ``FACTOR:START:DURATION[:PERIOD]`` (seconds); raises ConfigError."""
        try:
            factor, start_s, duration_s, *period_s = map(float, text.split(":"))
            (period,) = period_s or (None,)
        except ValueError:
            raise ConfigError(
                f"spike {text!r}: expected FACTOR:START_S:DURATION_S[:PERIOD_S] as in '4:600:60:1800'"
            ) from None
        return cls(factor, start_s, duration_s, period)

    def end_s(self, at_s: float) -> float | None:
        """Return when the spike that is on at ``at_s`` ends, or None outside of one."""
        since_s = at_s - self.start_s
        if since_s < 0:
            return None
        begun_s = since_s if self.period_s is None else since_s % self.period_s
        return at_s + self.duration_s - begun_s if begun_s < self.duration_s else None


def thin(workload: Workload, share: float, *, seed: int) -> Workload:
    """Keep each session with probability ``share``, independently; raises ConfigError outside (0, 1].

    For any one seed, a larger share keeps everything that a smaller one keeps.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"the share to keep must be above 0 and at most 1, got {share}")
    return _multiplied(workload, lambda _: (share, math.inf), 0.0, seed)


def replicate(
    workload: Workload, factor: float, *, seed: int, jitter_s: float = DEFAULT_JITTER_S
) -> Workload:
    """Multiply the rate by ``factor`` on the same clock.

    Below 1 this is ``thin``. Above, every session stays, and ``factor - 1`` copies of it on average come
    up to ``jitter_s`` later. Copy k of all sessions is a population of its own: it shares prefixes within
    itself exactly as the original does, and none with the original. Steps that follow one another
    need different seeds to keep their copies apart.
    """
    if not 0 < factor < math.inf:
        raise ConfigError(f"the rate factor must be positive, got {factor}")
    _check_jitter(jitter_s)
    return _multiplied(workload, lambda _: (factor, math.inf), jitter_s, seed)


def spikes(workload: Workload, spike: Spike, *, seed: int, jitter_s: float = DEFAULT_JITTER_S) -> Workload:
    """Multiply the rate of sessions that start within the spike, as ``replicate`` does; leave the rest.

    A copy starts before its spike ends; its later turns may come after.
    """
    _check_jitter(jitter_s)

    def rate(at_s: float) -> tuple[float, float]:
        end_s = spike.end_s(at_s)
        return (1.0, math.inf) if end_s is None else (spike.factor, end_s)

    return _multiplied(workload, rate, jitter_s, seed)


def _multiplied(
    workload: Workload, rate: Callable[[float], tuple[float, float]], jitter_s: float, seed: int
) -> Workload:
    """Repeat each session as often as ``rate(start) -> (factor, copies start before)`` says on average."""
    rng = np.random.default_rng(seed)
    units = workload.units()
    delays_s: list[list[float]] = []
    for start_s in workload.arrival_s[np.unique(units, return_index=True)[1]].tolist():
        factor, before_s = rate(start_s)
        delays_s.append(_delays_s(rng, factor, min(jitter_s, before_s - start_s)))
    times = np.fromiter(map(len, delays_s), np.int64, len(delays_s))
    parts, rows = [], []
    for copy in range(times.max(initial=0)):
        chosen = np.flatnonzero(times[units] > copy)
        delay_s = np.array([unit[copy] if len(unit) > copy else 0.0 for unit in delays_s])
        part = workload[chosen]
        part = replace(part, arrival_s=part.arrival_s + delay_s[units[chosen]])
        parts.append(renamed(part, f"{seed}.{copy}") if copy else part)
        rows.append(chosen)
    if not parts:
        return workload[:0]
    together = Workload.joined(parts)
    # At one instant in the order of the input, copies after their original.
    return together[np.lexsort((np.concatenate(rows), together.arrival_s))]


def _delays_s(rng: np.random.Generator, factor: float, jitter_s: float) -> list[float]:
    """Return a delay for each appearance of a session; the original is undelayed."""
    count = int(factor) + (1 if rng.random() < factor % 1.0 else 0)
    return [0.0, *rng.uniform(0.0, jitter_s, max(0, count - 1)).tolist()][:count]


def _check_jitter(jitter_s: float) -> None:
    if not 0 <= jitter_s < math.inf:
        raise ConfigError(f"the jitter must be 0 s or more, got {jitter_s}")
