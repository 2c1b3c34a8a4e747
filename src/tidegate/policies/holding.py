"""Holding prompts in the control plane, where the engines' own queues take no order from outside (ours)."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Hold, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Field, Snapshot
from tidegate.policies.protocols import PrefillPlacement, Signal

AHEAD_S = 0.05
"""Predicted prefill that may wait in an engine behind the running one (ours): what the way to it and a short
step take, so that it does not run dry."""


@dataclass(frozen=True, slots=True)
class HoldingPlacement:
    """Asks ``inner``, and holds a prompt, with all behind it, while the prefill instance that it names has
    more than ``AHEAD_S`` of predicted prefill waiting.

    What an engine has it serves by arrival; what is held is served in the system's order. A prompt that is to
    be prefilled on a decode instance is not held: the placement found time for it there.
    """

    inner: PrefillPlacement

    @property
    def needs(self) -> frozenset[Signal]:
        """Those of ``inner``, and profiles."""
        return self.inner.needs | {Signal.PROFILE}

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Return what ``inner`` says, or a Hold. The room changes with prefills that end, not with time: so
        nobody who just arrived is placed before those that are held."""
        verdict = self.inner.place_prefill(request, snapshot)
        place, cells = verdict.decision, snapshot.cells
        if not isinstance(place, Place):
            return verdict
        at = snapshot.index[place.prefill_on]
        if cells[Field.ROLE, at] == float(Role.DECODE):
            return verdict
        waiting_s = cells[Field.PREFILL_QUEUE_S, at] - cells[Field.RUNNING_PREFILL_S, at]
        if waiting_s <= AHEAD_S or cells[Field.PREFILL_REQUESTS, at] < 2:
            return verdict
        return Verdict(Hold("prefill instances have enough ahead of them", with_all_behind=True))
