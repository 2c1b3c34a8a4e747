"""Round robin: each phase walks around its pool. The baseline below every other."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.candidates import pool
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """The n-th placement of a phase goes to member n modulo the pool's size.

    The counter is the ledger's, so the policy keeps no state.
    """

    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill on the next member of the prefill pool."""
        chosen = _turn(snapshot, Role.PREFILL, snapshot.placed_prefills)
        return Verdict(Place(chosen, None, Path.DISAGGREGATED), reason="next in turn")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Place the decode on the next member of the decode pool."""
        chosen = _turn(snapshot, Role.DECODE, snapshot.placed_decodes)
        return Verdict(Place(prefill_on, chosen, Path.DISAGGREGATED), reason="next in turn")


def _turn(snapshot: Snapshot, role: Role, placed: int) -> str:
    members = pool(snapshot, role)
    return snapshot.ids[int(members[placed % len(members)])]
