"""Closing a window: mean inter-token gaps and the average prefill queue (Arrow v2, section 5.5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.ledger.matrix import LedgerMatrix, WindowRow
from tidegate.ledger.records import InstanceEntry
from tidegate.ledger.snapshot import Field, Matrix, WindowAverages

SLOWNESS_S = 5.0
"""Time constant of the slowness, in seconds with a prefill (ours): that of a queue that begins to hurt."""
DEMAND_S = 10.0
"""Time constant of the smoothed prefill demand (ours): longer than a burst, shorter than a change of load."""


def close_windows(
    matrix: LedgerMatrix, instances: Iterable[InstanceEntry], since: float, now: float
) -> Matrix:
    """Publish the window [``since``, ``now``] in the rows that average over one, and open the next.

    An instance that decodes but produced nothing has an empty average, which would make stalling look
    like idling: it publishes its longest open gap (Narwhal). An empty or endless window averages to the
    queue as it stands. Returns the window's own sums: of gaps, of tokens with a gap, and of the queue over
    time.
    """
    array = matrix.array
    produced = array[WindowRow.GAP_TOKENS]
    gaps = array[WindowRow.GAP_SUM_S] / np.maximum(produced, 1.0)
    stalled = (produced == 0) & (array[Field.DECODE_REQUESTS] > 0)
    if stalled.any():
        for instance in instances:
            if stalled[instance.column]:
                gaps[instance.column] = longest_open_gap(instance, now)
    array[Field.MEAN_GAP_S] = gaps

    queue = array[Field.PREFILL_QUEUE_S]
    span = now - since
    sums = array[[WindowRow.GAP_SUM_S, WindowRow.GAP_TOKENS, WindowRow.QUEUE_INTEGRAL]]
    if 0 < span < math.inf:
        since_s = now - array[WindowRow.QUEUE_SINCE_S]
        sums[2] += queue * since_s
        array[WindowRow.PREFILL_BUSY_S] += np.where(queue > 0, since_s, 0.0)
        _note_slowness(array)
        array[Field.PREFILL_QUEUE_AVG_S] = sums[2] / span
        weight = -math.expm1(-span / DEMAND_S)
        smoothed = array[Field.PREFILL_DEMAND : Field.PREFILL_SQUARES_S + 1]
        work = array[WindowRow.PREFILL_WORK_S : WindowRow.PREFILL_WORK_S2 + 1]
        smoothed += weight * (work / span - smoothed)
    else:
        array[Field.PREFILL_QUEUE_AVG_S] = queue
    array[WindowRow.QUEUE_SINCE_S] = now
    array[WindowRow.QUEUE_INTEGRAL : WindowRow.LATELY_BUSY_S] = 0.0
    return sums


def _note_slowness(array: Matrix) -> None:
    """Publish how long prefills took of late, the window that ends included, over what was predicted."""
    window = array[WindowRow.PREFILL_BUSY_S : WindowRow.PREFILL_ENDED_S + 1]
    lately = array[WindowRow.LATELY_BUSY_S : WindowRow.LATELY_ENDED_S + 1]
    lately *= np.exp(-window[0] / SLOWNESS_S)
    lately += window
    known = lately[1] > 0
    np.divide(lately[0], lately[1], out=array[Field.PREFILL_SLOWNESS], where=known)


class LongWindows:
    """Windows longer than the ledger's own, by name: each adds up whole windows until its length is reached.

    Raises ConfigError for a length below ``window_s``.
    """

    def __init__(self, window_s: float, lengths_s: Mapping[str, float]) -> None:
        short = sorted(name for name, length_s in lengths_s.items() if length_s < window_s)
        if short:
            raise ConfigError(f"window {short[0]!r} is shorter than the ledger's window of {window_s} s")
        self._lengths_s = dict(lengths_s)
        self._slack_s = window_s / 2
        self._spans_s = dict.fromkeys(lengths_s, 0.0)
        self._rows = {name: np.zeros((5, 0)) for name in lengths_s}
        """Three rows of sums, as ``close_windows`` returns them, and the two averages published last."""

    def add(self, sums: Matrix, span_s: float) -> None:
        """Take the sums of a window that was ``span_s`` long. One without a length is left out."""
        if not 0 < span_s < math.inf:
            return
        for name, length_s in self._lengths_s.items():
            rows = self._rows[name]
            rows[:3] += sums
            self._spans_s[name] += span_s
            if self._spans_s[name] >= length_s - self._slack_s:
                rows[3] = rows[0] / np.maximum(rows[1], 1.0)
                rows[4] = rows[2] / self._spans_s[name]
                rows[:3] = 0.0
                self._spans_s[name] = 0.0

    def averages(self, columns: Sequence[int]) -> dict[str, WindowAverages]:
        """Return what each window measured when it ended last, on the instances in ``columns``."""
        return {name: WindowAverages(*rows[3:, columns]) for name, rows in self._rows.items()}

    def add_column(self) -> None:
        """Take note of a new instance."""
        self._rows = {name: np.pad(rows, ((0, 0), (0, 1))) for name, rows in self._rows.items()}

    def remove_column(self, column: int) -> None:
        """Take note that an instance is gone."""
        self._rows = {name: np.delete(rows, column, axis=1) for name, rows in self._rows.items()}


def longest_open_gap(instance: InstanceEntry, now: float) -> float:
    """Return how long the instance's most neglected decode has waited for its next token.

    A decode whose KV is still being pulled waits for the link, not for this instance.
    """
    decodes = instance.decodes.values()
    return max((now - entry.token_at_s for entry in decodes if entry.source is None), default=0.0)
