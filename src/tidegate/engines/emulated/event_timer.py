"""Events of the simulated data plane, each handled when the wall clock reaches its time."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from tidegate.core.clock import Clock, WallClock
from tidegate.dataplane.events import Event, EventQueue

log = logging.getLogger(__name__)

LATE_S = 0.05
"""Lag from which on the figures of an emulation mislead (ours: a tenth of a usual TTFT target)."""
WARN_EVERY_S = 10.0
_SPAN_S = 5.0
_TICK_S = 0.001
"""Event loops time their callbacks in milliseconds."""


class Lag:
    """How late events were handled. ``worst_s`` covers the last 5 to 10 seconds."""

    def __init__(self) -> None:
        self._spans = [0.0, 0.0]
        self._turned_s = 0.0
        self._warned_s = -math.inf

    def note(self, lag_s: float, now: float) -> None:
        """Take note of an event handled ``lag_s`` late; warn when it is too late."""
        self._turn(now)
        self._spans[0] = max(self._spans[0], lag_s)
        if lag_s > LATE_S and now - self._warned_s >= WARN_EVERY_S:
            self._warned_s = now
            log.warning(
                "the emulation is %.0f ms behind the wall clock: this machine has not the CPU for this many "
                "instances at this load, and latencies read too high",
                lag_s * 1e3,
            )

    def worst_s(self, now: float) -> float:
        """Return the largest lag of late."""
        self._turn(now)
        return max(self._spans)

    def _turn(self, now: float) -> None:
        if now - self._turned_s >= _SPAN_S:
            fresh = now - self._turned_s < 2 * _SPAN_S
            self._spans = [0.0, self._spans[0] if fresh else 0.0]
            self._turned_s = now


class EventTimer:
    """Hands due events to ``handle``, in order. Time begins at 0 when it is made. An event keeps its own time
    however late it is handled, so that lateness does not add up. After every turn ``flush`` is called."""

    def __init__(
        self,
        events: EventQueue,
        handle: Callable[[Event], None],
        flush: Callable[[], None],
        clock: Clock | None = None,
    ) -> None:
        self.lag = Lag()
        self._events = events
        self._handle = handle
        self._flush = flush
        self._clock = clock or WallClock()
        self._began_s = self._clock.now()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf

    def now(self) -> float:
        """Return the emulation's time."""
        return self._clock.now() - self._began_s

    def catch_up(self) -> float:
        """Handle what is due and return the time."""
        now = self.now()
        due_s = self._events.next_s()
        if due_s is not None and due_s <= now:
            self.lag.note(now - due_s, now)
            while due_s is not None and due_s <= now:
                self._handle(self._events.pop())
                due_s = self._events.next_s()
            self._flush()
        return now

    def arm(self) -> None:
        """Have the next event handled in time. Call it after whatever may have brought one forward."""
        due_s = self._events.next_s()
        if due_s is None or due_s >= self._timer_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        wait_s = math.ceil((due_s - self.now()) / _TICK_S) * _TICK_S
        self._timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._run)
        self._timer_s = due_s

    def stop(self) -> None:
        """Handle nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = -math.inf

    def _run(self) -> None:
        self._timer, self._timer_s = None, math.inf
        try:
            self.catch_up()
        finally:
            self.arm()
