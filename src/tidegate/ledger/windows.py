"""Closing a window: mean inter-token gaps and the average prefill queue (Arrow v2, section 5.5)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tidegate.ledger.records import Seat
from tidegate.ledger.sheet import SINCE_ROW, Sheet, Window
from tidegate.ledger.snapshot import Field

DEMAND_S = 10.0
"""Time constant of the smoothed prefill demand (ours): longer than a burst, shorter than a change of load."""


def close_windows(sheet: Sheet, seats: Iterable[Seat], since: float, now: float) -> None:
    """Publish the window [``since``, ``now``] in the rows that average over one, and open the next.

    An instance that decodes but produced nothing has an empty average, which would make stalling look
    like idling: it publishes its longest open gap (Narwhal). An empty or endless window averages to the
    queue as it stands.
    """
    matrix = sheet.matrix
    produced = matrix[Window.GAP_TOKENS]
    gaps = matrix[Window.GAP_SUM_S] / np.maximum(produced, 1.0)
    stalled = (produced == 0) & (matrix[Field.DECODE_REQUESTS] > 0)
    if stalled.any():
        for seat in seats:
            if stalled[seat.column]:
                gaps[seat.column] = longest_open_gap(seat, now)
    matrix[Field.MEAN_GAP_S] = gaps

    queue = matrix[Field.PREFILL_QUEUE_S]
    span = now - since
    if 0 < span < math.inf:
        integral = matrix[Window.QUEUE_INTEGRAL] + queue * (now - matrix[Window.QUEUE_SINCE_S])
        matrix[Field.PREFILL_QUEUE_AVG_S] = integral / span
        weight = -math.expm1(-span / DEMAND_S)
        smoothed = matrix[Field.PREFILL_DEMAND : Field.PREFILL_SQUARES_S + 1]
        smoothed += weight * (matrix[Window.PREFILL_WORK_S : Window.PREFILL_WORK_S2 + 1] / span - smoothed)
    else:
        matrix[Field.PREFILL_QUEUE_AVG_S] = queue
    matrix[SINCE_ROW] = now
    matrix[SINCE_ROW + 1 :] = 0.0


def longest_open_gap(seat: Seat, now: float) -> float:
    """Return how long the instance's most neglected decode has waited for its next token.

    A decode whose KV is still being pulled waits for the link, not for this instance.
    """
    return max(
        (now - entry.token_at_s for entry in seat.decodes.values() if entry.source is None), default=0.0
    )
