"""Minimal load by predicted seconds: the baseline of xLLM's policy ablation."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.candidates import best, compared, pool_with_room
from tidegate.policies.pricing import step_s, ttft_s
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class MinimalLoad:
    """Each phase goes where it is predicted to be fastest; no SLO, no flips (xLLM report, section 5)."""

    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill where queue wait plus its own time is least."""
        candidates = pool_with_room(snapshot, Role.PREFILL, request.prompt_tokens)
        ttft = ttft_s(snapshot, request)
        chosen = snapshot.ids[best(snapshot, candidates, ttft)]
        return Verdict(
            Place(chosen, None, Path.DISAGGREGATED),
            alternatives=compared(snapshot, candidates, {"ttft_s": ttft}),
            reason="least predicted time to first token",
        )

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Place the decode where the step that includes it is shortest."""
        candidates = pool_with_room(snapshot, Role.DECODE, request.prompt_tokens, prefill_on)
        step = step_s(request)
        chosen = snapshot.ids[best(snapshot, candidates, step)]
        return Verdict(
            Place(prefill_on, chosen, Path.DISAGGREGATED),
            alternatives=compared(snapshot, candidates, {"step_s": step}),
            reason="shortest predicted step",
        )
