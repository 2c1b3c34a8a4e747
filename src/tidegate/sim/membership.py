"""Which instances are up, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.core.errors import ConfigError
from tidegate.sim.settings import SimSettings

ALWAYS = float("inf")


@dataclass(frozen=True, slots=True)
class Change:
    """Instance number ``instance`` comes up or, with ``up`` false, dies."""

    at_s: float
    instance: int
    up: bool


class Membership:
    """When every instance comes up and dies, from the settings.

    Raises ConfigError for an unknown instance, a time that cannot be, and a death before the start.
    """

    def __init__(self, ids: Sequence[str], settings: SimSettings) -> None:
        index = {name: i for i, name in enumerate(ids)}
        for name in [*settings.starts_s, *(name for _, name in settings.deaths)]:
            if name not in index:
                raise ConfigError(
                    f"there is no instance {name!r} to start or die; there are {', '.join(ids)}"
                )
        self.starts_s = [settings.starts_s.get(name, 0.0) for name in ids]
        self.deaths_s = [ALWAYS] * len(ids)
        for at_s, name in settings.deaths:
            i = index[name]
            if self.deaths_s[i] != ALWAYS or not self.starts_s[i] < at_s < ALWAYS:
                raise ConfigError(
                    f"instance {name!r} can die once, after its start at {self.starts_s[i]} s; got {at_s} s"
                )
            self.deaths_s[i] = at_s
        if not all(0 <= at_s < ALWAYS for at_s in self.starts_s):
            raise ConfigError("an instance starts at a finite time of at least 0 s")
        late = [Change(at_s, i, True) for i, at_s in enumerate(self.starts_s) if at_s > 0]
        dead = [Change(at_s, i, False) for i, at_s in enumerate(self.deaths_s) if at_s != ALWAYS]
        self.changes = sorted([*late, *dead], key=lambda change: (change.at_s, change.instance))

    def up_s(self, instance: int, end_s: float) -> float:
        """Return for how long an instance was up by ``end_s``."""
        return max(0.0, min(self.deaths_s[instance], end_s) - self.starts_s[instance])
