"""Arrow, version 2, as published: Algorithms 1 to 3 (arXiv 2505.11916v2, sections 4 and 5).

"Narwhal" marks what an independent implementation of the paper adds or decides where the paper is silent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from tidegate.core.decision import Alternatives, ControlDecision, Flip, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import At, Candidates, Cells, Column, Field, Mask, Snapshot, columns_of
from tidegate.policies.candidates import Price, best, best_within, cell, compared, member_mask, pool, price_at
from tidegate.policies.pricing import QUEUED_TOKENS, RESIDENT_TOKENS, tokens_over_limit, ttft_s
from tidegate.policies.protocols import Signal

L_EXPAND = 1.0
"""A decode pool at or above this load needs instances. Narwhal; 1 is exactly at the target."""
L_SHRINK = 0.5
"""A pool at or below this load can spare instances. Narwhal."""
COOLDOWN_S = 10.0
"""Least time between two flips from prefill to decode. Narwhal; the paper names a cooldown and no value."""
SUSTAIN_TICKS = 3
"""Consecutive ticks before the monitor acts. Narwhal; the paper says "over a period" and names no count."""
TICK_S = 1.0
"""Seconds between ticks. Narwhal."""

DISAGGREGATED, PREFILL_LABEL = Path.DISAGGREGATED, float(Role.PREFILL)
"""Read from here in a fraction of the time that the enums take."""

MISSED_TTFT, MISSED_TPOT = "all miss the TTFT target", "all miss the TPOT target"

Why = Callable[[], str]
"""Returns a sentence for ``Flip.why``. It reads prices, so a placement that flips costs less without it."""
CandidateRule = Callable[[Snapshot, Role, int, str | None], Candidates]
"""Returns who is compared for a role, by the request's tokens and the instance that holds its KV."""


def own_pool(snapshot: Snapshot, role: Role, tokens: int, held_on: str | None) -> Candidates:
    """Compare the pool of the role (Narwhal: profiles are taken in pure phases, so they mislead on an
    instance that mixes them). The paper prices every instance."""
    return pool(snapshot, role)


def prefill_cost(request: Request, snapshot: Snapshot) -> tuple[Price, Price]:
    """Return (sum of L over the decodes, predicted TTFT), the second to be within the TTFT target (5.3)."""
    return RESIDENT_TOKENS, ttft_s(snapshot, request)


def decode_cost(request: Request) -> tuple[Price, Price]:
    """Return (sum of L over the prefills, sum of L over the decodes with r - MT), the second <= 0 (5.3)."""
    return QUEUED_TOKENS, tokens_over_limit(request)


@dataclass(frozen=True, slots=True)
class ArrowPlacement:
    """Algorithm 1: place each half of a request; flip an instance when every placement would miss.

    Costs are pairs compared lexicographically. Requests are held against their own SLO; ``slo`` is what pool
    loads relate to.
    """

    slo: Slo = field(default_factory=Slo)
    shrink: float = L_SHRINK
    cooldown_s: float = COOLDOWN_S
    candidates: CandidateRule = own_pool
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Lines 2 to 6 for a prefill.

        Line 4 has a guard because an overloaded decode side that lost an instance would leave requests
        holding KV that nobody decodes. "Low" means below ``shrink`` (Narwhal): up to ``expand`` both this
        flip and the monitor's second clause would hold, and one instance would go to and fro.
        """
        candidates = self.candidates(snapshot, Role.PREFILL, request.prompt_tokens, None)
        resident, ttft = prefill_cost(request, snapshot)  # line 2
        alternatives = compared(snapshot, candidates, {"decode_resident_tokens": resident, "ttft_s": ttft})
        chosen = best_within(snapshot, candidates, ttft, request.slo.ttft_s, lead=resident)  # line 3
        if chosen is not None:
            return verdict_on(snapshot.ids[chosen], None, "meets the TTFT target", alternatives)
        if decode_pool_load(snapshot, self.slo) < self.shrink:  # line 4
            flipped = flip(snapshot, Role.PREFILL, "inline")
            if flipped is not None:  # line 5
                why = missed(Role.PREFILL, request, snapshot, candidates, ttft)
                return verdict_on_flipped(flipped, None, MISSED_TTFT, alternatives, why)
        chosen = best(snapshot, candidates, ttft, lead=resident)  # line 6
        reason = f"best effort: {MISSED_TTFT}, no flip is due"
        return verdict_on(snapshot.ids[chosen], None, reason, alternatives)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Lines 1 to 6 for a decode, whose flip is not gated by load."""
        if may_decode(snapshot, prefill_on):  # line 1
            return verdict_on(prefill_on, prefill_on, "its prefill instance decodes: no transfer")
        candidates = self.candidates(snapshot, Role.DECODE, request.prompt_tokens, prefill_on)
        queued, over = decode_cost(request)  # line 2
        alternatives = compared(
            snapshot, candidates, {"prefill_resident_tokens": queued, "tokens_over_limit": over}
        )
        chosen = best_within(snapshot, candidates, over, 0.0, lead=queued)  # line 3
        if chosen is not None:
            return verdict_on(prefill_on, snapshot.ids[chosen], "meets the TPOT target", alternatives)
        flipped = flip(snapshot, Role.DECODE, "inline", cooldown_s=self.cooldown_s)  # line 4
        if flipped is not None:  # line 5
            why = missed(Role.DECODE, request, snapshot, candidates, over)
            return verdict_on_flipped(flipped, prefill_on, MISSED_TPOT, alternatives, why)
        chosen = best(snapshot, candidates, over, lead=queued)  # line 6
        reason = f"best effort: {MISSED_TPOT}, no flip is legal"
        return verdict_on(prefill_on, snapshot.ids[chosen], reason, alternatives)


@dataclass(frozen=True, slots=True)
class ArrowMonitor:
    """Algorithm 2: lend to decode when it is overloaded, or when prefill idles while decode does not.

    Instances only come back through Algorithm 1.
    """

    slo: Slo = field(default_factory=Slo)
    expand: float = L_EXPAND
    shrink: float = L_SHRINK
    sustain: int = SUSTAIN_TICKS
    cooldown_s: float = COOLDOWN_S
    period_s: float = TICK_S
    name: str = "monitor"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def initial(self) -> int:
        """Return the count of ticks so far that called for a flip."""
        return 0

    def decide(self, snapshot: Snapshot, state: int) -> ControlDecision[int]:
        """Return at most one flip."""
        prefill, decode = prefill_pool_load(snapshot, self.slo), decode_pool_load(snapshot, self.slo)
        high = decode >= self.expand or prefill <= self.shrink <= decode
        return self.flip_once_sustained(
            snapshot, state, high, f"prefill load {prefill:.2f}, decode load {decode:.2f}"
        )

    def flip_once_sustained(
        self, snapshot: Snapshot, state: int, high: bool, loads: str
    ) -> ControlDecision[int]:
        """Flip after ``sustain`` consecutive ticks that were ``high``; the state is their count.

        A flip that Algorithm 3 refuses keeps the count, so the next tick asks again (Narwhal).
        """
        if not high:
            return ControlDecision(0, reason=loads)
        count = state + 1
        if count < self.sustain:
            return ControlDecision(count, reason=f"{loads}, tick {count} of {self.sustain}")
        flipped = flip(snapshot, Role.DECODE, "monitor", cooldown_s=self.cooldown_s)
        if flipped is None:
            return ControlDecision(count, reason=f"{loads}, no flip is legal")
        why = f"decode needs an instance and prefill spares one: {loads} for {count} ticks"
        return ControlDecision(0, (replace(flipped, why=why),), f"{loads}: flipped {flipped.instance}")


def flip(snapshot: Snapshot, to: Role, reason: str, *, cooldown_s: float = 0.0) -> Flip | None:
    """Algorithm 3: return the cheapest flip into the pool of ``to``, or None when there is no legal one.

    The cooldown counts from the last flip to decode, by whatever reason, and holds back only such flips:
    prefill load is seen coming and must be met at once, decode load builds up slowly (section 5.5). The
    pool that loses the instance keeps at least one of its label. Instances that are not flippable count as
    members and stay.
    """
    if to == Role.DECODE and snapshot.at_s - snapshot.last_flip_to_decode_s < cooldown_s:
        return None
    source = Role.PREFILL if to == Role.DECODE else Role.DECODE
    labelled = snapshot.labelled(source)
    if np.count_nonzero(labelled) <= 1:
        return None
    movable = columns_of(labelled & snapshot.flippable)
    if not len(movable):
        return None
    if source == Role.PREFILL:
        other, work = Field.DECODE_REQUESTS, Field.PREFILL_QUEUE_S
    else:
        other, work = Field.PREFILL_REQUESTS, Field.DECODE_TOKENS

    def drained(cells: Cells, at: At, costs: ProfileTable) -> float | Column:
        # An instance that still holds the other kind of work was flipped the other way and has not drained:
        # its indicator is 0, so it goes back first.
        return (cells[other, at] == 0) * 1.0

    chosen = best(snapshot, movable, cell(work), lead=drained)
    return Flip(snapshot.ids[chosen], to, reason)


def prefill_pool_load(snapshot: Snapshot, slo: Slo) -> float:
    """Return the mean over instances that prefill of their predicted queue seconds / ttft (section 5.5).

    Each counts the larger of its queue now and its average over the last window: at low rates a queue
    is empty at most instants, and a zero read there would lend a busy instance away (Narwhal). Work,
    not only the label, makes an instance a member (Narwhal).
    """
    working = member_mask(snapshot, Role.PREFILL) | (snapshot.prefill_requests > 0)
    load = np.maximum(snapshot.prefill_queue_s, snapshot.prefill_queue_avg_s) / slo.ttft_s
    return _mean(load, working)


def decode_pool_load(snapshot: Snapshot, slo: Slo) -> float:
    """Return the mean over decode instances of (gap - k0) / (tpot - k0), at least 0 (section 5.5).

    The gap is the last window's mean, or the longest open one on an instance that stalls. k0, the
    predicted step of one request, is subtracted because an engine ticking at its natural pace is idle,
    not half loaded (Narwhal); where k0 exceeds the target, the plain ratio gap / tpot remains. An
    instance without decodes counts 0.
    """
    gap = snapshot.mean_gap_s * (snapshot.decode_requests > 0)
    floor = snapshot.costs.step.seconds(1.0, 0.0)
    floor = np.where(floor < slo.tpot_s, floor, 0.0)
    return _mean(np.maximum(gap - floor, 0.0) / (slo.tpot_s - floor), member_mask(snapshot, Role.DECODE))


def may_decode(snapshot: Snapshot, instance: str) -> bool:
    """Tell whether ``instance`` is up and its label lets it decode."""
    at = snapshot.index.get(instance)
    return at is not None and snapshot.cells[Field.ROLE, at] != PREFILL_LABEL


def verdict_on(
    prefill_on: str,
    decode_on: str | None,
    reason: str,
    alternatives: Alternatives | None = None,
    flips: tuple[Flip, ...] = (),
) -> Verdict:
    """Return the verdict that places one half, or both on one instance. ``decode_on`` None: decided later."""
    return Verdict(Place(prefill_on, decode_on, DISAGGREGATED), flips, alternatives, reason)


def missed(role: Role, request: Request, snapshot: Snapshot, candidates: Candidates, price: Price) -> Why:
    """Say that no candidate meets the target of a role's phase, and how far the best is from it.

    ``price`` is the time to the first token, or the tokens over the limit.
    """

    def why() -> str:
        prefill = role == Role.PREFILL
        target_s, each = (request.slo.ttft_s, "") if prefill else (request.slo.tpot_s, " per token")
        target = f"no {role.name.lower()} instance meets {1000 * target_s:g} ms{each}"
        if not len(candidates):
            return f"{target}: none has room"
        least = price_at(snapshot, price, best(snapshot, candidates, price))
        how = f"waits {1000 * least:,.0f} ms" if prefill else f"holds {least:,.0f} tokens too many"
        return f"{target}: the best {how}"

    return why


def verdict_on_flipped(
    flipped: Flip,
    prefill_on: str | None,
    reason: str,
    alternatives: Alternatives | None = None,
    why: Why | None = None,
) -> Verdict:
    """Return the verdict that places on the flipped instance; ``why`` says more than ``reason``.

    It places the decode of a prefill that ran on ``prefill_on``, or a prefill where that is None.
    """
    on = flipped.instance
    explained = Flip(on, flipped.to, flipped.reason, why or reason)
    decode_on = None if prefill_on is None else on
    return verdict_on(prefill_on or on, decode_on, f"{reason}; flipped {on}", alternatives, (explained,))


def _mean(load: Column, members: Mask) -> float:
    count = int(np.count_nonzero(members))
    return float(load.dot(members)) / count if count else 0.0
