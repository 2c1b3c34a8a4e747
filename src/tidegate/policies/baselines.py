"""Placements without flips: what the adaptive policies are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import At, Cells, Snapshot
from tidegate.policies.candidates import Price, best, compared, pool, pool_with_room
from tidegate.policies.pricing import QUEUED_TOKENS, RESIDENT_TOKENS, step_s, ttft_s
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


@dataclass(frozen=True, slots=True)
class LeastCost:
    """Each phase goes to the member of its pool where one price is least: no SLO, no flips.

    Each price comes with its name in the journal and the reason to give.
    """

    prefill: Callable[[Snapshot, Request], Price]
    prefill_term: str
    prefill_reason: str
    decode: Callable[[Request], Price]
    decode_term: str
    decode_reason: str
    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill where its price is least."""
        candidates = pool_with_room(snapshot, Role.PREFILL, request.prompt_tokens)
        price = self.prefill(snapshot, request)
        place = Place(snapshot.ids[best(snapshot, candidates, price)], None, Path.DISAGGREGATED)
        alternatives = compared(snapshot, candidates, {self.prefill_term: price})
        return Verdict(place, alternatives=alternatives, reason=self.prefill_reason)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Place the decode where its price is least."""
        candidates = pool_with_room(snapshot, Role.DECODE, request.prompt_tokens, prefill_on)
        price = self.decode(request)
        place = Place(prefill_on, snapshot.ids[best(snapshot, candidates, price)], Path.DISAGGREGATED)
        alternatives = compared(snapshot, candidates, {self.decode_term: price})
        return Verdict(place, alternatives=alternatives, reason=self.decode_reason)


LEAST_LOADED = LeastCost(
    lambda snapshot, request: QUEUED_TOKENS,
    "prefill_tokens",
    "fewest queued prompt tokens",
    lambda request: RESIDENT_TOKENS,
    "decode_tokens",
    "fewest resident tokens",
)
"""Prefill goes to the shortest queue, decode to the fewest resident tokens, without a latency model
(DistServe, section 4.3)."""

MINIMAL_LOAD = LeastCost(
    ttft_s,
    "ttft_s",
    "least predicted time to first token",
    step_s,
    "step_s",
    "shortest predicted step",
    frozenset({Signal.PROFILE}),
)
"""Each phase goes where it is predicted to be fastest: queue wait plus own prefill, or the decode step that
includes it (xLLM report, section 5: the baseline of its policy ablation)."""


@dataclass(frozen=True, slots=True)
class Colocated:
    """Both phases in one leg, on the instance of least predicted load.

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
        prices: dict[str, Price] = {"load_s": load, "ttft_s": ttft, "step_as_ttft_s": step}
        return Verdict(
            Place(chosen, chosen, Path.COLOCATED),
            alternatives=compared(snapshot, candidates, prices),
            reason="least predicted load",
        )

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Keep the decode where the prefill ran; if that is gone, where the load is least."""
        if prefill_on in snapshot.index:
            return Verdict(Place(prefill_on, prefill_on, Path.COLOCATED), reason="where the prefill ran")
        return self.place_prefill(request, snapshot)
