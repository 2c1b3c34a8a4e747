"""``hidden``: what engines predict from their model's hidden states, and the histogram where they do not.

ARES (arXiv 2510.13668): a small network on the last layer's hidden state of the newest token, every so many
tokens. Between two predictions what is left goes down by one per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tidegate.core.prediction import Prediction
from tidegate.core.request import Request
from tidegate.signals.lengths.histogram import HistogramLengths
from tidegate.signals.lengths.source import Floats, Integers, LengthSource, Remaining, limit, limits
from tidegate.signals.lengths.survival import HIGH, LOW, MOST_TOKENS

NONE = (0.0, math.nan)
"""The report of a request that has none."""
OCTAVES = MOST_TOKENS.bit_length() + 1
RATIO_EDGES = np.linspace(-6.0, 6.0, 97)
"""Bins of log2(true / predicted)."""
PRIOR_PREDICTIONS = 20.0
"""What the prior counts for (ours)."""
FADING = 0.9995
"""What an older answer counts for beside the next one of its octave: half after 1,400 (ours)."""


class ReportSpread:
    """Learns how far truths lie from predictions, by octave of the tokens at which those were made.

    Before it knows better, 0.1 and 0.9 of the truths lie at a third and at three times the prediction.
    """

    def __init__(self) -> None:
        middles = (RATIO_EDGES[:-1] + RATIO_EDGES[1:]) / 2.0
        bell = np.exp(-0.5 * (middles / (math.log2(3.0) / 1.2816)) ** 2)
        self._counts = np.tile(PRIOR_PREDICTIONS * bell / bell.sum(), (OCTAVES, 1))
        self._learnt = self._derived = 0
        self._factors = np.empty((OCTAVES, 2))
        self._derive()

    def learn(self, reports: Sequence[tuple[float, float]], generated: int) -> None:
        """Take note of what was predicted, at which token, of an answer that had ``generated`` in the end."""
        at, predicted = np.array(reports, np.float64).reshape(-1, 2).T
        ratio = np.log2((np.maximum(generated - at, 0.0) + 1.0) / (predicted + 1.0))
        bins = np.clip(RATIO_EDGES.searchsorted(ratio, side="right") - 1, 0, len(RATIO_EDGES) - 2)
        octaves = _octaves(at)
        self._counts[octaves] *= FADING
        np.add.at(self._counts, (octaves, bins), 1.0)
        self._learnt += 1
        if self._learnt > self._derived * 1.02:
            self._derive()

    def factors(self, at_token: Floats) -> Floats:
        """Return, in two columns, by what to multiply predictions for their 0.1 and 0.9 quantile."""
        found: Floats = self._factors[_octaves(at_token)]
        return found

    def _derive(self) -> None:
        self._derived = self._learnt
        for octave, counts in enumerate(self._counts):
            shares = np.concatenate(([0.0], counts.cumsum()))
            self._factors[octave] = 2.0 ** np.interp((LOW, HIGH), shares / shares[-1], RATIO_EDGES)


def _octaves(tokens: Floats) -> Integers:
    return np.minimum(np.frexp(tokens)[1], OCTAVES - 1).astype(np.int64)


class HiddenLengths(LengthSource):
    """Takes predictions from engines, each until the next one of its request; others are the histogram's.

    A prediction goes down with every token, to no less than 1, and to no more than the request may still
    generate. The request is the histogram's where none came yet; where one is used up, for it was too short
    and the next one has not come (behind the head's horizon none does); and where the newest one was no
    number, negative, or beyond any context, which is dropped and counted in ``absurd``. The quantiles follow
    from how far earlier predictions of requests that were as far were off.
    """

    name = "hidden"

    def __init__(self) -> None:
        self.histogram = HistogramLengths()
        self.absurd = 0
        self._spread = ReportSpread()
        self._last: dict[str, tuple[float, float]] = {}
        self._first: dict[str, list[tuple[float, float]]] = {}

    def reported(self, request_id: str, at_token: int, remaining: float) -> None:
        """See ``LengthSource.reported``. ``at_token`` counts all tokens of the answer so far."""
        if not 0.0 <= remaining <= MOST_TOKENS or at_token < 0:  # which no NaN is
            self.absurd += 1
            self._last.pop(request_id, None)
            return
        self._last[request_id] = (float(at_token), remaining)
        first = self._first.setdefault(request_id, [])
        if not first or at_token.bit_length() > int(first[-1][0]).bit_length():
            first.append((float(at_token), remaining))

    def remaining(self, request: Request, generated: int) -> Prediction:
        """See ``LengthSource.remaining``."""
        reports = self.reports((request,), np.array((generated,)))
        found = self._expected(reports, np.array((generated,)), np.array((limit(request, generated),)))
        mean, low, high = (float(each[0]) for each in found)
        if math.isnan(mean):
            return self.histogram.remaining(request, generated)
        return Prediction(mean, low, high, int(reports[0, 0]), self.name)

    def remaining_many(self, requests: Sequence[Request], generated: Integers) -> Remaining:
        """See ``LengthSource.remaining_many``."""
        reports = self.reports(requests, generated)
        mean, low, high = self._expected(reports, generated, limits(requests, generated))
        unknown = np.flatnonzero(np.isnan(mean))
        if len(unknown):
            others = [requests[at] for at in unknown.tolist()]
            mean[unknown], low[unknown], high[unknown] = self.histogram.remaining_many(
                others, generated[unknown]
            )
        return mean, low, high

    def tokens(self, requests: Sequence[Request], generated: Integers, now: float) -> None:
        """See ``LengthSource.tokens``."""
        self.histogram.tokens(requests, generated, now)

    def finished(self, request: Request, generated: int, now: float) -> None:
        """See ``LengthSource.finished``."""
        first = self.first_reports(request, generated)
        if first:
            self._spread.learn(first, generated)
        self._forget(request.id)
        self.histogram.finished(request, generated, now)

    def aborted(self, request: Request, generated: int, now: float) -> None:
        """See ``LengthSource.aborted``."""
        self._forget(request.id)
        self.histogram.aborted(request, generated, now)

    def reports(self, requests: Sequence[Request], generated: Integers) -> Floats:
        """Return the last report of each request: at which token, and what was to come; NaN without one."""
        last = self._last
        found = [last.get(request.id, NONE) for request in requests]
        return np.array(found, np.float64).reshape(-1, 2)

    def first_reports(self, request: Request, generated: int) -> Sequence[tuple[float, float]]:
        """Return the first report of a request in every octave of tokens."""
        return self._first.get(request.id, ())

    def _expected(self, reports: Floats, generated: Integers, most: Floats) -> Remaining:
        """Return what reports say now; NaN where there is none, or it is used up."""
        at, predicted = reports.T
        left = predicted - np.maximum(generated - at, 0.0)
        mean = np.where(left < 0.0, np.nan, np.maximum(left, 1.0))
        low, high = self._spread.factors(at).T
        return (
            np.minimum(mean, most),
            np.clip(mean * low, 1.0, most),
            np.clip(mean * high, 1.0, most),
        )

    def _forget(self, request_id: str) -> None:
        self._last.pop(request_id, None)
        self._first.pop(request_id, None)
