"""The search for intervals under which many requests miss, by cutting planes.

A linear program gives up the least share of the requests, the intervals that are overfull with what is left
are added to it, and so on. Nothing but tightness rests on it: ``missed`` counts what its multipliers prove.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from tidegate.bound.demand import Demand
from tidegate.bound.intervals import Certificate, Interval, Spans, Worth, missed
from tidegate.core.slo import Slo
from tidegate.costs.forms import Values

Indices = NDArray[np.int64]
_CUTS = 300
"""Starts, and ends, among which overfull intervals are looked for; the best are then moved to any request."""
_PER_LIST = 12
"""Intervals that a round adds per price list, at most."""
_ROUNDS = 25
"""Programs per scale, at most."""
_PATIENCE = 5
_STALLED = 1.001
"""From round ``_PATIENCE`` on a program whose answer grew by less is the last, unless it is near its goal."""
_NEAR = 0.995
_IDLE = 4
"""Programs in a row that an interval may do nothing for."""
_COLUMNS = 6000
"""Requests from which on the program takes those of one kind together."""
_BUCKETS = 250
"""Kinds by worth."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ends:
    """Both deadlines of every request, sorted: entry i is that of request ``request[i]``."""

    at_s: Values
    request: Indices
    whole: NDArray[np.bool_]
    order: Indices

    @classmethod
    def of(cls, spans: Spans) -> _Ends:
        both = np.concatenate([spans.prefill_end, spans.answer_end])
        order = np.argsort(both, kind="stable")
        count = len(spans.arrival)
        return cls(both[order], order % count, order >= count, order)


class Planes:
    """Proves misses of ``demand``, scale after scale; what it found at one helps at the next."""

    def __init__(self, demand: Demand, slo: Slo, worth: Worth) -> None:
        self._demand, self._slo = demand, slo
        self.worth = worth
        self._idle: dict[Interval, int] = {}
        count = len(demand)
        gap_s = np.diff(demand.arrival_s, prepend=-np.inf)
        bursts = np.argsort(-gap_s, kind="stable")[: _CUTS // 2]
        even = np.linspace(0, count, _CUTS // 2, endpoint=False).astype(np.int64)
        self._starts: Indices = np.unique(np.concatenate([bursts, even]))

    def excludes(self, scale: float, spare: int) -> Certificate | None:
        """Return a proof that more than ``spare`` requests miss at ``scale``; None where none is found."""
        spans = Spans.of(self._demand, scale, self._slo)
        kept, before = np.ones(len(self._demand)), 0.0
        for turn in range(_ROUNDS):
            solved = self._round(spans, kept, first=turn == 0)
            if solved is None:
                return None
            certificate, kept, least = solved
            if proves(spans, self.worth, certificate, spare):
                return certificate
            if turn >= _PATIENCE and least < min(before * _STALLED, spare * _NEAR):
                return None
            before = least
        return None

    def fitting(self, scale: float, spare: int) -> Values | None:
        """Return the share of each request that is kept where the least are given up; None above ``spare``.

        No interval found is then overfull, up to the rounds that are spent.
        """
        spans = Spans.of(self._demand, scale, self._slo)
        kept = np.ones(len(self._demand))
        for turn in range(_ROUNDS):
            solved = self._round(spans, kept, first=turn == 0)
            if solved is None:
                break
            kept = solved[1]
            if solved[2] > spare:
                return None
        return kept

    def _round(self, spans: Spans, kept: Values, *, first: bool) -> tuple[Certificate, Values, float] | None:
        """Add the intervals that ``kept`` overfills and solve; None where there is nothing new to solve."""
        found = [each for each in self._overfull(spans, kept) if each not in self._idle]
        self._idle.update(dict.fromkeys(found, 0))
        if not self._idle or not (first or found):
            return None
        return self._program(spans)

    def _overfull(self, spans: Spans, kept: Values) -> list[Interval]:
        """Return intervals whose work, as far as it is ``kept``, is worth more than their time."""
        ends = _Ends.of(spans)
        count, starts = len(kept), self._starts
        rank = np.empty(2 * count, dtype=np.int64)
        rank[ends.order] = np.arange(2 * count)
        even = np.linspace(0, 2 * count - 1, _CUTS).astype(np.int64)
        cut_s = np.unique(ends.at_s[np.concatenate([even, rank[starts[1:] - 1]])])
        row = np.searchsorted(starts, np.arange(count), side="right") - 1
        column = np.searchsorted(cut_s, np.concatenate([spans.prefill_end, spans.answer_end]))
        cell = np.concatenate([row, row]) * len(cut_s) + column
        length_s = cut_s[None, :] - spans.arrival[starts][:, None]
        found: list[Interval] = []
        for prices in range(self.worth.prefill.shape[1]):
            work = np.concatenate([self.worth.prefill[:, prices] * kept, self.worth.answer[:, prices] * kept])
            grid = np.bincount(cell, work, length_s.size).reshape(length_s.shape)
            inside = np.cumsum(np.cumsum(grid[::-1], axis=0)[::-1], axis=1)
            over = np.where(length_s > 0.0, inside - length_s, -np.inf)
            best = over.argmax(axis=0)
            for end in _peaks(over.max(axis=0), cut_s):
                found.append(
                    _moved(spans, ends, work[ends.order], prices, int(starts[best[end]]), cut_s[end])
                )
        return list(dict.fromkeys(found))

    def _program(self, spans: Spans) -> tuple[Certificate, Values, float] | None:
        """Return multipliers of the known intervals, the kept share of each request, and the least misses."""
        intervals = list(self._idle)
        unit = np.maximum((self.worth.prefill + self.worth.answer).mean(axis=0), 1e-300)
        units = unit[[interval.prices for interval in intervals]]
        inside = [np.add(*spans.inside(interval, self.worth)) for interval in intervals]
        work = np.stack(inside) / units[:, None]
        lengths = np.array([spans.length(interval) for interval in intervals]) / units
        member = self._classes(spans, intervals)
        size = int(member.max()) + 1
        solved = linprog(
            np.bincount(member, minlength=size).astype(np.float64),
            A_ub=csr_array(np.stack([-np.bincount(member, row, size) for row in work])),
            b_ub=lengths - work.sum(axis=1),
            bounds=(0.0, 1.0),
            method="highs-ds",
        )
        if solved.x is None:
            return None
        multipliers = np.maximum(-solved.ineqlin.marginals, 0.0) / units
        used = multipliers > 0.0
        for interval, busy in zip(intervals, used, strict=True):
            self._idle[interval] = 0 if busy else self._idle[interval] + 1
            if self._idle[interval] >= _IDLE:
                del self._idle[interval]
        busy_ones = [interval for interval, busy in zip(intervals, used, strict=True) if busy]
        kept: Values = 1.0 - solved.x[member]
        return Certificate(busy_ones, multipliers[used]), kept, float(solved.fun)

    def _classes(self, spans: Spans, intervals: list[Interval]) -> Indices:
        """Return the class of each request: those in the same intervals and of about equal worth are one."""
        count = len(spans.arrival)
        if count <= _COLUMNS:
            return np.arange(count)
        first = np.unique([interval.first for interval in intervals])
        end_s = np.unique([spans.end(interval) for interval in intervals])
        total = (self.worth.prefill + self.worth.answer).mean(axis=1)
        rank = np.argsort(np.argsort(total, kind="stable"), kind="stable")
        columns = (
            np.searchsorted(first, np.arange(count), side="right"),
            np.searchsorted(end_s, spans.prefill_end),
            np.searchsorted(end_s, spans.answer_end),
            rank * _BUCKETS // count,
        )
        sizes = (len(first) + 1, len(end_s) + 1, len(end_s) + 1, _BUCKETS)
        member: Indices = np.unique(np.ravel_multi_index(columns, sizes), return_inverse=True)[1]
        return member


def proves(spans: Spans, worth: Worth, certificate: Certificate, spare: int) -> bool:
    """Tell whether more than ``spare`` requests miss, with room for rounding."""
    return missed(spans, worth, certificate) > spare + 1e-6 * (1.0 + spare)


def _peaks(over: Values, cut_s: Values) -> Indices:
    """Return the ends at which an interval is fuller than at those beside them, the worst first."""
    padded = np.concatenate([[-np.inf], over, [-np.inf]])
    peak = (over > 1e-6 * (1.0 + cut_s)) & (over >= padded[:-2]) & (over > padded[2:])
    which = np.flatnonzero(peak)
    return which[np.argsort(-over[which], kind="stable")][:_PER_LIST]


def _moved(spans: Spans, ends: _Ends, work: Values, prices: int, first: int, end_s: float) -> Interval:
    """Move the start, then the end of an interval to where it is overfull by most, twice.

    ``work`` is what each of ``ends`` is worth.
    """
    last = 0
    for _ in range(2):
        until = int(np.searchsorted(ends.at_s, end_s, side="right"))
        by_request = np.bincount(ends.request[:until], work[:until], len(spans.arrival))
        gain = np.cumsum(by_request[::-1])[::-1] + spans.arrival
        first = int(np.argmax(np.where(spans.arrival < end_s, gain, -np.inf)))
        gain = np.cumsum(np.where(ends.request >= first, work, 0.0)) - ends.at_s
        last = int(np.argmax(np.where(ends.at_s > spans.arrival[first], gain, -np.inf)))
        end_s = float(ends.at_s[last])
    return Interval(first, int(ends.request[last]), bool(ends.whole[last]), prices)
