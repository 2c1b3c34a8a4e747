"""What happens next: a total order of events in virtual time."""

from __future__ import annotations

import heapq
import math
from typing import Final


class Kind:
    """What an event is about. Of several at one time the lower kind comes first.

    STEP_END precedes whatever its end may cause, and STEP_START follows everything, so that a step sees
    all that has happened by its start. What a step's start causes comes later, if only by a moment.
    Plain numbers: comparing those of an enum costs several times as much.
    """

    STEP_END: Final = 0
    LINK: Final = 1
    LINK_ENTRY: Final = 2
    LEASE: Final = 3
    ARRIVAL: Final = 4
    LEG: Final = 5
    TICK: Final = 6
    STEP_START: Final = 7


Event = tuple[float, int, int, int]
"""(time, kind, whose, version). ``whose`` numbers an instance, a link or a request, as the kind says: of two
events of one kind at one time the lower number comes first, whoever was announced first. ``version`` tells
an event that still counts from one that was called off."""


class EventQueue:
    """The events to come. ``last_start`` is when, and of which instance, a step was started last."""

    def __init__(self) -> None:
        self.last_start = (-math.inf, -1)
        self._heap: list[Event] = []

    def none_at(self, now: float) -> bool:
        """Tell whether nothing more is to happen at ``now``."""
        return not self._heap or self._heap[0][0] > now

    def next_s(self) -> float | None:
        """Return when the next event is due; None when none is to come."""
        return self._heap[0][0] if self._heap else None

    def push(self, at_s: float, kind: int, whose: int, version: int = 0) -> None:
        """Announce an event."""
        heapq.heappush(self._heap, (at_s, kind, whose, version))

    def pop(self) -> Event:
        """Take the next event."""
        return heapq.heappop(self._heap)
