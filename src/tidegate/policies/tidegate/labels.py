"""Which instances prefill only, decode only, or do both: what the arithmetic of the traffic says (ours)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tidegate.core.decision import ControlDecision, Flip
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Column, Snapshot
from tidegate.policies.protocols import Signal
from tidegate.policies.starting_roles import TARGET
from tidegate.policies.tidegate.shape import FleetLabels, FluidFleet, MeanRequest, RecentLengths


@dataclass(frozen=True, slots=True)
class ShapeConstants:
    """All ours. Labels change where that gains the share ``gain`` of what the fleet serves, and where
    ``agreeing`` plans in a row say so; of shapes within ``even`` of the best it is that with most instances
    that do both, for bursts are met by whoever is free. A plan moves the share ``step`` of the fleet at most:
    lengths are known late. Lengths are believed from ``fewest`` answers on. Up to ``units`` steps of a fleet
    are compared. Where decodes take more than ``crowded`` of their TPOT target or of the KV, half of those
    for prefill do both at once: that is the emergency.
    """

    gain: float = 0.07
    even: float = 0.02
    agreeing: int = 2
    step: float = 0.125
    fewest: int = 32
    units: int = 32
    crowded: float = 0.95
    period_s: float = 2.0


@dataclass(frozen=True, slots=True)
class FleetShape:
    """Once per period compares what the fleet serves as it is labelled with what it would serve otherwise.

    Two labels suffice: an instance that only decodes would leave prompts of a burst to fewer, and one that
    does both is one as soon as nothing is sent to it. The state counts the newest plans in a row that wanted
    more prefill instances (negative: fewer).
    """

    lengths: RecentLengths
    slo: Slo
    constants: ShapeConstants = field(default_factory=ShapeConstants)
    name: str = "shape"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    @property
    def period_s(self) -> float:
        return self.constants.period_s

    def initial(self) -> int:
        """Return the state for the first decision."""
        return 0

    def decide(self, snapshot: Snapshot, state: int) -> ControlDecision[int]:
        """Return the flips towards a better shape; none while plans do not agree on one."""
        constants, fleet = self.constants, snapshot.without_draining()
        prefill = int(np.count_nonzero(fleet.labelled(Role.PREFILL)))
        if prefill and (share := self._crowding(fleet)) > constants.crowded:
            why = f"decodes take {share:.0%} of what they may: fewer instances prefill only"
            return ControlDecision(0, tuple(flips_to(fleet, prefill // 2, why)), why)
        rows = snapshot.requests
        running = float(rows.answer_tokens[rows.decode_on >= 0].sum())
        demand = self.lengths.demand(running)
        if demand is None or self.lengths.answered < constants.fewest or len(fleet) < 2:
            return ControlDecision(0, reason="too little is known of the traffic, or one instance does both")
        have, told, best = self._compared(fleet, demand, prefill)
        if best == have:
            return ControlDecision(0, reason=told)
        direction = 1 if best.prefill > prefill else -1
        count = state + direction if state * direction > 0 else direction
        if abs(count) < constants.agreeing:
            return ControlDecision(count, reason=f"{told}: once more")
        most = max(1, int(constants.step * len(fleet)))
        goal = min(best.prefill, prefill + most) if direction > 0 else best.prefill
        return ControlDecision(count, tuple(flips_to(fleet, goal, told)), told)

    def _compared(
        self, fleet: Snapshot, demand: MeanRequest, prefill: int
    ) -> tuple[FleetLabels, str, FleetLabels]:
        """Return the shape that the fleet has, a sentence, and the shape to have: the same unless that gains
        enough."""
        constants, count = self.constants, len(fleet)
        kv_tokens = float(fleet.kv_capacity_tokens[0]) or np.inf
        token_bytes = float(fleet.kv_bytes_per_token[0])
        model = FluidFleet(fleet.costs.at(0), kv_tokens, token_bytes, demand, self.slo)
        ranked = model.ranked(count, max(1, count // constants.units))
        have = FleetLabels(prefill, count - prefill)
        counts = np.array([have, FleetLabels(0, count)], np.float64).T
        now_rps, both_rps = map(float, model.rates_rps(*counts))
        near = [pair for pair in ranked if pair[0] >= ranked[0][0] * (1.0 - constants.even)]
        rps, best = max(near, key=lambda pair: pair[1].mixed)
        told = f"{have} serve {now_rps:.3g} requests/s, {best} would serve {rps:.3g}"
        if rps < both_rps * (1.0 + constants.gain):
            # What the split gains over a fleet that does both is less than what bursts may cost it.
            told, best = f"{told}, all for both {both_rps:.3g}", FleetLabels(0, count)
            return have, told, best if both_rps >= now_rps else have
        return have, told, best

    def _crowding(self, fleet: Snapshot) -> float:
        """Return the mean share of the TPOT target, or of the KV, that decodes take where they may run."""
        at = fleet.labels.decoding_mask
        step_s = np.asarray(fleet.costs.step.seconds(fleet.decode_requests, fleet.decode_tokens))[at]
        capacity = np.where(fleet.kv_capacity_tokens > 0, fleet.kv_capacity_tokens, np.inf)[at]
        held = (fleet.decode_tokens + fleet.handoff_tokens)[at] / capacity
        return float(max((step_s / self.slo.tpot_s).mean(), held.mean())) if at.any() else 1.0


def flips_to(fleet: Snapshot, prefill: int, why: str) -> list[Flip]:
    """Return the flips after which ``prefill`` instances prefill only and the others do both, as far as they
    are flippable. Those with the least to decode prefill; those that do keep their label before others."""
    held: Column = fleet.decode_tokens + fleet.handoff_tokens
    order = np.lexsort((held, ~fleet.labelled(Role.PREFILL))).tolist()
    roles = {at: Role.PREFILL if place < prefill else Role.MIXED for place, at in enumerate(order)}
    return [
        Flip(fleet.ids[at], role, TARGET, why)
        for at, role in roles.items()
        if fleet.flippable[at] and fleet.role[at] != float(role)
    ]
