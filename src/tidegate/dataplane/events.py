"""What happens next: a total order of events in virtual time."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Final


class EventKind:
    """What an event is about. Of several at one time the lower kind comes first.

    STEP_END precedes whatever its end may cause, and STEP_START follows everything, so that a step sees
    all that has happened by its start. What a step's start causes comes later, if only by a moment.
    Plain numbers: comparing those of an enum costs several times as much.
    """

    STEP_END: Final = 0
    LINK: Final = 1
    LEASE: Final = 2
    STALL: Final = 3
    ARRIVAL: Final = 4
    LEG: Final = 5
    TICK: Final = 6
    STEP_START: Final = 7


Event = tuple[float, int, int, int]
"""(time, kind, whose, version). ``whose`` numbers an instance, a link or a request, as the kind says: of two
events of one kind at one time the lower number comes first, whoever was announced first. ``version`` tells
an event that still counts from one that was called off."""


class EventQueue:
    """The events to come.

    ``heap`` holds all but the starts of steps. Those are of the present only: ``starting`` is a heap of the
    instances that start a step at ``starting_s``, once nothing else is left at that time. A step was started
    last at ``last_start_s``, of instance ``last_started``.
    """

    def __init__(self) -> None:
        self.heap: list[Event] = []
        self.starting: list[int] = []
        self.starting_s = -math.inf
        self.last_start_s = -math.inf
        self.last_started = -1

    def next_s(self) -> float | None:
        """Return when the next event is due; None when none is to come."""
        if self.starting:
            return self.starting_s
        return self.heap[0][0] if self.heap else None

    def push(self, at_s: float, kind: int, whose: int, version: int = 0) -> None:
        """Announce an event that is no start of a step."""
        heappush(self.heap, (at_s, kind, whose, version))

    def start(self, instance: int, now: float) -> None:
        """Have an instance start a step after all else that happens at ``now``."""
        heappush(self.starting, instance)
        self.starting_s = now

    def pop(self) -> Event:
        """Take the next event."""
        heap = self.heap
        if self.starting and not (heap and heap[0][0] <= self.starting_s):
            return self.starting_s, EventKind.STEP_START, heappop(self.starting), 0
        return heappop(heap)
