"""Closing a window: mean inter-token gaps and the average prefill queue (Arrow v2, section 5.5), and longer
windows that move along (AMPD, section 4.3)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.matrix import LedgerMatrix, WindowRow
from tidegate.ledger.records import InstanceEntry
from tidegate.ledger.snapshot import Field, Matrix, WindowAverages

GRID_S = 2.0**-30
"""Predicted prefill times are rounded to this step (about a nanosecond; ours), so that their sums are
exact in floating point, return to zero, and can be compared for equality. Times of tokens are rounded down to
it: a window's gaps have one sum, however many steps were told of at once. A shorter window is empty: rates of
what falls into it would have no bound."""
SLOWNESS_S = 5.0
"""Time constant of the slowness, in seconds with a prefill (ours): that of a queue that begins to hurt."""
DEMAND_S = 10.0
"""Time constant of the smoothed prefill demand (ours): longer than a burst, shorter than a change of load."""
DECODES = slice(Field.DECODE_REQUESTS, Field.DECODE_TOKENS + 1)
"""How many decodes there are, and what they hold."""
SUMS = slice(WindowRow.QUEUE_INTEGRAL, WindowRow.TTFT_COUNT + 1)
"""A window's sums: of the queue over time, of gaps and the tokens with one, of TTFTs and first tokens."""


def close_windows(
    matrix: LedgerMatrix,
    instances: Iterable[InstanceEntry],
    costs: ProfileTable,
    since: float,
    now: float,
) -> Matrix:
    """Publish the window [``since``, ``now``] in the rows that average over one, and open the next.

    ``costs`` has the profiles by which work is predicted.

    An instance that decodes but produced nothing has an empty average, which would make stalling look
    like idling: it publishes its longest open gap (Narwhal). An empty or endless window averages to the
    queue as it stands. Returns the window's own sums, ``SUMS``.
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
    sums = array[SUMS].copy()
    if GRID_S <= span < math.inf:
        since_s = now - array[WindowRow.QUEUE_SINCE_S]
        sums[0] += queue * since_s
        array[WindowRow.PREFILL_BUSY_S] += np.where(queue > 0, since_s, 0.0)
        _note_slowness(array)
        _note_work(array, costs, span)
        for instance in instances:
            if instance.foreign_requests or instance.foreign_held_tokens:
                # What others have there takes time, too, and nobody says how much of it.
                array[Field.BUSY_S : Field.WORK_S + 1, instance.column] = 0.0
        array[Field.PREFILL_QUEUE_AVG_S] = sums[0] / span
        weight = -math.expm1(-span / DEMAND_S)
        smoothed = array[Field.PREFILL_DEMAND : Field.PREFILL_SQUARES_S + 1]
        work = array[WindowRow.PREFILL_WORK_S : WindowRow.PREFILL_WORK_S2 + 1]
        smoothed += weight * (work / span - smoothed)
    else:
        array[Field.PREFILL_QUEUE_AVG_S] = queue
        array[Field.BUSY_S : Field.WORK_S + 1] = 0.0
    array[WindowRow.FIRST_DECODES : WindowRow.FIRST_DECODE_TOKENS + 1] = array[DECODES]
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


def _note_work(array: Matrix, costs: ProfileTable, span_s: float) -> None:
    """Publish how long each instance was busy in the window, and what its profile predicts for what it did.

    The sum of the gaps between tokens over the time says how many decodes there were on average, the mean gap
    how many steps. An instance that decodes at both ends of the window is taken to have done so all the time,
    one that does not at one of them for as long as the gaps say, beside prefills or before or after them.
    What is sure is only as long as the gaps say, with the most decodes that were there at an end.
    """
    first, now = array[WindowRow.FIRST_DECODES], array[Field.DECODE_REQUESTS]
    gap_s, gap_tokens = array[WindowRow.GAP_SUM_S], array[WindowRow.GAP_TOKENS]
    always = (first > 0) & (now > 0) & (gap_tokens > 0)
    most = np.maximum(np.maximum(first, now), 1.0)
    surely_s = np.minimum(gap_s / most, span_s)
    decoding_s = np.where(always, span_s, surely_s)
    batch = np.maximum(gap_s / np.maximum(decoding_s, GRID_S), 1.0)
    held = array[WindowRow.FIRST_DECODE_TOKENS] + array[Field.DECODE_TOKENS]
    context = batch * held / np.maximum(first + now, 1.0)
    steps_s = gap_tokens / batch * np.asarray(costs.step.seconds(batch, context))
    prefill_s = array[WindowRow.PREFILL_BUSY_S]
    array[Field.BUSY_S] = busy_s = np.minimum(prefill_s + decoding_s, span_s)
    array[Field.IDLE_S] = busy_s - np.maximum(prefill_s, surely_s)
    array[Field.WORK_S] = array[WindowRow.PREFILL_ENDED_S] + steps_s


class LongWindows:
    """Windows longer than the ledger's own, by name: the newest whole windows that fill its length, and the
    open one.

    Raises ConfigError for a length below ``window_s``.
    """

    def __init__(self, window_s: float, lengths_s: Mapping[str, float]) -> None:
        short = sorted(name for name, length_s in lengths_s.items() if length_s < window_s)
        if short:
            raise ConfigError(f"window {short[0]!r} is shorter than the ledger's window of {window_s} s")
        self._counts = {name: round(length_s / window_s) for name, length_s in lengths_s.items()}
        self._closed: deque[tuple[float, Matrix]] = deque(maxlen=max(self._counts.values(), default=0))
        self._totals: dict[str, tuple[float, Matrix]] = {}

    def add(self, sums: Matrix, span_s: float) -> None:
        """Take the sums of a window that was ``span_s`` long. One without a length is left out."""
        if self._counts and 0 < span_s < math.inf:
            self._closed.append((span_s, sums))
            self._totals = {}

    def averages(self, open_sums: Matrix, columns: Sequence[int] | None) -> dict[str, WindowAverages]:
        """Return what each window has measured, on the instances in ``columns`` (None: on all).

        ``open_sums`` are ``SUMS`` of the ledger's window that is open; a queue's average is without it.
        """
        found = {}
        for name, count in self._counts.items():
            total = self._totals.get(name)
            if total is None:
                newest = list(self._closed)[-count:]
                spans_s = sum(span_s for span_s, _ in newest)
                sums = np.sum([sums for _, sums in newest], axis=0) if newest else 0.0 * open_sums
                total = self._totals[name] = spans_s, sums
            spans_s, closed = total
            _, gap_s, gap_tokens, ttft_s, ttft_count = closed + open_sums
            rows = (
                gap_s / np.maximum(gap_tokens, 1.0),
                closed[0] / max(spans_s, 1e-9),
                ttft_s / np.maximum(ttft_count, 1.0),
            )
            found[name] = WindowAverages(*(rows if columns is None else (row[columns] for row in rows)))
        return found

    def add_column(self) -> None:
        """Take note of a new instance."""
        self._change(lambda sums: np.pad(sums, ((0, 0), (0, 1))))

    def remove_column(self, column: int) -> None:
        """Take note that an instance is gone."""
        self._change(lambda sums: np.delete(sums, column, axis=1))

    def _change(self, columns: Callable[[Matrix], Matrix]) -> None:
        changed = [(span_s, columns(sums)) for span_s, sums in self._closed]
        self._closed.clear()
        self._closed.extend(changed)
        self._totals = {}


def longest_open_gap(instance: InstanceEntry, now: float) -> float:
    """Return how long the instance's most neglected decode has waited for its next token.

    A decode whose KV is still being pulled waits for the link, not for this instance.
    """
    decodes = instance.decodes.values()
    return max((now - entry.token_at_s for entry in decodes if entry.source is None), default=0.0)
