"""Arrow with other conditions for a flip, and two more places for a request (ours).

The published rules look at how loaded a pool is now. On moving traffic that fails in three ways (see
``docs/policies/arrow.md``): a pool gives away the instance without which it misses its own target; one that
is half loaded refuses to lend although the other misses everything; and KV that fills up is not load. The
rules here ask what would be left instead, from the ledger and the cost forms alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tidegate.core.decision import ControlDecision, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.costs.forms import greater, lesser
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import At, Cells, Column, Field, Snapshot
from tidegate.policies.arrow.published import (
    COOLDOWN_S,
    MISSED_TPOT,
    MISSED_TTFT,
    ArrowMonitor,
    decode_cost,
    decode_pool_load,
    flip,
    may_decode,
    missed,
    prefill_cost,
    prefill_pool_load,
    verdict_on,
    verdict_on_flipped,
)
from tidegate.policies.candidates import (
    Price,
    at_most,
    best,
    best_within,
    compared,
    pool,
    pool_with_room,
    price_at,
    with_room,
)
from tidegate.policies.pricing import fastest_prefill_seconds, own_prefill_s, step_s, ttft_s
from tidegate.policies.protocols import Signal

HORIZON_S = 10.0
"""A prefill queue counts against the time that decodes leave as if it were worked off within this time."""


@dataclass(frozen=True, slots=True)
class LendingLimits:
    """The limits up to which the rest of a pool, or an instance of the other one, may be loaded.

    ``decode_full``: what a decode pool that lends may reach, as a share of the TPOT target and of its KV.
    ``wait``: the share of the TTFT target that may pass in the queue of a prefill pool that lends.
    ``kv_reserve``: the share of a KV cache that placements leave to the growth of the decodes that are there.
    ``needy``: the fullness at which a decode pool borrows.
    """

    decode_full: float = 0.9
    wait: float = 0.25
    kv_reserve: float = 0.15
    needy: float = 0.85

    def decode_spares_one(self, snapshot: Snapshot, slo: Slo) -> bool:
        """Tell whether all decodes would fit on one instance fewer of the pool."""
        return decode_fullness(snapshot, slo, fewer=1) < self.decode_full

    def prefill_spares_one(self, snapshot: Snapshot, slo: Slo) -> bool:
        """Tell whether one instance fewer would still prefill in time what lately came."""
        return expected_wait_s(snapshot, fewer=1) <= self.wait * slo.ttft_s


@dataclass(frozen=True, slots=True)
class LendingPlacement:
    """Algorithm 1 with the guards of ``limits``, and with the other phase's instances as a last resort.

    A decode is placed only where ``limits.kv_reserve`` of the KV stays free. ``slo`` is what pools are held
    against; requests are held against their own.
    """

    slo: Slo = field(default_factory=Slo)
    limits: LendingLimits = field(default_factory=LendingLimits)
    cooldown_s: float = COOLDOWN_S
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place where the TTFT target is met; else flip, when the decode pool spares an instance; else place
        beside decodes; else where the target is missed least.

        A prompt that even an idle instance would serve too late flips none.
        """
        candidates = pool_with_room(snapshot, Role.PREFILL, request.prompt_tokens)
        resident, ttft = prefill_cost(request, snapshot)
        alternatives = compared(snapshot, candidates, {"decode_resident_tokens": resident, "ttft_s": ttft})
        chosen = best_within(snapshot, candidates, ttft, request.slo.ttft_s, lead=resident)
        if chosen is not None:
            return verdict_on(snapshot.ids[chosen], None, "meets the TTFT target", alternatives)
        hopeless = fastest_prefill_seconds(snapshot, request) > request.slo.ttft_s
        if not hopeless and self.limits.decode_spares_one(snapshot, self.slo):
            flipped = flip(snapshot, Role.PREFILL, "inline")
            if flipped is not None:
                why = missed(Role.PREFILL, request, snapshot, candidates, ttft)
                return verdict_on_flipped(flipped, None, MISSED_TTFT, alternatives, why)
        chosen = prefill_beside_decodes(request, snapshot)
        reason = "beside decodes: no prefill instance meets the TTFT target, no flip is due"
        if chosen is None:
            chosen = best(snapshot, candidates, ttft, lead=resident)
            reason = "best effort: all miss the TTFT target, no flip is due"
        return verdict_on(snapshot.ids[chosen], None, reason, alternatives)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Stay on the prefill instance if that decodes; else place where the TPOT target is met; else flip,
        when the prefill pool spares an instance; else place, or stay, where the pressure is least."""
        if may_decode(snapshot, prefill_on):
            return verdict_on(prefill_on, prefill_on, "its prefill instance decodes: no transfer")
        candidates = pool(snapshot, Role.DECODE)
        candidates = with_room(
            snapshot, candidates, request.prompt_tokens, prefill_on, self.limits.kv_reserve
        )
        queued, over = decode_cost(request)
        alternatives = compared(
            snapshot, candidates, {"prefill_resident_tokens": queued, "tokens_over_limit": over}
        )
        chosen = best_within(snapshot, candidates, over, 0.0, lead=queued)
        if chosen is not None:
            return verdict_on(prefill_on, snapshot.ids[chosen], "meets the TPOT target", alternatives)
        if self.limits.prefill_spares_one(snapshot, self.slo):
            flipped = flip(snapshot, Role.DECODE, "inline", cooldown_s=self.cooldown_s)
            if flipped is not None:
                why = missed(Role.DECODE, request, snapshot, candidates, over)
                return verdict_on_flipped(flipped, prefill_on, MISSED_TPOT, alternatives, why)
        held = snapshot.index.get(prefill_on)
        chosen, pressure = least_pressed(request, snapshot, held, 1.0 - self.limits.kv_reserve)
        reason = "best effort: all miss the TPOT target, no flip is legal"
        if chosen == held and pressure <= 1.0:
            reason = "beside prefills: no decode instance meets the TPOT target, no flip is due"
        return verdict_on(prefill_on, snapshot.ids[chosen], reason, alternatives)


@dataclass(frozen=True, slots=True)
class LendingMonitor(ArrowMonitor):
    """Algorithm 2, in which full KV counts as load too, and nothing is lent that the prefill pool needs."""

    limits: LendingLimits = field(default_factory=LendingLimits)

    def decide(self, snapshot: Snapshot, state: int) -> ControlDecision[int]:
        """Return at most one flip."""
        prefill, decode = prefill_pool_load(snapshot, self.slo), decode_pool_load(snapshot, self.slo)
        loads = f"prefill load {prefill:.2f}, decode load {decode:.2f}"
        decode = max(decode, decode_fullness(snapshot, self.slo))
        needed = decode >= self.limits.needy or prefill <= self.shrink <= decode
        high = needed and self.limits.prefill_spares_one(snapshot, self.slo)
        return self.flip_once_sustained(snapshot, state, high, loads)


def prefill_beside_decodes(request: Request, snapshot: Snapshot) -> int | None:
    """Return the decode instance that meets the TTFT target and keeps its own decodes within theirs.

    Prefills may take the share of its time that its decode step leaves of the TPOT target. None when no
    instance is free enough. Of several, the least busy one.
    """
    own_s, step_share = own_prefill_s(request, snapshot), step_s(request, 1.0 / request.slo.tpot_s)

    def busy_share(cells: Cells, at: At, costs: ProfileTable) -> Any:
        queue_s = cells[Field.PREFILL_QUEUE_S, at] + own_s(cells, at, costs)
        return cells[Field.PREFILL_DEMAND, at] + queue_s / HORIZON_S + step_share(cells, at, costs)

    candidates = with_room(snapshot, snapshot.labels.decoding, request.prompt_tokens)
    candidates = at_most(snapshot, candidates, ttft_s(snapshot, request), request.slo.ttft_s)
    return best_within(snapshot, candidates, busy_share, 1.0)


def least_pressed(request: Request, snapshot: Snapshot, held: int | None, usable: float) -> tuple[int, float]:
    """Return where a decode hurts least, of the decode instances and ``held``, and the pressure there.

    ``held`` is the prefill instance that has the KV already; None where it is gone. ``usable`` is the share
    of the KV that may be used. Up to a pressure of 1 the targets are kept.
    """
    moved = pressure(request, float(request.prompt_tokens), usable)
    if held is None:
        chosen = best(snapshot, pool(snapshot, Role.DECODE), moved)
        return chosen, price_at(snapshot, moved, chosen)
    here = price_at(snapshot, pressure(request, 0.0, usable), held)
    other = best_within(snapshot, snapshot.labels.decoding, moved, here)
    if other is None:
        return held, here
    there = price_at(snapshot, moved, other)
    return (held, here) if (here, held) < (there, other) else (other, there)


def pressure(request: Request, moved_tokens: float, usable: float) -> Price:
    """Return the larger of two shares, with the request: the predicted gap, which prefills beside stretch, of
    the TPOT target; and the KV in use of the ``usable`` part of it (0 where the capacity is unknown).

    ``moved_tokens`` of KV come with the request.
    """
    step_share = step_s(request, 1.0 / request.slo.tpot_s)

    def price(cells: Cells, at: At, costs: ProfileTable) -> float | Column:
        gap_share = step_share(cells, at, costs) / (1.0 - lesser(cells[Field.PREFILL_DEMAND, at], 0.95))
        capacity = cells[Field.KV_CAPACITY_TOKENS, at]
        in_use = capacity - cells[Field.FREE_TOKENS, at] + moved_tokens
        return greater(gap_share, in_use / (usable * greater(capacity, 1.0)))

    return price


def decode_fullness(snapshot: Snapshot, slo: Slo, *, fewer: int = 0) -> float:
    """Return the larger of the decode step over ``slo.tpot_s`` and the share of KV in use.

    Both as if every decode of the fleet, and the KV that waits for one, were spread evenly over the instances
    labelled for decode, ``fewer`` of them; inf when none is left.
    """
    decoding = snapshot.labelled(Role.DECODE)
    members = int(np.count_nonzero(decoding))
    left = members - fewer
    if left < 1:
        return math.inf
    requests = float(snapshot.decode_requests.sum())
    tokens = float(snapshot.decode_tokens.sum() + snapshot.handoff_tokens.sum())
    predicted_s = snapshot.costs.step.seconds(requests / left, tokens / left)
    if isinstance(predicted_s, np.ndarray):
        predicted_s = float(predicted_s[decoding].mean())
    capacity = float(snapshot.kv_capacity_tokens[decoding].sum()) * left / members
    return max(predicted_s / slo.tpot_s, tokens / capacity if capacity else 0.0)


def expected_wait_s(snapshot: Snapshot, *, fewer: int = 0) -> float:
    """Return the expected wait before a prefill with ``fewer`` instances labelled for it; inf where it grows.

    Sakasegawa's approximation for an M/G/c queue (1977), from the demand and the squares of the last windows:
    a large pool waits less at the same use, and unequal prompts wait more.
    """
    left = int(np.count_nonzero(snapshot.labelled(Role.PREFILL))) - fewer
    demand = float(np.add.reduce(snapshot.prefill_demand))
    use = demand / left if left > 0 else math.inf
    if use >= 1.0:
        return math.inf
    if demand <= 0.0:
        return 0.0
    residual_s = float(np.add.reduce(snapshot.prefill_squares_s)) / (2.0 * demand)
    return float(use ** (math.sqrt(2.0 * (left + 1)) - 1.0)) / (left * (1.0 - use)) * residual_s
