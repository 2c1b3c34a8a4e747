"""The search for the slowest arrivals that the bound of ``limit`` excludes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidegate.bound.demand import Batching, Demand, DemandKind
from tidegate.bound.intervals import Certificate, Interval, Spans, Worth
from tidegate.bound.planes import Planes, proves
from tidegate.bound.prices import (
    ExtremeSteps,
    Prices,
    Reach,
    answer_worth,
    best_prices,
    prompt_worth,
    steps_of,
)
from tidegate.core.slo import Slo
from tidegate.measure.request_table import Mask

PRECISION = 0.005
"""Relative width at which the search stops."""
_SAME = 1.01
"""Price lists that differ by less are one."""
_PARTS = 24
_EXTREME_PARTS = 5
"""The trace in parts: the few with the most and with the least prefill get price lists of their own."""
_LOOSER = (2.0, 4.0)
"""Price lists for targets this many times as long are tried, too: prices that are fair there are so here."""
_BEYOND = 1e6
"""A rate this many times the first guess stands for all requests at once; this much slower, for any rate."""
_SHARPENED = 3
_DECIDING = 4
"""Rounds in which intervals get price lists of their own, and how many of the heaviest do in each."""


@dataclass(frozen=True, slots=True, eq=False)
class Market:
    """What price lists are made from: a fleet and the requests that can attain."""

    demand: Demand
    kinds: Sequence[DemandKind]
    batching: Batching
    slo: Slo
    grid: ExtremeSteps
    exact: ExtremeSteps

    @classmethod
    def of(cls, demand: Demand, kinds: Sequence[DemandKind], batching: Batching, slo: Slo) -> Market:
        """Price every step that requests of ``demand`` could make up."""
        reach = Reach.of(demand, slo.ttft_s)
        grid = steps_of(kinds, batching, reach, every_batch=False)
        return cls(demand, kinds, batching, slo, grid, steps_of(kinds, batching, reach, every_batch=True))

    def prices(self, work: Demand) -> Prices | None:
        """Return the fair prices under which ``work`` is worth most; None where none are found."""
        if not (work.new_tokens + work.decodes).any():
            return None
        return best_prices(work, self.grid, self.exact, self.kinds, self.slo.tpot_s)

    def looser(self) -> list[Market]:
        """Return the same demand under longer targets, one at a time."""
        slo = self.slo
        slos = [replace(slo, tpot_s=factor * slo.tpot_s) for factor in _LOOSER]
        slos += [replace(slo, ttft_s=factor * slo.ttft_s) for factor in _LOOSER]
        return [Market.of(self.demand, self.kinds, self.batching, each) for each in slos]

    def worth(self, lists: Sequence[Prices]) -> Worth:
        """Price every request; an answer that is worth less than its time is left out, hence zero."""
        answers = [np.maximum(answer_worth(prices, self.demand, self.slo.tpot_s), 0.0) for prices in lists]
        prefills = [prompt_worth(prices, self.demand) for prices in lists]
        second = np.array([prices.instance.max() for prices in lists])
        return Worth(np.column_stack(prefills), np.column_stack(answers), second)


@dataclass(frozen=True, slots=True, eq=False)
class Excluded:
    """Arrivals ``scale`` times as fast as the trace's cannot be served, as ``certificate`` proves."""

    scale: float
    spans: Spans
    certificate: Certificate
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
    found = [market.prices(work) for work in works if len(work)]
    found += [looser.prices(demand) for looser in market.looser()]
    return undominated(market, [prices for prices in found if prices is not None], [])


def undominated(market: Market, lists: Sequence[Prices], kept: Sequence[Prices]) -> list[Prices]:
    """Return ``kept`` and those of ``lists`` under which some request is worth clearly more."""
    every = list(kept)
    worths = [np.column_stack([worth.prefill, worth.answer]) for worth in (market.worth([p]) for p in kept)]
    for prices in lists:
        found = market.worth([prices])
        worth = np.column_stack([found.prefill, found.answer])
        if not any(np.all(worth <= other * _SAME + 1e-15) for other in worths):
            every.append(prices)
            worths.append(worth)
    return every


class Search:
    """Finds the smallest scale that some intervals exclude, up to ``PRECISION``.

    What is excluded at one scale is so at every larger one: see ``limit``. ``hopeless`` requests count as
    offered.
    """

    def __init__(self, market: Market, level: float, hopeless: int) -> None:
        self._market = market
        count = len(market.demand)
        self._spare = count - math.ceil(level * (count + hopeless) - 1e-9)
        self._lists = price_lists(market, level)
        self._floor = 0.0
        self._planes = Planes(market.demand, market.slo, market.worth(self._lists)) if self._lists else None

    def run(self) -> Excluded | None:
        """Return the slowest excluded arrivals, of scale 0 where every rate is; None when none is."""
        if self._planes is None:
            return None
        demand, worth = self._market.demand, self._planes.worth
        span_s = float(demand.arrival_s[-1] - demand.arrival_s[0])
        guess = span_s / max(float((worth.prefill + worth.answer).sum(axis=0).max()), 1e-12)
        low, found = 0.0, self._at(guess)
        if found is None:
            if self._at(guess * _BEYOND) is None:
                return None
            factor = 1.3
            while found is None:
                low, guess = guess, guess * factor
                found = self._at(guess)
                factor *= factor
        self._floor = found.scale / _BEYOND
        found = self._slowest(low, found, 1.3)
        for _ in range(_SHARPENED):
            if found.scale <= self._floor or not self._learn(found):
                break
            found = self._slowest(0.0, found, 1.0 + PRECISION)
        return found if found.scale > self._floor else replace(found, scale=0.0)

    def _slowest(self, low: float, found: Excluded, step: float) -> Excluded:
        """Search below ``found``, in growing steps while ``low`` is 0; ``low`` is not excluded."""
        while found.scale > max(self._floor, low * (1.0 + PRECISION)):
            trial = math.sqrt(low * found.scale) if low > 0.0 else found.scale / step
            step = min(step * step, 4.0)
            better = self._at(trial)
            if better is None:
                low = trial
            else:
                found = better
        return found

    def _at(self, scale: float) -> Excluded | None:
        """Return arrivals at most ``scale`` times as fast as excluded; None where ``scale`` is not."""
        assert self._planes is not None
        certificate = self._planes.excludes(scale, self._spare)
        if certificate is None:
            return None
        demand, slo, worth = self._market.demand, self._market.slo, self._planes.worth
        spans, high, low = Spans.of(demand, scale, slo), scale, 0.5 * scale
        while high > low * (1.0 + 0.5 * PRECISION):
            middle = math.sqrt(low * high)
            slower = Spans.of(demand, middle, slo)
            if proves(slower, worth, certificate, self._spare):
                spans, high = slower, middle
            else:
                low = middle
        return Excluded(high, spans, certificate, worth)

    def _learn(self, found: Excluded) -> bool:
        """Add price lists for what the heaviest intervals keep; tell whether there are any new ones."""
        assert self._planes is not None
        certificate, spans = found.certificate, found.spans
        kept = np.add(*certificate.weighed(spans, found.worth)) <= 1.0
        weights = certificate.multipliers * [spans.length(each) for each in certificate.intervals]
        heaviest = [certificate.intervals[i] for i in np.argsort(-weights, kind="stable")[:_DECIDING]]
        lists = [self._market.prices(work) for each in heaviest if len(work := self._work(found, each, kept))]
        known = len(self._lists)
        self._lists = undominated(self._market, [each for each in lists if each is not None], self._lists)
        self._planes.worth = self._market.worth(self._lists)
        return len(self._lists) > known

    def _work(self, found: Excluded, interval: Interval, kept: Mask) -> Demand:
        """Return the work inside ``interval`` of the requests that are ``kept``."""
        demand, end = self._market.demand, found.spans.end(interval)
        later = kept & (np.arange(len(demand)) >= interval.first)
        prompt, answer = (
            later & (found.spans.prefill_end <= end),
            later & (found.spans.answer_end <= end),
        )
        work = replace(demand, new_tokens=demand.new_tokens * prompt, decodes=demand.decodes * answer)
        return work.only(prompt)
