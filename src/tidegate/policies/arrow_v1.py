"""Arrow v1 (xLLM technical report, section 3.2): four elastic pools, derived from labels and residents."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tidegate.core.decision import Alternatives, ControlDecision, Flip, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.ledger.among import Among, Cost, best, best_within, marked
from tidegate.ledger.snapshot import Field, Mask, PrefillWait, Reading, Snapshot
from tidegate.policies.arrow_flip import repair
from tidegate.policies.candidates import has_room, marked_members, members
from tidegate.policies.pools import Pools
from tidegate.policies.pricing import TokensOverLimit, Ttft
from tidegate.policies.protocols import Signal

DECODE_FLOOR = 2
"""Decode instances below which none is taken for prefill: xLLM report."""
PREFILL_FLOOR = 1
"""Prefill instances below which none is taken for decode. Ours: never empty a pool."""
MEMORY_SHORTAGE = 0.9
"""Share of the decode side's KV capacity that counts as a shortage. Ours; the report names no value."""
TICK_S = 1.0
"""Seconds between monitor ticks. Ours, as in Narwhal's Arrow v2."""


def take_for_prefill(snapshot: Snapshot, pools: Pools, reason: str) -> Flip | None:
    """Return the flip of the decode instance with the fewest running tokens, half-flipped ones first.

    None when it would leave fewer than DECODE_FLOOR decode instances.
    """
    return _take(
        snapshot,
        Role.PREFILL,
        reason,
        DECODE_FLOOR,
        Reading(snapshot, Field.DECODE_TOKENS),
        pools.prefill_to_decode,
    )


def take_for_decode(snapshot: Snapshot, pools: Pools, reason: str) -> Flip | None:
    """Return the flip of the prefill instance with the shortest queue, half-flipped ones first.

    None when it would leave fewer than PREFILL_FLOOR prefill instances.
    """
    return _take(snapshot, Role.DECODE, reason, PREFILL_FLOOR, PrefillWait(snapshot), pools.decode_to_prefill)


def _take(
    snapshot: Snapshot, to: Role, reason: str, floor: int, work: Cost, half_flipped: Mask
) -> Flip | None:
    labelled = snapshot.labelled(Role.PREFILL if to == Role.DECODE else Role.DECODE)
    if np.count_nonzero(labelled) <= floor:
        return None
    movable = labelled & snapshot.flippable
    among = marked(movable & half_flipped)
    if not len(among):
        among = marked(movable)
    return Flip(snapshot.ids[best(work, among)], to, reason) if len(among) else None


@dataclass(frozen=True, slots=True)
class ArrowV1Placement:
    """Prefill to the shortest queue, decode to the fewest running tokens, pool by pool."""

    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Try P, then D->P, then take an instance from the decode side; else the best of P and D->P."""
        own = members(snapshot, Role.PREFILL)
        ttft = Ttft(snapshot, request)
        pools = Pools.of(snapshot)
        if not len(own):
            moved = repair(snapshot)
            own = snapshot.labels.everyone
        else:
            for pool in (marked(pools.prefill), marked(pools.decode_to_prefill)):
                chosen = best_within(ttft, pool, request.slo.ttft_s)
                if chosen is not None:
                    return _prefill_at(snapshot, chosen, ttft, pool, "meets the TTFT target")
            moved = take_for_prefill(snapshot, pools, "inline")
        if moved is None:
            return _prefill_at(snapshot, best(ttft, own), ttft, own, "best effort")
        verdict = _prefill_at(snapshot, snapshot.index[moved.instance], ttft, own, "")
        return Verdict(verdict.decision, (moved,), verdict.alternatives, f"flipped {moved.instance}")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Stay where the prefill ran if that may decode; else D, then P->D, then take one from prefill."""
        held = snapshot.index.get(prefill_on)
        if held is not None and snapshot.cells[Field.ROLE, held] != Role.PREFILL:
            place = Place(prefill_on, prefill_on, Path.DISAGGREGATED)
            return Verdict(place, reason="its prefill instance decodes: no transfer")
        own = members(snapshot, Role.DECODE)
        running = Reading(snapshot, Field.DECODE_TOKENS)
        pools = Pools.of(snapshot)
        if not len(own):
            moved = repair(snapshot)
            own = snapshot.labels.everyone
        else:
            within = has_room(snapshot, request.prompt_tokens, prefill_on)
            within &= TokensOverLimit(snapshot, request).column() <= 0
            for pool in (pools.decode, pools.prefill_to_decode):
                meets = marked(pool & within)
                if len(meets):
                    chosen, compared = best(running, meets), marked(pool)
                    return _decode_at(snapshot, chosen, prefill_on, compared, "within memory and TPOT bounds")
            moved = take_for_decode(snapshot, pools, "inline")
        if moved is None:
            return _decode_at(snapshot, best(running, own), prefill_on, own, "best effort")
        verdict = _decode_at(snapshot, snapshot.index[moved.instance], prefill_on, own, "")
        return Verdict(verdict.decision, (moved,), verdict.alternatives, f"flipped {moved.instance}")


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
        """See ``Controller.initial``."""
        return

    def decide(self, snapshot: Snapshot, state: None) -> ControlDecision[None]:
        """Return at most one flip. Keeps no state."""
        if not snapshot.ids:
            return ControlDecision(None, reason="no instance is up")
        healed = repair(snapshot)
        if healed is not None:
            return ControlDecision(None, (healed,), f"a pool was empty: flipped {healed.instance}")
        why = self._why(snapshot)
        moved = take_for_decode(snapshot, Pools.of(snapshot), "monitor") if why else None
        if moved is None:
            return ControlDecision(None, reason=why or "no trigger")
        return ControlDecision(None, (moved,), f"{why}: flipped {moved.instance}")

    def _why(self, snapshot: Snapshot) -> str:
        decodes = marked_members(snapshot, Role.DECODE)
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


def _prefill_at(snapshot: Snapshot, chosen: int, ttft: Ttft, among: Among, reason: str) -> Verdict:
    place = Place(snapshot.ids[chosen], None, Path.DISAGGREGATED)
    return Verdict(place, alternatives=Alternatives(snapshot.ids, {"ttft_s": ttft}, among), reason=reason)


def _decode_at(snapshot: Snapshot, chosen: int, prefill_on: str, among: Among, reason: str) -> Verdict:
    place = Place(prefill_on, snapshot.ids[chosen], Path.DISAGGREGATED)
    running = Reading(snapshot, Field.DECODE_TOKENS)
    alternatives = Alternatives(snapshot.ids, {"running_tokens": running}, among)
    return Verdict(place, alternatives=alternatives, reason=reason)
