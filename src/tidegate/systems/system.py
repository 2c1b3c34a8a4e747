"""A system: the policies that decide together, under one name."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.policies.order import Fifo, Order
from tidegate.policies.seams import DecodePlacement, PoolControl, PrefillPlacement, Signal, StartingRoles


@dataclass(frozen=True, slots=True)
class System:
    """A declarative composition. Drivers (gateway, simulator) call its parts and act on the verdicts.

    ``pool`` is None where labels never change. ``order`` is that of waiting prefills, in every engine and in
    what the driver itself holds back.
    """

    name: str
    summary: str
    roles: StartingRoles
    prefill: PrefillPlacement
    decode: DecodePlacement
    pool: PoolControl | None = None
    order: Order = field(default_factory=Fifo)

    @property
    def needs(self) -> frozenset[Signal]:
        """The union of its policies' needs."""
        pool = self.pool.needs if self.pool else frozenset()
        return self.prefill.needs | self.decode.needs | pool
