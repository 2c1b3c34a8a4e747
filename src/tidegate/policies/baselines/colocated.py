"""Colocated serving: both phases of a request on one instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import At, Cells, Snapshot
from tidegate.policies.candidates import best, compared, pool_with_room
from tidegate.policies.pricing import step_s, ttft_s
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class Colocated:
    """One leg on the instance of least predicted load.

    The load adds two terms in seconds: the predicted TTFT, and the predicted decode step scaled by
    ttft/tpot of the request's SLO, so that using up the whole of either target weighs the same (ours).
    """

    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place both phases where the load is least."""
        candidates = pool_with_room(snapshot, Role.PREFILL, request.prompt_tokens)
        ttft = ttft_s(snapshot, request)
        step = step_s(request, scale=request.slo.ttft_s / request.slo.tpot_s)

        def load(cells: Cells, at: At, costs: ProfileTable) -> Any:
            return ttft(cells, at, costs) + step(cells, at, costs)

        chosen = snapshot.ids[best(snapshot, candidates, load)]
        return Verdict(
            Place(chosen, chosen, Path.COLOCATED),
            alternatives=compared(
                snapshot, candidates, {"load_s": load, "ttft_s": ttft, "step_as_ttft_s": step}
            ),
            reason="least predicted load",
        )

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Keep the decode where the prefill ran; if that is gone, where the load is least."""
        if prefill_on in snapshot.index:
            return Verdict(Place(prefill_on, prefill_on, Path.COLOCATED), reason="where the prefill ran")
        return self.place_prefill(request, snapshot)
