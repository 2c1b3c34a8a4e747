"""Refilling a pool whose members died (ours: the paper has no failures)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from tidegate.core.decision import ControlDecision, Flip, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.arrow.published import flip, verdict_on_flipped
from tidegate.policies.protocols import Controller, DecodePlacement, PrefillPlacement, Signal

S = TypeVar("S")


class Placements(PrefillPlacement, DecodePlacement, Protocol):
    """Places both halves of a request."""


def repair(snapshot: Snapshot) -> Flip | None:
    """Return the flip that refills an empty pool, or None when none is empty or no flip is legal.

    It ignores loads and the cooldown. A fleet whose other pool has a single instance is left alone: placement
    falls back to that instance for both phases.
    """
    if not len(snapshot.labels.prefilling):
        return flip(snapshot, Role.PREFILL, "repair")
    if not len(snapshot.labels.decoding):
        return flip(snapshot, Role.DECODE, "repair")
    return None


@dataclass(frozen=True, slots=True)
class RepairingPlacement:
    """Refills the pool of the half that is placed, and places there; else lets ``placement`` decide."""

    placement: Placements

    @property
    def needs(self) -> frozenset[Signal]:
        return self.placement.needs

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        if not len(snapshot.labels.prefilling):
            flipped = repair(snapshot)
            if flipped is not None:
                return verdict_on_flipped(flipped, None, "no prefill instance was left")
        return self.placement.place_prefill(request, snapshot)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        if not len(snapshot.labels.decoding):
            flipped = repair(snapshot)
            if flipped is not None:
                return verdict_on_flipped(flipped, prefill_on, "no decode instance was left")
        return self.placement.place_decode(request, snapshot, prefill_on)


@dataclass(frozen=True, slots=True)
class RepairingMonitor(Generic[S]):
    """Refills an empty pool, after which ``monitor`` starts over; else lets it decide.

    Neither sees instances that drain: they are no capacity, and a flip of one helps no pool.
    """

    monitor: Controller[S]

    @property
    def needs(self) -> frozenset[Signal]:
        return self.monitor.needs

    @property
    def name(self) -> str:
        return self.monitor.name

    @property
    def period_s(self) -> float:
        return self.monitor.period_s

    def initial(self) -> S:
        return self.monitor.initial()

    def decide(self, snapshot: Snapshot, state: S) -> ControlDecision[S]:
        if not snapshot.ids:
            return ControlDecision(self.initial(), reason="no instance is up")
        snapshot = snapshot.without_draining()
        flipped = repair(snapshot)
        if flipped is not None:
            reason = f"a pool was empty: flipped {flipped.instance}"
            why = f"no {flipped.to.label} instance was left"
            return ControlDecision(self.initial(), (replace(flipped, why=why),), reason)
        return self.monitor.decide(snapshot, state)
