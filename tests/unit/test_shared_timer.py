"""One timer for many things."""

from __future__ import annotations

import asyncio
import time

from tidegate.protocol.shared_timer import SharedTimer


class Thing:
    """Notes when it is looked at; due again after each of ``pauses_s``."""

    def __init__(self, *pauses_s: float) -> None:
        self.looked_s: list[float] = []
        self.over = asyncio.Event()
        self._pauses_s = list(pauses_s)

    def due(self, now_s: float) -> float | None:
        self.looked_s.append(now_s)
        if self._pauses_s:
            return now_s + self._pauses_s.pop(0)
        self.over.set()
        return None


async def test_things_are_looked_at_when_due_and_never_before() -> None:
    timer: SharedTimer[Thing] = SharedTimer()
    began_s = time.monotonic()
    late, soon, again = Thing(), Thing(), Thing(0.02, 0.02)
    timer.add(late, began_s + 0.2)
    timer.add(soon, began_s + 0.01)
    timer.add(again, began_s)
    await asyncio.gather(*(thing.over.wait() for thing in (late, soon, again)))
    assert late.looked_s[0] >= began_s + 0.2
    assert began_s + 0.01 <= soon.looked_s[0] < late.looked_s[0]
    assert len(again.looked_s) == 3
    assert timer.things == []


async def test_what_is_discarded_is_not_looked_at() -> None:
    timer: SharedTimer[Thing] = SharedTimer()
    gone, last = Thing(), Thing()
    timer.add(gone, time.monotonic() + 0.01)
    timer.add(last, time.monotonic() + 0.02)
    timer.discard(gone)
    await last.over.wait()
    assert gone.looked_s == []
