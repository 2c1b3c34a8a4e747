"""Least loaded by tokens: what DistServe does, without a latency model."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Alternatives, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.among import best
from tidegate.ledger.snapshot import Field, Reading, Snapshot
from tidegate.policies.candidates import fitting, pool
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Prefill goes to the shortest queue, decode to the fewest resident tokens (DistServe, section 4.3)."""

    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill where the fewest prompt tokens are queued or running."""
        candidates = fitting(snapshot, pool(snapshot, Role.PREFILL), request.prompt_tokens)
        load = Reading(snapshot, Field.PREFILL_TOKENS)
        chosen = snapshot.ids[best(load, candidates)]
        return Verdict(
            Place(chosen, None, Path.DISAGGREGATED),
            alternatives=Alternatives(snapshot.ids, {"prefill_tokens": load}, candidates),
            reason="fewest queued prompt tokens",
        )

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Place the decode where the fewest tokens are resident."""
        candidates = fitting(snapshot, pool(snapshot, Role.DECODE), request.prompt_tokens, prefill_on)
        load = Reading(snapshot, Field.DECODE_TOKENS)
        chosen = snapshot.ids[best(load, candidates)]
        return Verdict(
            Place(prefill_on, chosen, Path.DISAGGREGATED),
            alternatives=Alternatives(snapshot.ids, {"decode_tokens": load}, candidates),
            reason="fewest resident tokens",
        )
