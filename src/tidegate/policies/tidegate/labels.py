"""Which instances prefill only, decode only, or do both: what the arithmetic of the traffic says (ours)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tidegate.core.decision import ControlDecision, Flip
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Column, Snapshot
from tidegate.policies.protocols import Signal
from tidegate.policies.starting_roles import TARGET
from tidegate.policies.tidegate.shape import FluidFleet, RecentLengths, Shape


@dataclass(frozen=True, slots=True)
class ShapeConstants:
    """All ours. Labels change where that gains the share ``gain`` of what the fleet serves, and where
    ``agreeing`` plans in a row say so; of shapes within ``even`` of the best it is that with most instances
    that do both, for bursts are met by whoever is free. Lengths are believed from ``fewest`` answers on. Up
    to ``units`` steps of a fleet are compared.
    """

    gain: float = 0.05
    even: float = 0.02
    agreeing: int = 2
    fewest: int = 32
    units: int = 32
    period_s: float = 2.0


class ShapeState(NamedTuple):
    """The shape that the newest plans wanted, and how many of them in a row."""

    wanted: Shape | None = None
    times: int = 0


@dataclass(frozen=True, slots=True)
class FleetShape:
    """Once per period compares what the fleet serves as it is labelled with what it would serve otherwise."""

    lengths: RecentLengths
    slo: Slo
    constants: ShapeConstants = field(default_factory=ShapeConstants)
    name: str = "shape"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    @property
    def period_s(self) -> float:
        return self.constants.period_s

    def initial(self) -> ShapeState:
        """Return the state for the first decision."""
        return ShapeState()

    def decide(self, snapshot: Snapshot, state: ShapeState) -> ControlDecision[ShapeState]:
        """Return the flips towards a better shape; none while plans do not agree on one."""
        constants, fleet = self.constants, snapshot.without_draining()
        demand = self.lengths.demand()
        if demand is None or self.lengths.answered < constants.fewest:
            return ControlDecision(state, reason="too few answers to know their lengths")
        if len(fleet) < 2:
            return ControlDecision(state, reason="one instance does both")
        kv_tokens = float(fleet.kv_capacity_tokens[0]) or np.inf
        model = FluidFleet(
            fleet.costs.at(0), kv_tokens, float(fleet.kv_bytes_per_token[0]), demand, self.slo
        )
        have = _shape_of(fleet)
        now_rps = float(model.rates_rps(*np.array([have.counts], np.float64).T)[0])
        ranked = model.best(len(fleet), max(1, len(fleet) // constants.units))
        best_rps = ranked[0][0]
        near = [pair for pair in ranked if pair[0] >= best_rps * (1.0 - constants.even)]
        rps, best = max(near, key=lambda pair: (pair[1].mixed, pair[0]))
        told = f"{have} serve {now_rps:.3g} requests/s, {best} would serve {rps:.3g}"
        if best == have or rps < now_rps * (1.0 + constants.gain):
            return ControlDecision(ShapeState(), reason=told)
        times = state.times + 1 if best == state.wanted else 1
        if times < constants.agreeing:
            return ControlDecision(ShapeState(best, times), reason=f"{told}: once more")
        return ControlDecision(ShapeState(), tuple(flips_to(fleet, best, told)), told)


def _shape_of(fleet: Snapshot) -> Shape:
    prefill, decode = (int(np.count_nonzero(fleet.labelled(role))) for role in (Role.PREFILL, Role.DECODE))
    return Shape(prefill, decode, len(fleet) - prefill - decode)


def flips_to(fleet: Snapshot, shape: Shape, why: str) -> list[Flip]:
    """Return the flips after which the fleet has ``shape``, as far as its instances are flippable.

    Those with most to decode become or stay those that decode, those with least those that prefill.
    """
    held: Column = fleet.decode_tokens + fleet.handoff_tokens
    leaning = np.array([{Role.PREFILL: -1.0, Role.DECODE: 1.0}.get(Role(int(role)), 0.0) for role in fleet.role])
    order = np.lexsort((-held, -leaning))
    wanted = {
        **dict.fromkeys(order[: shape.decode].tolist(), Role.DECODE),
        **dict.fromkeys(order[len(order) - shape.prefill :].tolist(), Role.PREFILL),
    }
    flips = []
    for at in order.tolist():
        role = wanted.get(at, Role.MIXED)
        if fleet.flippable[at] and fleet.role[at] != float(role):
            flips.append(Flip(fleet.ids[at], role, TARGET, why))
    return flips
