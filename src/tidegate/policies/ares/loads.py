"""What decode instances will hold over the next tokens, as far as lengths are predicted.

The grid counts tokens: every decode gains one per step, and leaves when it has generated what is predicted of
it. Nobody else comes. Who is on its way to another instance counts there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from tidegate.core.decision import Alternatives
from tidegate.core.request import Request
from tidegate.ledger.rows import RequestRows
from tidegate.ledger.snapshot import Column, Labels, Mask, Snapshot

Columns = NDArray[np.intp]
Curves = NDArray[np.float64]
"""Tokens at every grid point: one row per instance, or per request."""


@dataclass(frozen=True)
class Horizon:
    """``points`` grid points from now to ``tokens`` ahead; each counts ``gamma`` times the one before."""

    tokens: int = 1024
    points: int = 16
    gamma: float = 0.8

    @cached_property
    def at(self) -> Column:
        """The grid points, in tokens from now."""
        return np.linspace(0.0, self.tokens, self.points)

    @cached_property
    def weights(self) -> Column:
        """What each grid point counts; they sum to 1."""
        weights = self.gamma ** np.arange(self.points)
        return np.asarray(weights / weights.sum())


@dataclass(frozen=True, slots=True)
class Decodes:
    """The decodes that are placed, one row each: ``row`` of the snapshot's requests.

    Each is ``on`` a column of the snapshot, and counts at column ``at``: where a migration takes it, else
    the same. ``context_tokens`` are resident, ``left_tokens`` still to come (the mean), at most
    ``most_tokens`` of them (the 0.9 quantile). ``movable``: its KV is there, and no migration is under way.
    """

    row: Columns
    on: Columns
    at: Columns
    context_tokens: Column
    left_tokens: Column
    most_tokens: Column
    movable: Mask
    moved_at_s: Column

    @classmethod
    def of(cls, rows: RequestRows) -> Decodes:
        """Read the decodes from the snapshot's requests.

        Without a prediction an answer is taken to become as long as it may.
        """
        row = np.flatnonzero(rows.decode_on >= 0)
        decode_on, moving_to = rows.decode_on[row], rows.moving_to[row]
        left, most = rows.remaining_tokens[row], rows.remaining_high_tokens[row]
        if np.isnan(left).any():
            limit = (rows.max_tokens - rows.generated_tokens)[row]
            left = np.where(np.isnan(left), limit, left)
        return cls(
            row,
            decode_on,
            np.where(moving_to >= 0, moving_to, decode_on),
            rows.context_tokens[row].astype(np.float64),
            left,
            np.fmax(most, left),
            (moving_to < 0) & (rows.source_on[row] < 0),
            rows.moved_at_s[row],
        )


class DecodeLoads:
    """The loads of the instances that decode, at every grid point.

    Those are the instances labelled for it; with ``left_behind`` also those that hold decodes under another
    label. None of them drains. An instance has a place here: ``columns`` says which column of the snapshot
    that is, and the rows of ``loads`` are in that order. ``places`` has that of each of the ``decodes``, -1
    for one that is on none of them. ``beside_tokens`` is KV that is no decode's, ``capacity_tokens`` what an
    instance can hold (inf where that is unknown).
    """

    def __init__(
        self, snapshot: Snapshot, rows: RequestRows, horizon: Horizon, *, left_behind: bool = False
    ) -> None:
        self.horizon: Final = horizon
        self.ids: Final = snapshot.ids
        self.decodes: Final = Decodes.of(rows)
        decoding = snapshot.labels.decoding_mask
        if left_behind:
            decoding = decoding | (np.bincount(self.decodes.at, minlength=len(snapshot)) > 0)
        columns = np.flatnonzero(decoding & ~snapshot.draining)
        self.columns: Final[Columns] = columns
        self._place = np.full(len(snapshot) + 1, -1)
        self._place[columns] = np.arange(len(columns))
        self.places: Final[Columns] = self._place[self.decodes.at]
        self._where: Final = np.where(self.places >= 0, self.places, len(columns))
        capacity = snapshot.kv_capacity_tokens[columns]
        self.capacity_tokens: Final[Column] = np.where(capacity > 0, capacity, np.inf)
        free, resident = snapshot.free_tokens[columns], snapshot.decode_tokens[columns]
        beside = np.where(capacity > 0, capacity - free - resident, 0.0)
        self.beside_tokens: Final[Column] = np.maximum(beside, 0.0)

    def curves(self, decodes: Columns) -> Curves:
        """Return what each of these decodes holds at every grid point."""
        context, left = self.decodes.context_tokens[decodes], self.decodes.left_tokens[decodes]
        return held(context[:, None], left[:, None], self.horizon.at)

    @cached_property
    def loads(self) -> Curves:
        """What each instance holds at every grid point."""
        context, left = self.decodes.context_tokens, self.decodes.left_tokens
        return np.array([self.summed(held(context, left, at)) for at in self.horizon.at]).T

    def summed(self, values: Column) -> Column:
        """Return the sum over the decodes of each instance of ``values``, which has one entry per decode."""
        sums = np.bincount(self._where, values, len(self.columns) + 1)[:-1]
        return sums.astype(np.float64, copy=False)  # whole numbers where there are no decodes

    def weighted(self) -> Column:
        """Return W: the time-weighted load of each instance."""
        weighted: Column = self.loads @ self.horizon.weights
        return weighted

    def peaks(self) -> Column:
        """Return the most KV that each instance will hold."""
        peaks: Column = self.loads.max(axis=1, initial=0.0) + self.beside_tokens
        return peaks

    def variance(self) -> float:
        """Return V: the time-weighted variance of the loads over the instances."""
        return float(self.loads.var(axis=0) @ self.horizon.weights) if len(self.loads) else 0.0

    def room(self, share: float, places: Columns | slice = slice(None)) -> Curves:
        """Return how much context a decode may have that stays until each grid point.

        One row per instance: what it holds then, and until then, fits into ``share`` of its KV.
        """
        usable = share * self.capacity_tokens[places] - self.beside_tokens[places]
        return np.minimum.accumulate(usable[:, None] - self.loads[places] - self.horizon.at, axis=1)

    def last_point(self, tokens: Column | float) -> Columns:
        """Return the last grid point at which a decode with so many tokens to come is still there."""
        return np.maximum(np.searchsorted(self.horizon.at, tokens) - 1, 0)

    def newcomer(self, request: Request) -> tuple[Column, int]:
        """Return what a request would hold at every grid point, and the last one at which it may be there."""
        at, told = self.horizon.at, request.remaining
        left, most = (told.mean, told.high) if told is not None else (request.max_tokens,) * 2
        return (request.prompt_tokens + at) * (at < left), int(self.last_point(max(left, most)))

    def add(self, place: int, curve: Column) -> None:
        """Count a newcomer at an instance; a negative curve takes one away."""
        self.loads[place] += curve

    def links_in_use(self, sources: Columns, destinations: Columns) -> Mask:
        """Tell of columns whether a migration from the one to the other is under way: one row per source."""
        decodes = self.decodes
        in_use = np.zeros((len(self.ids), len(self.ids)), np.bool_)
        moving = decodes.at != decodes.on
        in_use[decodes.on[moving], decodes.at[moving]] = True
        return in_use[:, destinations].take(sources, axis=0)

    def compared(self, terms: Mapping[str, Column]) -> Alternatives:
        """Return the instances with terms of theirs, for the journal."""
        return Alternatives([self.ids[column] for column in self.columns], lambda: terms)


def held(context_tokens: Column, left_tokens: Column, at: Column | float) -> Curves:
    """Return what decodes hold at grid points; the arguments broadcast."""
    tokens = context_tokens + at
    tokens *= at < left_tokens
    return tokens


Kept = TypeVar("Kept")


class LoadBoard(Generic[Kept]):
    """What was made of the last round's snapshot, with who was placed since: what a placement reads without
    asking for every request.

    A system's placement and its controller share one; it starts empty with every run. ``make`` makes it of a
    snapshot and its requests, and it is made anew for a placement once it is older than ``lasts_s``, or where
    other instances take work or are under other labels. Columns are those of the snapshot it was made of,
    where instances that drain have one, too.
    """

    def __init__(self, make: Callable[[Snapshot, RequestRows], Kept], lasts_s: float) -> None:
        self._make = make
        self._lasts_s = lasts_s
        self._kept: Kept | None = None
        self._ids: tuple[str, ...] = ()
        self._labels: Labels | None = None
        self._at_s = -math.inf

    def renewed(self, snapshot: Snapshot, rows: RequestRows) -> Kept:
        """Make it of the snapshot, whose requests are ``rows``, and keep it."""
        kept = self._kept = self._make(snapshot, rows)
        seen = snapshot.without_draining()
        self._ids, self._labels, self._at_s = seen.ids, seen.labels, snapshot.at_s
        return kept

    def latest(self, snapshot: Snapshot) -> Kept:
        """Return what is kept, or make it anew."""
        kept = self._kept
        if kept is None or snapshot.at_s - self._at_s > self._lasts_s or not self._same(snapshot):
            return self.renewed(snapshot, snapshot.requests)
        return kept

    def _same(self, snapshot: Snapshot) -> bool:
        labels, mine = snapshot.labels, self._labels
        if mine is None or (snapshot.ids is not self._ids and snapshot.ids != self._ids):
            return False
        return labels is mine or np.array_equal(labels.decoding_mask, mine.decoding_mask)
