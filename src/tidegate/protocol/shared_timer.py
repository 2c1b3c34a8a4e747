"""One timer for many things that are due some time, most of which end before they are."""

from __future__ import annotations

import asyncio
import time
from typing import Generic, Protocol, TypeVar

GRAIN_S = 0.05
"""How late something may be looked at (ours)."""


class Due(Protocol):
    """Something with a time at which it is to be looked at."""

    def due(self, now_s: float) -> float | None:
        """Do what is due; return when to look again, None for never."""


Thing = TypeVar("Thing", bound=Due)


class SharedTimer(Generic[Thing]):
    """Calls ``due`` of each thing at its time on ``time.monotonic``, or up to ``GRAIN_S`` later.

    A timer of the event loop for each thing, made and cancelled, costs ten times as much.
    """

    def __init__(self) -> None:
        self._due_s: dict[Thing, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next_s = 0.0

    def add(self, thing: Thing, at_s: float) -> None:
        """Look at a thing at ``at_s``, and at no other time that was said before."""
        self._due_s[thing] = at_s
        if self._timer is None or at_s < self._next_s:
            self._look_at(at_s)

    def discard(self, thing: Thing) -> None:
        """Look at a thing no more."""
        self._due_s.pop(thing, None)

    @property
    def things(self) -> list[Thing]:
        """What is to be looked at."""
        return list(self._due_s)

    def _look_at(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next_s = at_s
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at_s - time.monotonic()), self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for thing in [thing for thing, at_s in self._due_s.items() if at_s <= now_s]:
            if thing not in self._due_s:
                continue
            again_s = thing.due(now_s)
            if again_s is None:
                self._due_s.pop(thing, None)
            elif thing in self._due_s:
                self._due_s[thing] = again_s
        if self._due_s:
            self._look_at(max(min(self._due_s.values()), now_s + GRAIN_S))
