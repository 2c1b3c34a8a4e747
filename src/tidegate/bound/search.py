"""The search for the slowest arrivals that the bound of ``limit`` excludes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidegate.bound.demand import Batching, Demand, DemandKind
from tidegate.bound.prices import (
    ExtremeSteps,
    Prices,
    Reach,
    answer_worth,
    best_prices,
    prompt_worth,
    steps_of,
)
from tidegate.bound.weights import Windows, Worth, attainable, windows_of, worst_weights
from tidegate.core.slo import Slo
from tidegate.costs.forms import Values

WINDOWS = 40
"""Windows that the trace is cut into."""
PRECISION = 0.005
"""Relative width at which the search stops."""
_SAME = 1.01
"""Price lists that differ by less are one."""
_PARTS = 24
_EXTREME_PARTS = 5
"""The trace in parts: the few with the most and with the least prefill get price lists of their own."""
_BEYOND = 1e6
"""A rate this many times the first guess stands for all requests at once."""
_MOST_PROGRAMS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Market:
    """What price lists are made from: a fleet and the requests that can attain."""

    demand: Demand
    kinds: Sequence[DemandKind]
    slo: Slo
    grid: ExtremeSteps
    exact: ExtremeSteps

    @classmethod
    def of(cls, demand: Demand, kinds: Sequence[DemandKind], batching: Batching, slo: Slo) -> Market:
        """Price every step that requests of ``demand`` could make up."""
        reach = Reach.of(demand, slo.ttft_s)
        grid = steps_of(kinds, batching, reach, every_batch=False)
        return cls(demand, kinds, slo, grid, steps_of(kinds, batching, reach, every_batch=True))

    def prices(self, work: Demand) -> Prices | None:
        """Return the fair prices under which ``work`` is worth most."""
        return best_prices(work, self.grid, self.exact, self.kinds, self.slo.tpot_s)

    def worth(self, lists: Sequence[Prices]) -> Worth:
        """Price every request; an answer that is worth less than its time is left out, hence zero."""
        answers = [np.maximum(answer_worth(prices, self.demand, self.slo.tpot_s), 0.0) for prices in lists]
        prefills = [prompt_worth(prices, self.demand) for prices in lists]
        return Worth(np.column_stack(prefills), np.column_stack(answers))


@dataclass(frozen=True, slots=True, eq=False)
class Excluded:
    """Arrivals ``scale`` times as fast as the trace's cannot be served, as ``weights`` of ``worth`` prove."""

    scale: float
    windows: Windows
    weights: Values
    worth: Worth


def price_lists(market: Market, keep: float) -> list[Prices]:
    """Return price lists for the whole trace, for its cheapest share ``keep``, and for its extreme parts."""
    demand = market.demand
    works = [demand]
    whole = market.prices(demand)
    if whole is not None:
        worth = market.worth([whole])
        prefill, total = worth.prefill[:, 0], worth.prefill[:, 0] + worth.answer[:, 0]
        works.append(demand.only(total <= np.quantile(total, keep)))
        part = np.arange(len(demand)) * _PARTS // len(demand)
        share = np.bincount(part, prefill, _PARTS) / np.maximum(np.bincount(part, total, _PARTS), 1e-300)
        rank = np.argsort(np.argsort(share))[part]
        works += [demand.only(rank < _EXTREME_PARTS), demand.only(rank >= _PARTS - _EXTREME_PARTS)]
    nothing = np.zeros(len(demand))
    works += [replace(demand, decodes=nothing), replace(demand, new_tokens=nothing)]
    found = [market.prices(work) for work in works if len(work) and (work.new_tokens + work.decodes).any()]
    return undominated(market, [prices for prices in found if prices is not None])


def undominated(market: Market, lists: Sequence[Prices]) -> list[Prices]:
    """Leave out the lists under which no request is worth clearly more than under another."""
    kept: list[Prices] = []
    worths: list[Values] = []
    for prices in lists:
        found = market.worth([prices])
        worth = np.column_stack([found.prefill, found.answer])
        if not any(np.all(worth <= other * _SAME + 1e-15) for other in worths):
            kept.append(prices)
            worths.append(worth)
    return kept


class Search:
    """Finds the smallest scale that some weights exclude, up to ``PRECISION``.

    What is excluded at one scale is so at every larger one: see ``limit``. ``hopeless`` requests count as
    offered. One price list finds the place, the others sharpen it.
    """

    def __init__(self, market: Market, level: float, hopeless: int) -> None:
        self._market = market
        self._level = level
        self._hopeless = hopeless
        self._lists = price_lists(market, level)

    def run(self) -> Excluded | None:
        """Return the slowest excluded arrivals; None when no rate is excluded."""
        if not self._lists:
            return None
        demand = self._market.demand
        every = self._market.worth(self._lists)
        dearest = int(np.argmax((every.prefill + every.answer).sum(axis=0)))
        one = Worth(every.prefill[:, [dearest]], every.answer[:, [dearest]])
        span_s = float(demand.arrival_s[-1] - demand.arrival_s[0])
        guess = span_s / max(float((one.prefill + one.answer).sum()), 1e-12)
        if self._at(guess * _BEYOND, one) is None:
            return None
        low, found, factor = 0.0, self._at(guess, one), 1.3
        while found is None:
            low, guess = guess, guess * factor
            found = self._at(guess, one)
            factor *= factor
        return self._sharpened(self._bisect(low, self._slower(found, low)))

    def _bisect(self, low: float, found: Excluded) -> Excluded:
        for _ in range(_MOST_PROGRAMS):
            if found.scale < low * (1.0 + PRECISION):
                break
            # The weights at hand were already pushed down as far as they hold, so the end is near.
            middle = max(float(np.sqrt(low * found.scale)), found.scale / (1.0 + 4.0 * PRECISION))
            better = self._at(middle, found.worth)
            if better is None:
                low = middle
            else:
                found = self._slower(better, low)
        return found

    def _sharpened(self, found: Excluded) -> Excluded:
        """Try all price lists, and one for the work that decides."""
        heavy = found.weights.sum(axis=0)[found.windows.first] > 0.0
        total = (found.worth.prefill + found.worth.answer) @ found.weights.sum(axis=1)
        deciding = heavy & (total <= np.quantile(total, self._level))
        prices = self._market.prices(self._market.demand.only(deciding)) if deciding.any() else None
        lists = self._lists if prices is None else undominated(self._market, [prices, *self._lists])
        for _ in range(_MOST_PROGRAMS):
            better = self._at(found.scale / (1.0 + PRECISION), self._market.worth(lists))
            if better is None:
                return found
            found = self._slower(better, 0.0)
        return found

    def _at(self, scale: float, worth: Worth, weights: Values | None = None) -> Excluded | None:
        """Return ``scale`` as excluded by weights, by default the program's; None where it is not."""
        windows = windows_of(self._market.demand, scale, self._market.slo, WINDOWS)
        if weights is None:
            weights = worst_weights(worth, windows)
        if weights is None or attainable(worth, windows, weights, self._hopeless) >= self._level:
            return None
        return Excluded(scale, windows, weights, worth)

    def _slower(self, found: Excluded, low: float) -> Excluded:
        """Slow the arrivals down for as long as the same weights exclude them."""
        low = max(low, 0.5 * found.scale)
        while found.scale > low * (1.0 + 0.5 * PRECISION):
            middle = float(np.sqrt(low * found.scale))
            better = self._at(middle, found.worth, found.weights)
            if better is None:
                low = middle
            else:
                found = better
        return found
