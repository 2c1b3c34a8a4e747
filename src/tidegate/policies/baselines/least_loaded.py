"""Least loaded by tokens: what DistServe does, without a latency model."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.candidates import best, compared, pool_with_room
from tidegate.policies.pricing import QUEUED_TOKENS, RESIDENT_TOKENS
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Prefill goes to the shortest queue, decode to the fewest resident tokens (DistServe, section 4.3)."""

    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill where the fewest prompt tokens are queued or running."""
        candidates = pool_with_room(snapshot, Role.PREFILL, request.prompt_tokens)
        load = QUEUED_TOKENS
        chosen = snapshot.ids[best(snapshot, candidates, load)]
        return Verdict(
            Place(chosen, None, Path.DISAGGREGATED),
            alternatives=compared(snapshot, candidates, {"prefill_tokens": load}),
            reason="fewest queued prompt tokens",
        )

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Place the decode where the fewest tokens are resident."""
        candidates = pool_with_room(snapshot, Role.DECODE, request.prompt_tokens, prefill_on)
        load = RESIDENT_TOKENS
        chosen = snapshot.ids[best(snapshot, candidates, load)]
        return Verdict(
            Place(prefill_on, chosen, Path.DISAGGREGATED),
            alternatives=compared(snapshot, candidates, {"decode_tokens": load}),
            reason="fewest resident tokens",
        )
