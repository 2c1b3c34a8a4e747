"""When a decode that moves in stages pauses: one rule for the embedded engine and the simulated one.

After Llumnix (OSDI 2024, section 4.2): stages copy what is there while the decode goes on, and it pauses for
what little is left.
"""

from __future__ import annotations

LAST_STAGE_BLOCKS = 2
"""With at most so many blocks left to copy the decode pauses. Ours."""
MOST_STAGES = 3
"""Stages beside the decode; each is shorter than the one before where copying is faster than decoding."""


def is_last_stage(left_tokens: int, stages: int, block_tokens: int) -> bool:
    """Tell whether the decode is to pause while its last ``left_tokens`` are copied, after ``stages`` copies
    beside it."""
    return left_tokens <= LAST_STAGE_BLOCKS * block_tokens or stages >= MOST_STAGES
