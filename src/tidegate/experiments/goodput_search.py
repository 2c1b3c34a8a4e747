"""Goodput: the highest offered rate at which attainment is at least a level, found by few runs.

The search is a set of brackets, one per seed, that ask for runs and are told their attainment. It does no
I/O and starts nothing: ``next_probes`` may be answered in any order, by other processes, or from a cache,
and the probes it asks for depend on the answers alone.

Per seed: from a first guess the bracket grows geometrically, upwards until a rate misses, downwards until
one meets; then it is halved (at its geometric middle) until its ends are within ``tolerance``. Noise and
policies can make attainment fall and rise again. The lower end is therefore the highest rate below which
*every* probe of that seed met the level: a rate that meets above one that missed does not count. That is a
rate up to which an operator may load the system; the last crossing would be the luckiest one.

Over seeds, goodput is the mean of the seeds' lower ends, with Student's t interval on them: the seeds are
independent draws of the same workload.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.reports.comparison import LevelGoodput, RunAt

CONFIDENCE = 0.95
"""Of the interval over seeds."""
_GROWTH = 1.5
"""Factor of the first step when a bracket has only one end; it squares with every further step."""
_LARGEST_GROWTH = 8.0


@dataclass(frozen=True, slots=True, order=True)
class Probe:
    """A run to make: the workload of ``seed`` at ``rate_rps``."""

    seed: int
    rate_rps: float


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What to look for, and where.

    ``low_rps`` to ``high_rps`` is the first guess at where goodput lies, not a bound on it: the bracket grows
    beyond either end, up to a thousand times ``high_rps`` and down to ``floor_rps``, by default a thousandth
    of ``low_rps``.
    """

    level: float = 0.90
    low_rps: float = 1.0
    high_rps: float = 10.0
    tolerance: float = 0.02
    seeds: tuple[int, ...] = (0,)
    floor_rps: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.level <= 1:
            problems.append(f"the attainment level is a share between 0 and 1, got {self.level}")
        if not 0 < self.low_rps <= self.high_rps < math.inf:
            problems.append(
                f"the rates to search between must be positive, got {self.low_rps} to {self.high_rps}"
            )
        if not 0 < self.tolerance < 1:
            problems.append(f"the tolerance is a share between 0 and 1, got {self.tolerance}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            problems.append(f"a search needs seeds, each once, got {self.seeds}")
        if problems:
            raise ConfigError(problems)
        if not 0 < self.floor <= self.low_rps:
            raise ConfigError(f"the floor must be positive and at most {self.low_rps}, got {self.floor}")

    @property
    def floor(self) -> float:
        """The lowest rate that is tried."""
        return self.low_rps / 1000.0 if self.floor_rps is None else self.floor_rps

    @property
    def ceiling(self) -> float:
        """The highest rate that is tried."""
        return self.high_rps * 1000.0


@dataclass(slots=True)
class _Bracket:
    """The probes of one seed. ``missed_rps`` is the lowest that missed, ``met_rps`` the highest below it."""

    settings: SearchSettings
    seen: dict[float, float] = field(default_factory=dict)

    @property
    def missed_rps(self) -> float | None:
        return min((rate for rate, share in self.seen.items() if share < self.settings.level), default=None)

    @property
    def met_rps(self) -> float | None:
        top = self.missed_rps
        met = (rate for rate, share in self.seen.items() if share >= self.settings.level)
        return max((rate for rate in met if top is None or rate < top), default=None)

    def next_rate(self) -> float | None:
        """Return the rate to try next; None when the bracket is narrow enough, or nothing is left to try."""
        settings, met, missed = self.settings, self.met_rps, self.missed_rps
        if met is None and missed is None:
            return math.sqrt(settings.low_rps * settings.high_rps)
        if missed is None:
            assert met is not None
            rate = min(max(settings.high_rps, met * self._growth()), settings.ceiling)
            return None if met >= settings.ceiling else rate
        if met is None:
            rate = max(min(settings.low_rps, missed / self._growth()), settings.floor)
            return None if missed <= settings.floor else rate
        return math.sqrt(met * missed) if missed > met * (1.0 + settings.tolerance) else None

    def _growth(self) -> float:
        return float(min(_GROWTH ** (2 ** max(0, len(self.seen) - 2)), _LARGEST_GROWTH))


class GoodputSearch:
    """Asks for runs and is told what came out of them.

    Ask ``next_probes`` until it is empty; give every answer to ``tell``, in any order. Answers of an earlier,
    interrupted search may be told before anything is asked.
    """

    def __init__(self, settings: SearchSettings) -> None:
        self.settings = settings
        self._brackets = {seed: _Bracket(settings) for seed in settings.seeds}
        self._told: list[RunAt] = []

    def next_probes(self) -> tuple[Probe, ...]:
        """Return the runs that are wanted now, at most one per seed; the same ones until they are told."""
        wanted = ((seed, bracket.next_rate()) for seed, bracket in self._brackets.items())
        return tuple(Probe(seed, rate) for seed, rate in wanted if rate is not None)

    def tell(self, answers: Iterable[RunAt]) -> None:
        """Take note of finished runs. Raises ConfigError for a seed or an attainment that cannot be."""
        for run in answers:
            if run.seed not in self._brackets:
                raise ConfigError(f"this search has no seed {run.seed}; its seeds are {self.settings.seeds}")
            if not 0 <= run.attainment <= 1 or not 0 < run.rate_rps < math.inf:
                raise ConfigError(f"attainment {run.attainment} at {run.rate_rps} requests/s is not a result")
            if run.rate_rps not in self._brackets[run.seed].seen:
                self._told.append(run)
            self._brackets[run.seed].seen[run.rate_rps] = run.attainment

    def result(self, limit_rps: float | None = None) -> LevelGoodput:
        """Return what is known, with the limit that belongs to it; before the end, what is known so far.

        The goodput has its confidence interval over seeds, equal to it for a single seed, which says nothing
        about the spread. ``reason`` is empty, or says why the goodput is only a bound: nothing met down to
        the floor (0), or all up to the top.
        """
        brackets = list(self._brackets.values())
        mean, low, high = t_interval([bracket.met_rps or 0.0 for bracket in brackets])
        reason = self._reason(brackets)
        runs = tuple(self._told)
        return LevelGoodput(self.settings.level, "", mean, max(0.0, low), high, limit_rps, runs, reason)

    def _reason(self, brackets: Sequence[_Bracket]) -> str:
        settings = self.settings
        nothing = sum(b.met_rps is None and b.missed_rps is not None for b in brackets)
        everything = sum(b.missed_rps is None and b.met_rps is not None for b in brackets)
        reasons = []
        if nothing:
            lowest = min(rate for b in brackets for rate in b.seen)
            reasons.append(
                f"in {nothing} of {len(brackets)} seeds even {lowest:g} requests/s "
                f"attain less than {settings.level:.0%}"
            )
        if everything:
            highest = max(rate for b in brackets for rate in b.seen)
            reasons.append(
                f"in {everything} of {len(brackets)} seeds {highest:g} requests/s "
                f"still attain {settings.level:.0%}"
            )
        return "; ".join(reasons)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of ``values`` and the ends of Student's interval for it, equal for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    from scipy.special import stdtrit  # slow to import, and few runs need it

    half = float(stdtrit(len(values) - 1, 0.5 + 0.5 * CONFIDENCE) * np.std(values, ddof=1))
    half /= math.sqrt(len(values))
    return mean, mean - half, mean + half
