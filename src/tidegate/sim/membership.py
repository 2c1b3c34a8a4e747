"""Which instances are up, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.sim.settings import SimSettings

HEARTBEAT: Final = 0
CONTROL: Final = 1
FILLING: Final = 2
ENDING: Final = 3
MEMBERSHIP: Final = 4
"""What a TICK event is about, in the order in which those of one time are handled: a heartbeat, the control
plane, residents that are added, the run's end, or change number MEMBERSHIP + k of the membership."""


class Change(NamedTuple):
    """Instance number ``instance`` comes up or, with ``up`` false, dies."""

    at_s: float
    instance: int
    up: bool


class FleetSchedule:
    """When instances come up and go, by the settings and by what the control plane starts and stops.

    ``planned`` is how many there are at the start, spares left out; ``starts_s`` is when each comes up, None
    for a spare. Raises ConfigError for an unknown instance, a time that cannot be, a death before the start
    and a fleet of nothing but spares.
    """

    def __init__(self, ids: Sequence[str], settings: SimSettings) -> None:
        self.planned = len(ids) - settings.spares
        if ids and self.planned < 1:
            raise ConfigError(
                f"{settings.spares} of {len(ids)} instances are spares: none is left to start with"
            )
        prefill_s, decode_s = settings.start_delays_s
        self._start_delay_s = {Role.PREFILL: prefill_s, Role.DECODE: decode_s, Role.MIXED: decode_s}
        index = {name: i for i, name in enumerate(ids)}
        for name in [*settings.starts_s, *(name for _, name in [*settings.deaths, *settings.returns])]:
            if name not in index:
                raise ConfigError(
                    f"there is no instance {name!r} to start or die; there are {', '.join(ids)}"
                )
        self.starts_s = [
            settings.starts_s.get(name, 0.0 if i < self.planned else None) for i, name in enumerate(ids)
        ]
        known = [at_s for at_s in self.starts_s if at_s is not None]
        if not all(0 <= at_s < float("inf") for at_s in known):
            raise ConfigError("an instance starts at a finite time of at least 0 s")
        self._spares = [i for i, at_s in enumerate(self.starts_s) if at_s is None]
        self.changes = self._planned_changes(settings, index)
        self._up_since_s: dict[int, float] = {}
        self._up_s = [0.0] * len(ids)

    def _planned_changes(self, settings: SimSettings, index: dict[str, int]) -> list[Change]:
        changes = [Change(at_s, i, True) for i, at_s in enumerate(self.starts_s) if at_s]
        changes += [Change(at_s, index[name], False) for at_s, name in settings.deaths]
        changes += [Change(at_s, index[name], True) for at_s, name in settings.returns]
        changes.sort(key=lambda change: (change.at_s, change.instance))
        up = [at_s == 0.0 for at_s in self.starts_s]
        for at_s, instance, comes_up in changes:
            if not 0 < at_s < float("inf") or up[instance] == comes_up:
                name = next(name for name, number in index.items() if number == instance)
                verb, state = ("return", "up") if comes_up else ("die", "down")
                raise ConfigError(f"instance {name!r} cannot {verb} at {at_s} s: it is {state} then")
            up[instance] = comes_up
        return changes

    def start_spare(self, role: Role, now: float, events: EventQueue) -> bool:
        """Have a spare come up after the start delay of a role; False when there is none."""
        if not self._spares:
            return False
        self.changes.append(Change(now + self._start_delay_s[role], self._spares.pop(0), True))
        events.push(self.changes[-1].at_s, EventKind.TICK, MEMBERSHIP + len(self.changes) - 1)
        return True

    def is_up(self, instance: int) -> bool:
        """Tell whether an instance is up."""
        return instance in self._up_since_s

    def came_up(self, instance: int, now: float) -> None:
        """Take note that an instance is up."""
        self._up_since_s[instance] = now

    def went_down(self, instance: int, now: float, *, spare: bool) -> None:
        """Take note that an instance is down; one that was stopped on purpose is a ``spare`` again."""
        self._up_s[instance] += now - self._up_since_s.pop(instance)
        if spare:
            self._spares.append(instance)

    def up_s(self, instance: int, end_s: float) -> float:
        """Return for how long an instance was up by ``end_s``."""
        since_s = self._up_since_s.get(instance)
        return self._up_s[instance] + (0.0 if since_s is None else end_s - since_s)
