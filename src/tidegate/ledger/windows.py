"""Closing a window: mean inter-token gaps and the average prefill queue (Arrow v2, section 5.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.ledger.records import InstanceEntry
from tidegate.ledger.sheet import SINCE_ROW, LedgerMatrix, WindowRow
from tidegate.ledger.snapshot import Field, Matrix, WindowAverages

NO_WINDOWS: Final[Mapping[str, float]] = MappingProxyType({})
"""No windows beside the ledger's own."""
DEMAND_S = 10.0
"""Time constant of the smoothed prefill demand (ours): longer than a burst, shorter than a change of load."""


def close_windows(sheet: LedgerMatrix, seats: Iterable[InstanceEntry], since: float, now: float) -> Matrix:
    """Publish the window [``since``, ``now``] in the rows that average over one, and open the next.

    An instance that decodes but produced nothing has an empty average, which would make stalling look
    like idling: it publishes its longest open gap (Narwhal). An empty or endless window averages to the
    queue as it stands. Returns the window's own sums: of gaps, of tokens with a gap, and of the queue over
    time.
    """
    matrix = sheet.matrix
    produced = matrix[WindowRow.GAP_TOKENS]
    gaps = matrix[WindowRow.GAP_SUM_S] / np.maximum(produced, 1.0)
    stalled = (produced == 0) & (matrix[Field.DECODE_REQUESTS] > 0)
    if stalled.any():
        for seat in seats:
            if stalled[seat.column]:
                gaps[seat.column] = longest_open_gap(seat, now)
    matrix[Field.MEAN_GAP_S] = gaps

    queue = matrix[Field.PREFILL_QUEUE_S]
    span = now - since
    sums = matrix[[WindowRow.GAP_SUM_S, WindowRow.GAP_TOKENS, WindowRow.QUEUE_INTEGRAL]]
    if 0 < span < math.inf:
        integral = matrix[WindowRow.QUEUE_INTEGRAL] + queue * (now - matrix[WindowRow.QUEUE_SINCE_S])
        sums[2] = integral
        matrix[Field.PREFILL_QUEUE_AVG_S] = integral / span
        weight = -math.expm1(-span / DEMAND_S)
        smoothed = matrix[Field.PREFILL_DEMAND : Field.PREFILL_SQUARES_S + 1]
        smoothed += weight * (
            matrix[WindowRow.PREFILL_WORK_S : WindowRow.PREFILL_WORK_S2 + 1] / span - smoothed
        )
    else:
        matrix[Field.PREFILL_QUEUE_AVG_S] = queue
    matrix[SINCE_ROW] = now
    matrix[SINCE_ROW + 1 :] = 0.0
    return sums


class LongWindows:
    """Windows longer than the ledger's own, by name: each adds up whole windows until its length is reached.

    Raises ConfigError for a length below ``window_s``.
    """

    def __init__(self, window_s: float, lengths_s: Mapping[str, float]) -> None:
        short = sorted(name for name, length_s in lengths_s.items() if length_s < window_s)
        if short:
            raise ConfigError(f"window {short[0]!r} is shorter than the ledger's window of {window_s} s")
        self.averages: dict[str, WindowAverages] = {}
        self._lengths_s = dict(lengths_s)
        self._slack_s = window_s / 2
        self._sums: dict[str, Matrix] = {name: np.zeros((3, 0)) for name in lengths_s}
        self._spans_s = dict.fromkeys(lengths_s, 0.0)
        self._publish(lengths_s)

    def add(self, sums: Matrix, span_s: float) -> None:
        """Take the sums of a window that was ``span_s`` long. One without a length is left out."""
        if not 0 < span_s < math.inf:
            return
        for name, length_s in self._lengths_s.items():
            self._sums[name] += sums
            self._spans_s[name] += span_s
            if self._spans_s[name] >= length_s - self._slack_s:
                self._publish([name])

    def add_column(self) -> None:
        """Take note of a new instance."""
        self._resize(lambda matrix: np.concatenate([matrix, np.zeros((len(matrix), 1))], axis=1))

    def remove_column(self, column: int) -> None:
        """Take note that an instance is gone."""
        self._resize(lambda matrix: np.delete(matrix, column, axis=1))

    def _publish(self, names: Iterable[str]) -> None:
        for name in names:
            gap_s, tokens, queue = self._sums[name]
            self.averages[name] = WindowAverages(
                gap_s / np.maximum(tokens, 1.0), queue / max(self._spans_s[name], 1e-9)
            )
            self._sums[name] = np.zeros_like(self._sums[name])
            self._spans_s[name] = 0.0

    def _resize(self, change: Callable[[Matrix], Matrix]) -> None:
        for name in self._lengths_s:
            self._sums[name] = change(self._sums[name])
            self.averages[name] = WindowAverages(*change(np.array(self.averages[name])))


def longest_open_gap(seat: InstanceEntry, now: float) -> float:
    """Return how long the instance's most neglected decode has waited for its next token.

    A decode whose KV is still being pulled waits for the link, not for this instance.
    """
    return max(
        (now - entry.token_at_s for entry in seat.decodes.values() if entry.source is None), default=0.0
    )
