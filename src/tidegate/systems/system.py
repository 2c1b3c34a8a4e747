"""A system: the policies that decide together, under one name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.policies.admission import admitted
from tidegate.policies.chunks import ChunkBudget
from tidegate.policies.holding import HoldingPlacement
from tidegate.policies.order import FIFO, Order
from tidegate.policies.protocols import (
    Admission,
    Controller,
    DecodePlacement,
    Observer,
    PrefillPlacement,
    ReadBack,
    Signal,
    StartingRoles,
)
from tidegate.policies.reading import read_where_worth


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A declarative composition, which the control plane runs.

    ``controllers`` decide in this order where their periods meet. ``order`` is that of waiting prefills, in
    every engine (``Order.in_engines``) and among the requests that the plane holds. ``chunks`` says how much
    of prompts a step carries beside decodes, where the engine takes that per step; None: the engine's limit.
    ``observers`` hear of answers that ended. ``signals`` are those that the composition uses beyond what its
    parts declare. ``read_back`` is asked where a placement leaves ``Place.read_from`` open; None: it stays
    open. ``admission`` is asked whether a request is taken. ``window_s`` is the length of the ledger's
    window; ``windows`` names longer ones, each a multiple of it (``Snapshot.windows``). Raises ConfigError
    for a window or a period that cannot be, and for two controllers of one name.
    """

    name: str
    summary: str
    roles: StartingRoles
    prefill: PrefillPlacement
    decode: DecodePlacement
    controllers: tuple[Controller[Any], ...] = ()
    order: Order = FIFO
    chunks: ChunkBudget | None = None
    observers: tuple[Observer, ...] = ()
    signals: frozenset[Signal] = frozenset()
    read_back: ReadBack | None = read_where_worth
    admission: Admission = admitted
    window_s: float = 1.0
    windows: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [controller.name for controller in self.controllers]
        if len(set(names)) < len(names):
            raise ConfigError(f"system {self.name!r}: two controllers have one name: {', '.join(names)}")
        for what, seconds in [
            ("the window", self.window_s),
            *((f"window {name!r}", length) for name, length in self.windows.items()),
            *((f"controller {each.name!r}", each.period_s) for each in self.controllers),
        ]:
            if not 0 < seconds < float("inf"):
                raise ConfigError(
                    f"system {self.name!r}: {what} needs a positive number of seconds, not {seconds}"
                )

    def ordered(self, order: Order, name: str) -> System:
        """Return the system with another order, and the admission that goes with any; where the plane keeps
        it, prompts are held for it."""
        prefill = HoldingPlacement(self.prefill) if order.held else self.prefill
        return replace(self, name=name, order=order, prefill=prefill, admission=admitted)

    @property
    def needs(self) -> frozenset[Signal]:
        """The union of its parts' needs, and its own."""
        parts = (self.prefill, self.decode, *self.controllers)
        return self.signals.union(*(part.needs for part in parts))

    def check_signals(self, given: Collection[Signal]) -> None:
        """Raise ConfigError when the system needs a signal that is not ``given`` in this deployment."""
        missing = sorted(self.needs.difference(given))
        if missing:
            have = ", ".join(sorted(given)) or "none"
            raise ConfigError(
                f"system {self.name!r} needs the signals {', '.join(missing)}; this deployment has: {have}"
            )
