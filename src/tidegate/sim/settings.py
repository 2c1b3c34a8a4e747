"""How a simulation runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo


@dataclass(frozen=True, slots=True)
class SimSettings:
    """How the control plane runs.

    ``front_s`` passes between the dispatch of a leg and its arrival in the engine's queue; ``deadline_s``
    bounds how long a request may be held; ``window_s`` is the tick where no pool control sets one.
    ``leap`` jumps over steps between two changes of a batch; without it every step is an event.
    """

    slo: Slo = field(default_factory=Slo)
    front_s: float = 0.0
    deadline_s: float = 600.0
    window_s: float = 1.0
    leap: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.front_s < float("inf") and self.deadline_s > 0 and self.window_s > 0):
            raise ConfigError("front-end time, deadline and window must be positive numbers of seconds")
