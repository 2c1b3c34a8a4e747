"""``histogram``: what answers of the same kind still had to come when they were as far as this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tidegate.core.prediction import Prediction
from tidegate.core.request import Request
from tidegate.signals.lengths.groups import Groups, Level
from tidegate.signals.lengths.source import Integers, LengthSource, Remaining, limit, limits
from tidegate.signals.lengths.survival import Counts, Curves, bin_of, bins_of

LEVELS: Final = tuple(
    Level(each, 4.0) for each in (("prompt",), ("tenant",), ("tenant", "prompt"), ("session",))
)
"""What lowered the error on production traces (``benchmarks/lengths.py --features``): which of them helps
differs by trace, and together they do no harm. Weights from 3 to 20 differ by 8 % at most, half-lives from a
quarter of an hour to none by 5 %."""
HALF_LIFE_S = 3600.0
PRIOR_WEIGHT = 2.0
"""How many answers the prior counts for (see ``survival.prior_hazard``; ours)."""
ROWS = 1024
"""How many groups are told apart: about 10 KiB of counts and curves each."""
GROWTH = 0.02
"""Curves are worked out again once so much more has been counted (ours)."""
MOST_WEIGHT = 2.0**30
MOST_HALF_LIVES = 500.0
"""Beyond it nothing is left of an older answer, and floats end."""


class _Running:
    """A live request: the rows of its groups, how many bins it came to, and its weight in the last one."""

    __slots__ = ("bins", "rows", "weight")

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        self.bins = 0
        self.weight = 0.0


class HistogramLengths(LengthSource):
    """Learns the lengths of answers online, and needs nothing of the engine or the model.

    It counts, by bins of length, how many answers came there and how many ended there, for all requests and
    for smaller groups of them (``levels``), whose curves lean on the larger group's while they are young.
    Running requests count in the bins that they have come to, so that long ones are not missing until they
    end; those that fail or are cancelled count up to where they came. Counts lose half of their weight in
    ``half_life_s``. Before the first answer it predicts by a broad prior, up to ``max_tokens``.

    Memory does not grow with the number of answers: at most ``rows`` groups, and the live requests.
    """

    name = "histogram"

    def __init__(
        self, levels: Sequence[Level] = LEVELS, *, half_life_s: float = HALF_LIFE_S, rows: int = ROWS
    ) -> None:
        self._groups = Groups(levels, rows)
        self._counts = Counts(rows)
        self._curves = Curves(rows)
        self._running: dict[str, _Running] = {}
        self._half_life_s = half_life_s
        self._weighed_s: float | None = None
        self._counted = self._fitted = 0.0
        self._touched: set[int] = set()

    def remaining(self, request: Request, generated: int) -> Prediction:
        """See ``LengthSource.remaining``."""
        row, most = self._row(request), limit(request, generated)
        mean, low, high = self._curves.remaining(row, float(generated), most)
        return Prediction(float(mean), float(low), float(high), generated, self.name)

    def remaining_many(self, requests: Sequence[Request], generated: Integers) -> Remaining:
        """See ``LengthSource.remaining_many``."""
        rows = np.array([self._row(request) for request in requests], np.intp)
        return self._curves.remaining(rows, generated, limits(requests, generated))

    def tokens(self, requests: Sequence[Request], generated: Integers, now: float) -> None:
        """See ``LengthSource.tokens``: bins that they came to count, and curves follow what was counted."""
        weight = self._weight(now)
        for request, at in zip(requests, bins_of(generated).tolist(), strict=True):
            self._come(self._live(request), at, weight)
        if self._counted >= self._fitted * (1.0 + GROWTH) and self._counted > 0:
            self._fit(weight)

    def finished(self, request: Request, generated: int, now: float) -> None:
        """See ``LengthSource.finished``."""
        running, length = self._live(request), max(1, generated)
        at = bin_of(length)
        self._come(running, at, self._weight(now))
        self._touched.update(running.rows)
        for row in running.rows:
            self._counts.end(row, at, length, running.weight)
        self._counted += running.weight
        self._forget(request)

    def aborted(self, request: Request, generated: int, now: float) -> None:
        """See ``LengthSource.aborted``."""
        if request.id in self._running:
            self._come(self._running[request.id], bin_of(generated), self._weight(now))
            self._forget(request)

    def _row(self, request: Request) -> int:
        running = self._running.get(request.id)
        return self._live(request).rows[-1] if running is None else running.rows[-1]

    def _live(self, request: Request) -> _Running:
        running = self._running.get(request.id)
        if running is None:
            groups = self._groups
            running = self._running[request.id] = _Running(groups.enter(request))
            if groups.created:
                for row in groups.created:
                    self._counts.clear(row)
                    self._curves.inherit(row, groups.parent[row])
                groups.created.clear()
        return running

    def _forget(self, request: Request) -> None:
        self._groups.leave(self._running.pop(request.id).rows)

    def _come(self, running: _Running, at: int, weight: float) -> None:
        if at >= running.bins:
            self._touched.update(running.rows)
            for row in running.rows:
                self._counts.came(row, running.bins, at + 1, weight)
            running.bins, running.weight = at + 1, weight

    def _weight(self, now: float) -> float:
        """Return what an answer counts for that is counted now: twice as much every half-life."""
        if self._weighed_s is None:
            self._weighed_s = now
        weight: float = 2.0 ** min((now - self._weighed_s) / self._half_life_s, MOST_HALF_LIVES)
        if weight > MOST_WEIGHT:
            self._counts.scale(1.0 / weight)
            for running in self._running.values():
                running.weight /= weight
            self._counted /= weight
            self._fitted /= weight
            self._weighed_s, weight = now, 1.0
        return weight

    def _fit(self, weight: float) -> None:
        self._fitted = self._counted
        groups, curves = self._groups, self._curves
        rows = np.array(sorted(self._touched))
        self._touched.clear()
        level, parent = np.array(groups.level), np.array(groups.parent)
        for number in range(len(groups.levels) + 1):
            these = rows[level[rows] == number]
            if number == 0:
                curves.fit(these, self._counts, None, PRIOR_WEIGHT * weight)
            else:
                curves.fit(these, self._counts, parent[these], groups.levels[number - 1].weight * weight)
        curves.derive(rows)
