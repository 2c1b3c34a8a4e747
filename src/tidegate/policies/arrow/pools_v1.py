"""Arrow, version 1 (xLLM technical report, section 3.2): four elastic pools."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from tidegate.core.decision import ControlDecision, Flip, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Candidates, Mask, Snapshot, columns_of
from tidegate.policies.arrow.published import (
    MISSED_TTFT,
    may_decode,
    missed,
    verdict_on,
    verdict_on_flipped,
)
from tidegate.policies.candidates import at_most, best, best_within, compared, member_mask, pool, with_room
from tidegate.policies.pricing import RESIDENT_TOKENS, tokens_over_limit, ttft_s, wait_s
from tidegate.policies.protocols import Signal

DECODE_FLOOR = 2
"""Decode instances below which none is taken for prefill: xLLM report."""
PREFILL_FLOOR = 1
"""Prefill instances below which none is taken for decode. Ours: never empty a pool."""
MEMORY_SHORTAGE = 0.9
"""Share of the decode side's KV capacity that counts as a shortage. Ours; the report names no value."""
TICK_S = 1.0
"""Seconds between monitor ticks. Ours, as in Narwhal's Arrow v2."""


@dataclass(frozen=True, slots=True)
class Pools:
    """The four pools: a label, and whether work of the other phase is still on the instance.

    Derived anew from each snapshot, so an instance settles by itself when the other phase's work ends.
    MIXED instances belong to ``prefill`` and ``decode`` both.
    """

    prefill: Mask
    decode: Mask
    prefill_to_decode: Mask
    decode_to_prefill: Mask

    @classmethod
    def of(cls, snapshot: Snapshot) -> Pools:
        """Sort the instances of ``snapshot``."""
        prefills, decodes = snapshot.labelled(Role.PREFILL), snapshot.labelled(Role.DECODE)
        mixed = snapshot.labelled(Role.MIXED)
        has_prefill, has_decode = snapshot.prefill_requests > 0, snapshot.decode_requests > 0
        return cls(
            prefill=mixed | (prefills & ~has_decode),
            decode=mixed | (decodes & ~has_prefill),
            prefill_to_decode=decodes & has_prefill,
            decode_to_prefill=prefills & has_decode,
        )

    def name_of(self, at: int) -> str:
        """Return the pool of the instance at index ``at`` as people write it; ``mixed`` for a MIXED one."""
        if self.prefill[at] and self.decode[at]:
            return "mixed"
        if self.prefill_to_decode[at]:
            return "prefill->decode"
        if self.decode_to_prefill[at]:
            return "decode->prefill"
        return "prefill" if self.prefill[at] else "decode"


def take(snapshot: Snapshot, to: Role, reason: str) -> Flip | None:
    """Return the flip to ``to`` of the instance with the least work, half-flipped ones first.

    That is the decode instance with the fewest running tokens, or the prefill instance with the shortest
    queue. None when it would leave fewer than DECODE_FLOOR or PREFILL_FLOOR of its label.
    """
    pools = Pools.of(snapshot)
    if to == Role.PREFILL:
        source, floor, first, work = Role.DECODE, DECODE_FLOOR, pools.prefill_to_decode, RESIDENT_TOKENS
    else:
        source, floor, first, work = Role.PREFILL, PREFILL_FLOOR, pools.decode_to_prefill, wait_s(snapshot)
    labelled = snapshot.labelled(source)
    if np.count_nonzero(labelled) <= floor:
        return None
    movable = labelled & snapshot.flippable
    candidates = columns_of(movable & first if (movable & first).any() else movable)
    return Flip(snapshot.ids[best(snapshot, candidates, work)], to, reason) if len(candidates) else None


@dataclass(frozen=True, slots=True)
class ArrowV1Placement:
    """Prefill to the shortest queue, decode to the fewest running tokens, pool by pool."""

    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Try P, then D->P, then take an instance from the decode side; else the best of P and D->P."""
        members = pool(snapshot, Role.PREFILL)
        pools, ttft = Pools.of(snapshot), ttft_s(snapshot, request)
        for mask in (pools.prefill, pools.decode_to_prefill):
            candidates = columns_of(mask)
            chosen = best_within(snapshot, candidates, ttft, request.slo.ttft_s)
            if chosen is not None:
                alternatives = compared(snapshot, candidates, {"ttft_s": ttft})
                return verdict_on(snapshot.ids[chosen], None, "meets the TTFT target", alternatives)
        alternatives = compared(snapshot, members, {"ttft_s": ttft})
        flipped = take(snapshot, Role.PREFILL, "inline")
        if flipped is not None:
            why = missed(Role.PREFILL, request, snapshot, members, ttft)
            return verdict_on_flipped(flipped, None, MISSED_TTFT, alternatives, why)
        return verdict_on(snapshot.ids[best(snapshot, members, ttft)], None, "best effort", alternatives)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Stay where the prefill ran if that may decode; else D, then P->D, then take one from prefill."""
        if may_decode(snapshot, prefill_on):
            return verdict_on(prefill_on, prefill_on, "its prefill instance decodes: no transfer")
        members = pool(snapshot, Role.DECODE)
        pools, running = Pools.of(snapshot), RESIDENT_TOKENS
        for mask in (pools.decode, pools.prefill_to_decode):
            candidates = columns_of(mask)
            meets = self._within_bounds(request, snapshot, candidates, prefill_on)
            if len(meets):
                chosen = snapshot.ids[best(snapshot, meets, running)]
                alternatives = compared(snapshot, candidates, {"running_tokens": running})
                return verdict_on(prefill_on, chosen, "within memory and TPOT bounds", alternatives)
        alternatives = compared(snapshot, members, {"running_tokens": running})
        flipped = take(snapshot, Role.DECODE, "inline")
        if flipped is not None:
            why = "every decode instance exceeds its memory or its time per token"
            return verdict_on_flipped(flipped, prefill_on, why, alternatives)
        return verdict_on(
            prefill_on, snapshot.ids[best(snapshot, members, running)], "best effort", alternatives
        )

    def _within_bounds(
        self, request: Request, snapshot: Snapshot, candidates: Candidates, prefill_on: str
    ) -> Candidates:
        """Narrow ``candidates`` to those within the memory bound and the TPOT bound."""
        candidates = with_room(snapshot, candidates, request.prompt_tokens, prefill_on)
        return at_most(snapshot, candidates, tokens_over_limit(request), 0.0)


@dataclass(frozen=True, slots=True)
class ArrowV1Monitor:
    """Takes one prefill instance for decode per tick while decode is short of memory or time, or while a
    prefill instance idles. No cooldown and no count: the report names none."""

    slo: Slo = field(default_factory=Slo)
    memory_shortage: float = MEMORY_SHORTAGE
    period_s: float = TICK_S
    name: str = "monitor"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def initial(self) -> None:
        return

    def decide(self, snapshot: Snapshot, state: None) -> ControlDecision[None]:
        """Return at most one flip. Keeps no state."""
        why = self._why(snapshot)
        flipped = take(snapshot, Role.DECODE, "monitor") if why else None
        if flipped is None:
            return ControlDecision(None, reason=why or "no trigger")
        flipped = replace(flipped, why=f"decode takes an instance: {why}")
        return ControlDecision(None, (flipped,), f"{why}: flipped {flipped.instance}")

    def _why(self, snapshot: Snapshot) -> str:
        decodes = member_mask(snapshot, Role.DECODE)
        capacity = float(snapshot.kv_capacity_tokens[decodes].sum())
        used = float((snapshot.decode_tokens + snapshot.handoff_tokens)[decodes].sum())
        if capacity > 0 and used >= self.memory_shortage * capacity:
            return f"decode memory {used / capacity:.0%} full"
        busy = decodes & (snapshot.decode_requests > 0)
        interval = float(snapshot.mean_gap_s[busy].mean()) if np.count_nonzero(busy) else 0.0
        if interval > self.slo.tpot_s:
            return f"mean token interval {interval * 1e3:.0f} ms exceeds the target"
        if np.count_nonzero(snapshot.labelled(Role.PREFILL) & (snapshot.prefill_requests == 0)):
            return "a prefill instance idles"
        return ""
