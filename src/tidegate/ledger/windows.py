"""Closing a window: mean inter-token gaps and the average prefill queue (Arrow v2, section 5.5)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tidegate.ledger.records import Seat
from tidegate.ledger.sheet import Sheet, Window
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
    gaps = np.divide(matrix[Window.GAP_SUM_S], produced, out=np.zeros_like(produced), where=produced > 0)
    stalled = (produced == 0) & (matrix[Field.DECODE_REQUESTS] > 0)
    if stalled.any():
        for seat in seats:
            if stalled[seat.column]:
                gaps[seat.column] = longest_open_gap(seat, now)
    matrix[Field.MEAN_GAP_S] = gaps

    queue = matrix[Field.PREFILL_QUEUE_S]
    span = now - since
    if 0 < span < np.inf:
        integral = matrix[Window.QUEUE_INTEGRAL] + queue * (now - matrix[Window.QUEUE_SINCE_S])
        matrix[Field.PREFILL_QUEUE_AVG_S] = integral / span
    else:
        matrix[Field.PREFILL_QUEUE_AVG_S] = queue
    if 0 < span < np.inf:
        weight = -np.expm1(-span / DEMAND_S)
        for smoothed, gathered in (
            (Field.PREFILL_DEMAND, Window.PREFILL_WORK_S),
            (Field.PREFILL_SQUARES_S, Window.PREFILL_WORK_S2),
        ):
            matrix[smoothed] += weight * (matrix[gathered] / span - matrix[smoothed])
    matrix[Window.PREFILL_WORK_S] = 0.0
    matrix[Window.PREFILL_WORK_S2] = 0.0
    matrix[Window.QUEUE_INTEGRAL] = 0.0
    matrix[Window.QUEUE_SINCE_S] = now
    matrix[Window.GAP_SUM_S] = 0.0
    matrix[Window.GAP_TOKENS] = 0.0


def longest_open_gap(seat: Seat, now: float) -> float:
    """Return how long the instance's most neglected decode has waited for its next token.

    A decode whose KV is still being pulled waits for the link, not for this instance.
    """
    return max(
        (now - entry.token_at_s for entry in seat.decodes.values() if entry.source is None), default=0.0
    )
