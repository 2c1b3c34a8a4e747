"""The time in which the event loop ran: others are judged by it, who go unheard while it does not."""

from __future__ import annotations

import asyncio
from typing import NamedTuple
from weakref import WeakKeyDictionary

TICK_S = 0.1
"""Pause between two looks at the clock (ours): after a longer one the loop did not run meanwhile."""
UNSEEN_S = 3 * TICK_S
"""Lost time that may be nothing but the distance between looks."""


class LoopMark(NamedTuple):
    """A moment: by the clock, and in time that the loop ran."""

    at_s: float
    ran_s: float


class LoopTime:
    """Counts the seconds in which an event loop ran, to about ``TICK_S``. A pause of the loop, be it busy or
    the whole process stopped, adds at most ``2 * TICK_S``."""

    def __init__(self) -> None:
        self.ran_s = 0.0
        self._looked_s = asyncio.get_running_loop().time()
        self._look()

    @staticmethod
    def here() -> LoopTime:
        """Return the one of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in _known:
            _known[loop] = LoopTime()
        return _known[loop]

    def mark(self) -> LoopMark:
        """Return this moment."""
        return LoopMark(asyncio.get_running_loop().time(), self.ran_s)

    def lost_s(self, since: LoopMark) -> float:
        """Return the seconds since a moment in which the loop did not run; 0.0 when they are few."""
        now = self.mark()
        lost_s = now.at_s - since.at_s - (now.ran_s - since.ran_s)
        return lost_s if lost_s > UNSEEN_S else 0.0

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self.ran_s += min(now_s - self._looked_s, 2 * TICK_S)
        self._looked_s = now_s
        loop.call_later(TICK_S, self._look)


_known: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopTime] = WeakKeyDictionary()
