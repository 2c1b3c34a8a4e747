"""Survival curves of answer lengths, from counts: how long what has come so far still goes on.

A curve is a hazard per bin of lengths: of the answers that came to the bin, the share that ended in it
(Kaplan and Meier, 1958). An answer that is still running counts in every bin that it has come to, so that
long ones are not missing while they run.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tidegate.costs.forms import greater, lesser
from tidegate.signals.lengths.source import Floats, Integers

BINS_PER_OCTAVE = 8
MOST_TOKENS = 2**20
"""No answer is longer (ours)."""
EDGES: Final[Floats] = np.unique(np.ceil(2.0 ** (np.arange(20 * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)))
"""Bin k holds the lengths from ``EDGES[k]`` up to, but not with, ``EDGES[k + 1]``."""
WIDTHS: Final[Floats] = np.diff(EDGES)
BINS: Final = len(WIDTHS)
_EDGES: Final[list[float]] = EDGES.tolist()
PRIOR_TOKENS = 256.0
LOW, HIGH = 0.1, 0.9

Rows = NDArray[np.intp]
Numbers = Any


def bins_of(lengths: Floats | Integers) -> Integers:
    """Return the bin of every length; those beyond the last edge are in the last bin, 0 is in the first."""
    return np.clip(np.searchsorted(EDGES, lengths, side="right") - 1, 0, BINS - 1)


def bin_of(length: float) -> int:
    """Return the bin of one length, as ``bins_of`` does."""
    return max(0, min(bisect_right(_EDGES, length) - 1, BINS - 1))


class Counts:
    """Counts of answers by bin, in rows: ``at_risk`` came to a bin, ``ended`` ended in it, and ``ended_sum``
    are their lengths. They are weights, not numbers: what came later may count for more."""

    def __init__(self, rows: int) -> None:
        self.at_risk: Floats = np.zeros((rows, BINS))
        self.ended: Floats = np.zeros((rows, BINS))
        self.ended_sum: Floats = np.zeros((rows, BINS))

    def came(self, row: int, first: int, end: int, weight: float) -> None:
        """Count an answer that came to the bins from ``first`` up to, but not with, ``end``."""
        self.at_risk[row, first:end] += weight

    def end(self, row: int, bin_: int, length: int, weight: float) -> None:
        """Count an answer, which had come to the bin, as ended in it."""
        self.ended[row, bin_] += weight
        self.ended_sum[row, bin_] += weight * length

    def scale(self, factor: float) -> None:
        """Multiply every weight."""
        for each in (self.at_risk, self.ended, self.ended_sum):
            each *= factor

    def clear(self, row: int) -> None:
        """Forget a row."""
        for each in (self.at_risk, self.ended, self.ended_sum):
            each[row] = 0.0


class Curves:
    """Rows of hazards, with what follows from them: what is left, given how much has come.

    ``hazard`` is the share of the answers in a bin that end there, ``mean_end`` their mean length.
    """

    def __init__(self, rows: int) -> None:
        self.hazard: Floats = np.tile(prior_hazard(), (rows, 1))
        self.mean_end: Floats = np.tile(_middles(), (rows, 1))
        self._survival: Floats = np.ones((rows, BINS + 1))
        self._area: Floats = np.zeros((rows, BINS + 1))
        self._low: Floats = np.zeros((rows, BINS + 1))
        self._high: Floats = np.zeros((rows, BINS + 1))
        self.derive(np.arange(rows))

    def fit(self, rows: Rows, counts: Counts, parent: Rows | None, prior_weight: float) -> None:
        """Take the hazards of ``counts``, each with the parent's (or the prior's) as ``prior_weight`` more
        answers. Call ``derive`` afterwards."""
        hazard = prior_hazard() if parent is None else self.hazard[parent]
        mean_end = _middles() if parent is None else self.mean_end[parent]
        ended = counts.ended[rows] + prior_weight * hazard
        self.hazard[rows] = ended / (counts.at_risk[rows] + prior_weight)
        self.mean_end[rows] = (counts.ended_sum[rows] + prior_weight * hazard * mean_end) / ended

    def inherit(self, row: int, parent: int) -> None:
        """Begin with the curve of the larger group."""
        for table in (
            self.hazard, self.mean_end, self._survival, self._area, self._low, self._high
        ):  # fmt: skip
            table[row] = table[parent]

    def derive(self, rows: Rows) -> None:
        """Work out survival, areas and quantiles of rows whose hazards have changed."""
        hazard, mean_end = self.hazard[rows], self.mean_end[rows]
        count = len(hazard)
        survival = np.ones((count, BINS + 1))
        np.cumprod(1.0 - hazard, axis=1, out=survival[:, 1:])
        np.maximum(survival, 1e-300, out=survival)
        slices = survival[:, :-1] * (hazard * (mean_end - EDGES[:-1]) + (1.0 - hazard) * WIDTHS)
        area = np.zeros((count, BINS + 1))
        area[:, :-1] = slices[:, ::-1].cumsum(axis=1)[:, ::-1]
        self._survival[rows], self._area[rows] = survival, area
        self._low[rows] = _lengths_at(survival, 1.0 - LOW)
        self._high[rows] = _lengths_at(survival, 1.0 - HIGH)

    def remaining(self, row: Numbers, generated: Numbers, limit: Numbers) -> tuple[Any, Any, Any]:
        """Return what is left of an answer that has ``generated`` tokens and may get ``limit`` more, or of
        many given as arrays: mean, 0.1 and 0.9 quantile.

        The mean is that of what is left or the limit, whichever is less.
        """
        done = lesser(generated, MOST_TOKENS - 1.0)
        at, part = _place(done + 1.0)  # what goes on has at least one more token
        end_at, end_part = _place(lesser(done + limit, MOST_TOKENS))
        first = row * (BINS + 1)
        here, end = first + at, first + end_at
        area = _between(self._area, here, part) - _between(self._area, end, end_part)
        mean = 1.0 + area / _between(self._survival, here, part)
        low = _between(self._low, here, part) - done
        high = _between(self._high, here, part) - done
        return _within(mean, limit), _within(low, limit), _within(high, limit)


def prior_hazard() -> Floats:
    """Return the hazards from nothing (ours): every second answer is longer than ``PRIOR_TOKENS``, and one
    that is far beyond has even odds to double."""
    beyond = EDGES - 1.0 + PRIOR_TOKENS
    hazard: Floats = 1.0 - beyond[:-1] / beyond[1:]
    return hazard


def _middles() -> Floats:
    return (EDGES[:-1] + EDGES[1:] - 1.0) / 2.0


def _place(lengths: Numbers) -> tuple[Any, Any]:
    """Return the bin of every length, and how far in it is, from 0 to 1."""
    if isinstance(lengths, float):
        at = bin_of(lengths)
        return at, (lengths - _EDGES[at]) / (_EDGES[at + 1] - _EDGES[at])
    places = bins_of(lengths)
    return places, (lengths - EDGES[places]) / WIDTHS[places]


def _between(table: Floats, first: Any, part: Any) -> Any:
    flat = table.reshape(-1)
    here = flat[first]
    return here + part * (flat[first + 1] - here)


def _within(value: Any, limit: Numbers) -> Any:
    return greater(lesser(value, limit), 1.0)


def _lengths_at(survival: Floats, share: float) -> Floats:
    """Return, for every edge, the length that a share of those who came to the edge still reach."""
    count = len(survival)
    falls = -np.log(survival)
    # One sorted line of all rows, so that one search serves them all.
    apart = float(falls.max() - np.log(share)) + 1.0
    offsets = np.arange(count)[:, None] * apart
    wanted = falls - np.log(share)
    at = np.searchsorted((falls + offsets).ravel(), (wanted + offsets).ravel()).reshape(survival.shape)
    at = np.clip(at - np.arange(count)[:, None] * (BINS + 1), 1, BINS)
    before = np.take_along_axis(falls, at - 1, axis=1)
    step = np.take_along_axis(falls, at, axis=1) - before
    part = np.clip(np.divide(wanted - before, step, out=np.ones_like(step), where=step > 0), 0.0, 1.0)
    lengths: Floats = EDGES[at - 1] + part * WIDTHS[at - 1]
    return lengths
