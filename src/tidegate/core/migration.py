"""When a decode that moves in stages pauses: one rule for the embedded engine and the simulated one.
What a move cost.

After Llumnix (OSDI 2024, section 4.2): stages copy what is there while the decode goes on, and it pauses for
what little is left.
"""

from __future__ import annotations

from typing import NamedTuple

LAST_STAGE_BLOCKS = 2
"""With at most so many blocks left to copy the decode pauses. Ours."""
MOST_STAGES = 3
"""Stages beside the decode; each is shorter than the one before where copying is faster than decoding."""


class MigrationCost(NamedTuple):
    """What a migration copied, in how many ``stages`` (0: nobody counted), and how long its client waited."""

    moved_bytes: int = 0
    stages: int = 0
    pause_s: float | None = None


FREE = MigrationCost()


def is_last_stage(left_tokens: int, stages: int, block_tokens: int) -> bool:
    """Tell whether the decode is to pause while its last ``left_tokens`` are copied, after ``stages`` copies
    beside it."""
    return left_tokens <= LAST_STAGE_BLOCKS * block_tokens or stages >= MOST_STAGES
