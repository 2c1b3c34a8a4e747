"""Minimal load by predicted seconds: the baseline of xLLM's policy ablation."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Alternatives, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.among import best
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.candidates import fitting, pool
from tidegate.policies.pricing import StepSeconds, Ttft
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class MinimalLoad:
    """Each phase goes where it is predicted to be fastest; no SLO, no flips (xLLM report, section 5)."""

    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill where queue wait plus its own time is least."""
        candidates = fitting(snapshot, pool(snapshot, Role.PREFILL), request.prompt_tokens)
        ttft = Ttft(snapshot, request)
        chosen = snapshot.ids[best(ttft, candidates)]
        return Verdict(
            Place(chosen, None, Path.DISAGGREGATED),
            alternatives=Alternatives(snapshot.ids, {"ttft_s": ttft}, candidates),
            reason="least predicted time to first token",
        )

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Place the decode where the step that includes it is shortest."""
        candidates = fitting(snapshot, pool(snapshot, Role.DECODE), request.prompt_tokens, prefill_on)
        step = StepSeconds(snapshot, request)
        chosen = snapshot.ids[best(step, candidates)]
        return Verdict(
            Place(prefill_on, chosen, Path.DISAGGREGATED),
            alternatives=Alternatives(snapshot.ids, {"step_s": step}, candidates),
            reason="shortest predicted step",
        )
