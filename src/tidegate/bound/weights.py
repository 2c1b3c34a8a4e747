"""Weights on time under which a trace cannot be served: where in it the bound of ``limit`` binds.

A weighting gives every price list a weight per window of time. What a request's work is worth is then its
worth under each list times the least weight in the time that the request leaves for it, summed over the
lists; what the fleet can earn is its weights times the windows' lengths. ``attainable`` sorts the requests by
worth and counts how many fit: no schedule attains more. ``worst_weights`` is the linear program that looks
for weights under which few do; nothing but tightness rests on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array

from tidegate.bound.demand import ROUNDING, Demand
from tidegate.core.slo import Slo
from tidegate.costs.forms import Values

Indices = NDArray[np.int64]
_BUCKETS = np.array([0.5, 0.7, 0.8, 0.85, 0.9, 0.95])
"""Quantiles of worth between which the program takes the requests of one window together."""
_TAIL = np.cumsum(1.3 ** np.arange(16))
"""Ends of the windows after the last arrival, up to a factor."""


_SPANS = [1]
while _SPANS[-1] < 2 * len(_TAIL) + 256:
    _SPANS.append(max(_SPANS[-1] + 1, round(1.1 * _SPANS[-1])))
"""Numbers of windows over which the program knows the least weight; each is at most twice the one before."""


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Real time cut into windows, and those that each request touches.

    A request's prefill lies in the windows ``first`` to ``prefill_last``, its decodes in ``first`` to
    ``answer_last``, if it attains.
    """

    lengths_s: Values
    first: Indices
    prefill_last: Indices
    answer_last: Indices


@dataclass(frozen=True, slots=True, eq=False)
class Worth:
    """What the prefill and the answer of each request (rows) are worth under each price list (columns)."""

    prefill: Values
    answer: Values


def windows_of(demand: Demand, scale: float, slo: Slo, count: int) -> Windows:
    """Cut the trace, ``scale`` times as fast, into ``count`` equal windows and longer ones after it.

    The number of windows does not depend on ``scale``.
    """
    arrival = (demand.arrival_s - demand.arrival_s[0]) / scale
    prefill_end = (arrival + slo.ttft_s) * (1.0 + ROUNDING)
    answer_end = prefill_end + slo.tpot_s * demand.decodes * (1.0 + ROUNDING)
    span, end = float(arrival[-1]), float(answer_end.max())
    tail = span + (end - span) * _TAIL / _TAIL[-1]
    edges = np.concatenate([np.linspace(0.0, span, count + 1), tail])
    last = len(edges) - 2

    def window(at_s: Values) -> Indices:
        return np.clip(np.searchsorted(edges, at_s, side="right") - 1, 0, last).astype(np.int64)

    return Windows(
        np.diff(edges), window(arrival * (1.0 - ROUNDING)), window(prefill_end), window(answer_end)
    )


def attainable(worth: Worth, windows: Windows, weights: Values, hopeless: int) -> float:
    """Return the largest share of the requests, ``hopeless`` more included, that any schedule attains.

    ``weights`` has a row per price list and a column per window, none negative.
    """
    requests = len(windows.first)
    total = np.zeros(requests)
    for index, row in enumerate(weights):
        if row.any():
            least = _LeastIn(row)
            total += worth.prefill[:, index] * least(windows.first, windows.prefill_last)
            total += worth.answer[:, index] * least(windows.first, windows.answer_last)
    income = float((weights @ windows.lengths_s).sum()) * (1.0 + ROUNDING)
    spent = np.cumsum(np.sort(total))
    return float(np.searchsorted(spent, income, side="right")) / (requests + hopeless)


def worst_weights(worth: Worth, windows: Windows) -> Values | None:
    """Return weights under which about the fewest requests fit; None when the program has no answer.

    It minimises income plus, for every class of requests, what its worth lacks to one each. A class is what
    arrives in one window, has equal spans and similar worth.
    """
    n_lists, n_windows = worth.prefill.shape[1], len(windows.lengths_s)
    classes = _Classes.of(worth, windows)
    requests, length_s = len(windows.first), float(windows.lengths_s.sum())
    # Columns: for each list, span and window the least weight from there on (span 1: the weight); then lacks.
    most = max(classes.prefill_span.max(), classes.answer_span.max())
    spans = np.array([span for span in _SPANS if span <= most])
    block = len(spans) * n_windows
    n_classes = len(classes.count)
    lacks = n_lists * block + np.arange(n_classes)
    rows = _Rows()
    for index in range(n_lists):
        for level in range(1, len(spans)):
            _least_rows(rows, index * block + level * n_windows, n_windows, spans[level] - spans[level - 1])
    n_least = rows.count
    rows.open(n_classes)
    per_request = requests / length_s / classes.count
    work = ((classes.prefill_span, classes.prefill), (classes.answer_span, classes.answer))
    for span, amounts in work:
        column = np.searchsorted(spans, span) * n_windows + classes.first
        for index in range(n_lists):
            rows.add(index * block + column, -amounts[:, index] * per_request)
    rows.add(lacks, -np.ones(n_classes))
    aim = np.zeros(n_lists * block + n_classes)
    for index in range(n_lists):
        aim[index * block : index * block + n_windows] = windows.lengths_s / length_s
    aim[lacks] = classes.count / requests
    bound = np.concatenate([np.zeros(n_least), -np.ones(n_classes)])
    solved = linprog(aim, A_ub=rows.matrix(len(aim)), b_ub=bound, method="highs-ds")
    if solved.x is None:
        return None
    found = solved.x[: n_lists * block].reshape(n_lists, len(spans), n_windows)[:, 0, :]
    weights: Values = np.maximum(found, 0.0) * (requests / length_s)
    return weights


class _Rows:
    """Rows ``A x <= b`` of a sparse program, gathered block by block."""

    def __init__(self) -> None:
        self.count = 0
        self._open = np.zeros(0, dtype=np.int64)
        self._parts: list[tuple[Indices, Indices, Values]] = []

    def open(self, count: int) -> None:
        """Begin ``count`` rows."""
        self._open = self.count + np.arange(count)
        self.count += count

    def add(self, columns: Indices, values: Values) -> None:
        """Put one entry into every row of the block."""
        self._parts.append((self._open, columns, values))

    def matrix(self, width: int) -> csr_array:
        """Return the rows with ``width`` columns; entries of one place add up."""
        rows, columns, values = (np.concatenate([part[i] for part in self._parts]) for i in range(3))
        return coo_array((values, (rows, columns)), shape=(self.count, width)).tocsr()


def _least_rows(rows: _Rows, first_column: int, n_windows: int, shift: int) -> None:
    """Bound the least weight over a span by that over the span before it, from both of its ends."""
    start = np.arange(n_windows)
    for moved in (0, shift):
        rows.open(n_windows)
        rows.add(first_column + start, np.ones(n_windows))
        rows.add(first_column - n_windows + np.minimum(start + moved, n_windows - 1), -np.ones(n_windows))


@dataclass(frozen=True, slots=True, eq=False)
class _Classes:
    count: Values
    first: Indices
    prefill_span: Indices
    answer_span: Indices
    prefill: Values
    answer: Values

    @classmethod
    def of(cls, worth: Worth, windows: Windows) -> _Classes:
        """Group the requests by arrival window, spans (rounded up) and worth."""
        total = worth.prefill.mean(axis=1) + worth.answer.mean(axis=1)
        bucket = np.searchsorted(np.quantile(total, _BUCKETS), total)
        n_windows = len(windows.lengths_s)
        prefill = _span(windows.prefill_last - windows.first + 1, n_windows)
        answer = _span(windows.answer_last - windows.first + 1, n_windows)
        key = ((windows.first * 1024 + prefill) * 1024 + answer) * 32 + bucket
        _, sample, member = np.unique(key, return_index=True, return_inverse=True)
        size = len(sample)

        def summed(values: Values) -> Values:
            return np.column_stack([np.bincount(member, column, size) for column in values.T])

        return cls(
            np.bincount(member, minlength=size).astype(np.float64),
            windows.first[sample],
            prefill[sample],
            answer[sample],
            summed(worth.prefill),
            summed(worth.answer),
        )


def _span(windows: Indices, most: int) -> Indices:
    allowed = np.array(_SPANS)
    return allowed[np.minimum(np.searchsorted(allowed, np.minimum(windows, most)), len(allowed) - 1)]


class _LeastIn:
    """Answers for the least of an array between two indices, both included, by a sparse table."""

    def __init__(self, values: Values) -> None:
        self._table = [values]
        step = 1
        while 2 * step <= len(values):
            above = self._table[-1]
            self._table.append(np.minimum(above[:-step], above[step:]))
            step *= 2

    def __call__(self, first: Indices, last: Indices) -> Values:
        level = np.log2(last - first + 1).astype(np.int64)
        answer = np.empty(len(first))
        for depth, row in enumerate(self._table):
            here = level == depth
            answer[here] = np.minimum(row[first[here]], row[last[here] - (1 << depth) + 1])
        return answer
