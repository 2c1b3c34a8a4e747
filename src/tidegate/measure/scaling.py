"""What was done to a fleet: instances added, drained and relabelled, and how much of it was taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

REVERSED_S = 600.0
"""An action that another undoes within this time was no use (ours): twenty times what a start takes."""


class ScalingEvent(NamedTuple):
    """By how many instances each label's number changed, or will once an instance has started.

    ``kind`` is flip, add or drain; to call a drain off is to add.
    """

    at_s: float
    kind: str
    prefill: int
    decode: int


def reversals(events: Sequence[ScalingEvent], within_s: float = REVERSED_S) -> int:
    """Return how many actions undo one that came at most ``within_s`` before, each of those once."""
    open_events: list[ScalingEvent] = []
    count = 0
    for event in events:
        open_events = [before for before in open_events if event.at_s - before.at_s <= within_s]
        for before in reversed(open_events):
            if (before.prefill, before.decode) == (-event.prefill, -event.decode):
                open_events.remove(before)
                count += 1
                break
        else:
            open_events.append(event)
    return count
