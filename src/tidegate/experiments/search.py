"""Goodput: the highest offered rate at which attainment is at least a level, found by few runs.

Per seed: from a first guess a bracket grows geometrically, upwards until a rate misses, downwards until one
meets; then it is halved (at its geometric middle) until its ends are within the tolerance. Noise and policies
can make attainment fall and rise again. The lower end is therefore the highest rate below which *every* probe
of that seed met the level: a rate that meets above one that missed does not count. That is a rate up to which
an operator may load the system; the last crossing would be the luckiest one.

Where one of several candidates counts, the next begins just above the best so far. If that rate misses, its
goodput is below by the definition above, and one run has told so.

Over seeds, goodput is the mean of the seeds' lower ends, with Student's t interval on them: the seeds are
independent draws of the same workload.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from tidegate.experiments.jobs import Workers
from tidegate.experiments.run import job_of, probe
from tidegate.experiments.setting import Setting
from tidegate.measure.percentiles import t_interval
from tidegate.reports.comparison import LevelGoodput, RunAt
from tidegate.workloads.choice import own_rate_rps, requests_of

GUESS_FROM, GUESS_TO = 0.2, 0.8
"""Shares of the limit between which a search begins to look."""
BLIND_FACTOR = 8.0
"""Times the trace's own rate: the end of the first guess where no limit is known."""
FLOOR = 0.01
"""Of the first guess's lower end: a system that cannot serve that much serves nothing."""
CEILING = 1000.0
"""Times the first guess's upper end: the highest rate that is tried."""
AT_ONCE = 0.01
"""Of the TTFT target: requests that all come within it come at once, and a higher rate tells nothing new."""
_LARGEST_GROWTH = 8.0
_ROUNDING = 1.0 + 1e-9
EXPECTED_PROBES = 8.0
"""Runs of one seed's search, about."""
RACED_PROBES = 2.5
"""Runs of a search that may stop where another attains, about: most stop at once."""
RACED_GROWTH = 1.15
"""The first step of a candidate that is better: seldom by much."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What to look for; ``low_rps`` to ``high_rps`` is a first guess of the goodput, no bound on it.

    ``growth`` is the factor of the first step when a bracket has only one end; it squares with every further
    step. A rate of at most ``beat_rps`` that misses ends the search, and none above ``most_rps`` is tried.
    """

    level: float = 0.90
    low_rps: float = 1.0
    high_rps: float = 10.0
    tolerance: float = 0.02
    growth: float = 1.5
    beat_rps: float = 0.0
    most_rps: float = math.inf


@dataclass(slots=True)
class _Bracket:
    """The attainment of one seed by rate."""

    settings: SearchSettings
    seen: dict[float, float] = field(default_factory=dict)

    @property
    def missed_rps(self) -> float | None:
        """The lowest rate that missed the level."""
        return min((rate for rate, share in self.seen.items() if share < self.settings.level), default=None)

    @property
    def met_rps(self) -> float | None:
        """The highest rate that met the level below those that missed."""
        top = self.missed_rps
        return max((rate for rate in self.seen if top is None or rate < top), default=None)

    @property
    def beaten(self) -> bool:
        """Whether the goodput is known to be below the rate that was to be beaten."""
        return self.missed_rps is not None and self.missed_rps <= self.settings.beat_rps * _ROUNDING

    def share(self) -> float:
        """Return how much of the search is done, about."""
        met, missed = self.met_rps, self.missed_rps
        both = met is not None and missed is not None
        width = missed / met if met and missed else self.settings.growth
        ratio = math.log(width) / math.log1p(self.settings.tolerance)
        left = max(0, math.ceil(math.log2(max(1e-9, ratio)))) + (0 if both else 1)
        return len(self.seen) / (len(self.seen) + left)

    def next_rate(self) -> float | None:
        """Return the rate to try next; None when the bracket is narrow enough, or nothing is left to try."""
        settings, met, missed = self.settings, self.met_rps, self.missed_rps
        if self.beaten:
            return None
        steps = min(max(0, len(self.seen) - 2), 3)
        growth = min(settings.growth ** (2**steps), _LARGEST_GROWTH)
        if met is not None and missed is not None:
            return math.sqrt(met * missed) if missed > met * (1.0 + settings.tolerance) else None
        if met is not None:
            ceiling = min(CEILING * settings.high_rps, settings.most_rps)
            return None if met >= ceiling else min(max(settings.high_rps, met * growth), ceiling)
        if missed is not None:
            floor = FLOOR * settings.low_rps
            return None if missed <= floor else max(min(settings.low_rps, missed / growth), floor)
        return math.sqrt(settings.low_rps * settings.high_rps)


async def search_goodput(
    settings: SearchSettings,
    seeds: Sequence[int],
    attainment: Callable[[float, int], Awaitable[float]],
    limit_rps: float | None = None,
    credit: Callable[[float], None] = lambda share: None,
) -> LevelGoodput:
    """Return the goodput of runs of which ``attainment(rate_rps, seed)`` tells the attained share.

    ``credit`` is told what share of a seed's search has been done since it was told last.

    The confidence interval of a single seed is the goodput itself and says nothing about the spread.
    ``reason`` is empty, or says why the goodput is only a bound: nothing met down to the floor (0), or all up
    to the ceiling. Where a seed's search ended at ``beat_rps``, ``below_rps`` is that, and the goodput 0.
    """

    async def narrowed(seed: int) -> _Bracket:
        bracket, done = _Bracket(settings), 0.0
        while (rate_rps := bracket.next_rate()) is not None:
            bracket.seen[rate_rps] = await attainment(rate_rps, seed)
            credit(max(0.0, bracket.share() - done))
            done = max(done, bracket.share())
        credit(1.0 - done)
        return bracket

    brackets = await asyncio.gather(*map(narrowed, seeds))
    goodputs = tuple(bracket.met_rps or 0.0 for bracket in brackets)
    mean, low, high = t_interval(goodputs)
    probes = [
        [RunAt(rate, seed, share) for rate, share in bracket.seen.items()]
        for seed, bracket in zip(seeds, brackets, strict=True)
    ]
    by_round = tuple(run for runs in zip_longest(*probes) for run in runs if run is not None)
    if any(bracket.beaten for bracket in brackets):
        return LevelGoodput(
            settings.level, "", 0.0, 0.0, 0.0, limit_rps, by_round, below_rps=settings.beat_rps
        )
    reason = _reason(settings, brackets)
    low = max(0.0, low)
    return LevelGoodput(settings.level, "", mean, low, high, limit_rps, by_round, reason, goodputs)


def _reason(settings: SearchSettings, brackets: Sequence[_Bracket]) -> str:
    nothing = sum(bracket.met_rps is None for bracket in brackets)
    everything = sum(bracket.missed_rps is None for bracket in brackets)
    rates = [rate for bracket in brackets for rate in bracket.seen]
    reasons = []
    if nothing:
        reasons.append(
            f"in {nothing} of {len(brackets)} seeds even {min(rates):g} requests/s "
            f"attain less than {settings.level:.0%}"
        )
    if everything:
        reasons.append(
            f"in {everything} of {len(brackets)} seeds {max(rates):g} requests/s "
            f"still attain {settings.level:.0%}"
        )
    return "; ".join(reasons)


def raced_from(settings: SearchSettings, best_rps: float) -> SearchSettings:
    """Return what to look for where another candidate serves ``best_rps``: only for more (0: no other)."""
    beat_rps = best_rps * (1.0 + settings.tolerance)
    if not best_rps:
        return settings
    return replace(settings, low_rps=beat_rps, high_rps=beat_rps, growth=RACED_GROWTH, beat_rps=beat_rps)


async def find_goodput(
    setting: Setting,
    level: float,
    seeds: Sequence[int],
    tolerance: float,
    limit_rps: float | None,
    workers: Workers,
    best_rps: float = 0.0,
) -> LevelGoodput:
    """Return the goodput of ``setting`` at ``level``; a known ``limit_rps`` tells where to look first.

    With ``best_rps``, what another candidate serves, the search begins more than ``tolerance`` above it, and
    ends there where that misses.
    """
    expected = RACED_PROBES if best_rps else EXPECTED_PROBES
    if limit_rps is not None and limit_rps <= 0:
        workers.credit(expected * len(seeds))
        reason = "more requests than may miss cannot attain even on an empty cluster"
        return LevelGoodput(level, "", 0.0, 0.0, 0.0, limit_rps, (), reason)
    requests = requests_of(setting.workload)
    if limit_rps is None:
        own_rps = own_rate_rps(requests)
        low_rps, high_rps = own_rps, BLIND_FACTOR * own_rps
    else:
        low_rps, high_rps = GUESS_FROM * limit_rps, GUESS_TO * limit_rps

    async def attainment(rate_rps: float, seed: int) -> float:
        title = f"{setting.system} at {rate_rps:.2f} requests/s"
        run = await workers.do(job_of(probe, setting, title, rate_rps=rate_rps, seed=seed))
        return float(run["attainment"])

    # Where rates are numbers of requests, a higher one is always another load.
    at_once = len(requests) / (AT_ONCE * setting.settings.slo.ttft_s)
    most_rps = math.inf if setting.workload.keep_times else max(at_once, high_rps)
    settings = SearchSettings(level, low_rps, high_rps, tolerance, most_rps=most_rps)
    wanted = raced_from(settings, best_rps)
    return await search_goodput(
        wanted, seeds, attainment, limit_rps, lambda share: workers.credit(expected * share)
    )
