"""When the ledger's window closes and when each controller decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tidegate.policies.protocols import Controller
from tidegate.systems.system import System


class Period:
    """Ends at whole multiples of its length after the start, so that no error adds up."""

    __slots__ = ("_count", "_length_s", "_start_s", "next_s")

    def __init__(self, length_s: float) -> None:
        self._length_s = length_s
        self.next_s = float("inf")

    def start(self, now: float) -> None:
        self._start_s = now
        self._count = 1
        self.next_s = now + self._length_s

    def due(self, now: float) -> bool:
        """Tell whether a period has ended by ``now``; all that have ended count as one."""
        if now < self.next_s:
            return False
        self._count = max(self._count + 1, int((now - self._start_s) / self._length_s))
        while self._start_s + self._count * self._length_s <= now:
            self._count += 1
        self.next_s = self._start_s + self._count * self._length_s
        return True


class Periods:
    """The clocks of one system: its window's, and one per controller; ``states`` has theirs by name, and
    ``reasons`` what each said last of its decision."""

    def __init__(self, system: System) -> None:
        self.window = Period(system.window_s)
        self._controllers: list[tuple[Controller[Any], Period]] = [
            (controller, Period(controller.period_s)) for controller in system.controllers
        ]
        self.states: dict[str, Any] = {each.name: each.initial() for each in system.controllers}
        self.reasons: dict[str, str] = {}

    def start(self, now: float) -> float:
        """Begin all periods; return when the first one ends."""
        for period in (self.window, *(period for _, period in self._controllers)):
            period.start(now)
        return self.next_s

    @property
    def next_s(self) -> float:
        """When the next period ends."""
        return min([self.window.next_s, *(period.next_s for _, period in self._controllers)])

    def news(self, name: str, reason: str) -> bool:
        """Tell whether a controller says something else of its decision than it said last."""
        known, self.reasons[name] = self.reasons.get(name), reason
        return known != reason

    def due(self, now: float) -> Iterator[tuple[Controller[Any], Any]]:
        """Yield each controller that decides now, with its state, and begin its next period."""
        for controller, period in self._controllers:
            if period.due(now):
                yield controller, self.states[controller.name]
