"""Which instances prefill only, and which do both: what the arithmetic of the traffic says (ours)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.core.decision import ControlDecision, Flip
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Column, Snapshot
from tidegate.policies.protocols import Signal
from tidegate.policies.starting_roles import TARGET
from tidegate.policies.tidegate.cost import room_to_grow
from tidegate.policies.tidegate.offered import Offered
from tidegate.policies.tidegate.relief import relief
from tidegate.policies.tidegate.shape import FleetLabels, FluidFleet, MeanRequest, RecentLengths

USUAL_S = 900.0
"""Over so long what is usually offered is a mean (ours)."""


@dataclass(frozen=True, slots=True)
class ShapeConstants:
    """All ours. A split is taken where that gains the share ``gain`` of what the fleet serves, and of what it
    would if all did both; it is given up where all for both serve as much. Labels change where ``agreeing``
    plans in a row say so; of shapes within ``even`` of the best it is that with most instances that do both,
    for bursts are met by whoever is free. Of the last two plans the one that changes less is carried out, as
    a whole: a fleet that changes one by one comes too late for bursts. Lengths are believed from ``fewest``
    answers on, and plans of more instances for prefill only as many answers after the last plan that did not
    want more: where traffic changes, the means are those of neither kind for a while. Up to ``units`` steps
    of a fleet are compared. Where decodes take more than ``crowded`` of their TPOT target or of the KV, one
    of those for prefill does both at once, whatever plans say, and for ``rest_s`` there are no more than the
    others, and for ``remembered_s`` only where less is to decode (see ``Rest``). A fleet that does both
    everywhere stays so while less is offered (``Offered``) than the share ``easy`` of what it serves, and one
    that is split goes back below half of that.
    """

    gain: float = 0.05
    even: float = 0.02
    agreeing: int = 2
    fewest: int = 32
    units: int = 32
    crowded: float = 0.95
    easy: float = 0.5
    rest_s: float = 900.0
    remembered_s: float = 86_400.0
    calmer: float = 0.7
    period_s: float = 1.0


class Rest(NamedTuple):
    """Until ``until_s`` at most ``most`` instances prefill only.

    Plans believe in the same split again when a rest is over. Where decodes were crowded because the model
    errs, at constant load, that would come and go for ever. So for ``remembered_s`` after a rest no split is
    tried that would keep those that decode busy for more than ``calmer`` of the ``share`` of their time that
    it was when decodes were crowded. The number that prefill only may be one higher then, and another one
    for every ``rest_s`` since.
    """

    most: int = 0
    until_s: float = -inf
    share: float = inf

    def bound(self, instances: int, at_s: float, busy: float, constants: ShapeConstants) -> int:
        """Return how many of ``instances`` may prefill only at ``at_s``; ``busy`` of them would have decodes
        all the time."""
        if at_s < self.until_s:
            return min(instances, self.most)
        since_s = at_s - self.until_s
        bound = self.most + 1 + since_s / constants.rest_s
        if since_s < constants.remembered_s and self.share < inf:
            calm = instances - busy / max(constants.calmer * self.share, 1e-9)
            bound = min(bound, max(calm, self.most))
        return int(min(instances, bound))

    def after(self, most: int, at_s: float, share: float, constants: ShapeConstants) -> Rest:
        """Return the rest that begins at ``at_s``. It remembers the lower share, if the last one is not
        forgotten."""
        if at_s < self.until_s + constants.remembered_s:
            share = min(share, self.share)
        return Rest(most, at_s + constants.rest_s, share)


class ShapeState(NamedTuple):
    """How many of the newest plans in a row wanted more prefill instances (negative: fewer), and how many
    the newest ``wanted``. ``since``: how many answers there were when a plan last disagreed. ``warm``: the
    traffic was known before the first plan, so that this one is carried out at once. ``known``: what the last
    plan was made of, answers so far, tokens of those that run, and how many instances there are, and prefill
    only."""

    plans: int = 0
    wanted: int = 0
    since: int = 0
    rest: Rest = Rest()
    warm: bool = False
    known: tuple[int, float, int, int] = (0, 0.0, 0, 0)
    offered: Offered = Offered()
    usual: Offered = Offered(over_s=USUAL_S)


@dataclass(frozen=True, slots=True)
class FleetShape:
    """Once per period compares what the fleet serves as it is labelled with what it would serve otherwise.

    Two labels suffice: an instance that only decodes would leave prompts of a burst to fewer, and one that
    does both is one as soon as nothing is sent to it. Of a fleet that is sized, ``most`` is what it may grow
    to. Below that all do both, for more load is answered by more instances: a split that serves more than
    comes only has short answers wait for their KV.
    """

    lengths: RecentLengths
    slo: Slo
    constants: ShapeConstants = field(default_factory=ShapeConstants)
    most: int | None = None
    name: str = "shape"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    @property
    def period_s(self) -> float:
        return self.constants.period_s

    def initial(self) -> ShapeState:
        """Return the state for the first decision."""
        return ShapeState(warm=self.lengths.count >= self.constants.fewest)

    def decide(self, snapshot: Snapshot, state: ShapeState) -> ControlDecision[ShapeState]:
        """Return the flips towards a better shape; none while plans do not agree on one."""
        constants, fleet = self.constants, snapshot.without_draining()
        begun = snapshot.placed_prefills + snapshot.held_prefills
        offered, usual = (each.after(begun, fleet.at_s) for each in (state.offered, state.usual))
        state = state._replace(offered=offered, usual=usual)
        rows = snapshot.requests
        running = float(rows.answer_tokens[rows.decode_on >= 0].sum())
        demand = self.lengths.demand(running)
        busy = _kept_busy(fleet, demand, usual.rps(0.0))
        prefill = int(np.count_nonzero(fleet.labelled(Role.PREFILL)))
        if prefill and (share := self._crowding(fleet)) > constants.crowded:
            why = f"decodes take {share:.0%} of what they may: fewer instances prefill only"
            # What crowds is the load of now where it is above the usual one, as in a spike.
            busy = _kept_busy(fleet, demand, max(usual.rps(0.0), offered.rps(0.0)))
            share_busy = busy / max(1, len(fleet) - prefill)
            rest = state.rest.after(prefill - 1, fleet.at_s, share_busy, constants)
            rests = ShapeState(rest=rest, offered=offered, usual=usual, since=self.lengths.count)
            flips = flips_to(fleet, prefill - 1, why)
            return ControlDecision(rests, (*flips, *relief(snapshot, flips, why)), why)
        if self.most is not None and len(fleet) < self.most:
            why = f"{len(fleet)} of {self.most} instances are up: all do both"
            return ControlDecision(state._replace(plans=0, warm=False), tuple(flips_to(fleet, 0, why)), why)
        if demand is None or self.lengths.count < constants.fewest or len(fleet) < 2:
            unknown = "too little is known of the traffic, or one instance does both"
            return ControlDecision(state._replace(plans=0), reason=unknown)
        known = self.lengths.count, running, len(fleet), prefill
        if state.known == known:
            return ControlDecision(state, reason="nothing is known that the last plan did not know")
        if state.known[2] and state.known[2:] != known[2:]:
            state = state._replace(plans=0)  # those before were of another fleet
        state = state._replace(known=known)
        most = state.rest.bound(len(fleet), fleet.at_s, busy, constants)
        waiting = float(snapshot.prefill_requests.sum()) + snapshot.held_prefills
        load_rps = inf if state.warm else state.offered.rps(waiting)
        count = self.lengths.count
        told, wanted = self._compared(fleet, demand, prefill, most, load_rps)
        if state.warm:
            state = state._replace(warm=False, since=count)
            return ControlDecision(state, tuple(flips_to(fleet, wanted, told)), told)
        if wanted == prefill:
            swaps = flips_to(fleet, prefill, "others lose less by it")
            return ControlDecision(state._replace(plans=0, since=count), tuple(swaps), told)
        direction = 1 if wanted > prefill else -1
        plans, since, agreed = direction, state.since, wanted
        if state.plans * direction > 0:
            plans += state.plans
            agreed = min(wanted, state.wanted) if direction > 0 else max(wanted, state.wanted)
        elif state.plans:
            since = count
        state = state._replace(plans=plans, wanted=wanted, since=since)
        if abs(plans) < constants.agreeing:
            return ControlDecision(state, reason=f"{told}: once more")
        if direction > 0 and (lacking := since + constants.fewest - count) > 0:
            return ControlDecision(state, reason=f"{told}: {lacking} more answers")
        state = state._replace(plans=0, since=count)
        return ControlDecision(state, tuple(flips_to(fleet, agreed, told)), told)

    def _compared(
        self, fleet: Snapshot, demand: MeanRequest, prefill: int, most: int, load_rps: float
    ) -> tuple[str, int]:
        """Return a sentence and how many instances should prefill only, ``most`` of them or fewer: as many as
        do, unless that gains."""
        constants, count = self.constants, len(fleet)
        slowness, order, usual = _slowness(fleet), prefill_order(fleet), _usual(fleet)
        kv_tokens = float(fleet.kv_capacity_tokens[usual]) or inf
        token_bytes = float(fleet.kv_bytes_per_token[usual])
        reads = bool(fleet.extends_kv.all()) and token_bytes > 0.0
        model = FluidFleet(fleet.costs.at(usual), kv_tokens, token_bytes, demand, self.slo, reads)
        counts = slowness[usual] / slowness[order]
        unit = max(1, count // constants.units)
        ranked = [pair for pair in model.ranked(counts, unit) if pair[1].prefill <= most]
        have = FleetLabels(prefill, count - prefill)
        prefills = np.array([counts[fleet.labelled(Role.PREFILL)[order]].sum(), 0.0])
        now_rps, both_rps = map(float, model.rates_rps(prefills, counts.sum() - prefills))
        easy = constants.easy * (0.5 if prefill else 1.0)
        if load_rps < easy * both_rps:
            return f"{load_rps:.3g} requests/s come or wait, all for both serve {both_rps:.3g}", 0
        enough_rps = ranked[0][0] * (1.0 - constants.even)
        near = [pair for pair in ranked if pair[0] >= enough_rps]
        rps, best = max(near, key=lambda pair: pair[1].mixed)
        told = f"{have} serve {now_rps:.3g} requests/s, {best} would serve {rps:.3g}"
        if rps < both_rps * (1.0 + constants.gain):
            # What the split gains over a fleet that does both is less than what bursts may cost it.
            return f"{told}, all for both {both_rps:.3g}", 0 if both_rps >= now_rps else prefill
        gains = rps >= now_rps * (1.0 + constants.gain)
        return told, best.prefill if gains else prefill

    def _crowding(self, fleet: Snapshot) -> float:
        """Return the mean share of the TPOT target, or of the KV, that decodes take where they may run. What
        is left of the KV is enough where all that run can grow into it."""
        at, crowded = fleet.labels.decoding_mask, self.constants.crowded
        step_s = np.asarray(fleet.costs.step.seconds(fleet.decode_requests, fleet.decode_tokens))[at]
        capacity = np.where(fleet.kv_capacity_tokens > 0, fleet.kv_capacity_tokens, inf)
        enough = np.maximum(crowded * capacity, capacity - room_to_grow(fleet))
        held = crowded * ((fleet.decode_tokens + fleet.handoff_tokens) / enough)[at]
        return float(max((step_s / self.slo.tpot_s).mean(), held.mean())) if at.any() else 1.0


def _kept_busy(fleet: Snapshot, demand: MeanRequest | None, rps: float) -> float:
    """Return how many instances' time the decodes of ``rps`` would take, without the fixed part of steps;
    infinitely many where nothing is known of them."""
    if demand is None or rps == inf:
        return inf
    step = fleet.costs.at(_usual(fleet)).step
    step_s = float(step.seconds(1.0, demand.context_tokens)) - float(step.seconds(0.0, 0.0))
    return rps * demand.steps * step_s


def _usual(fleet: Snapshot) -> int:
    """Return the column of an instance that is as slow as most."""
    return int(np.argsort(_slowness(fleet), kind="stable")[(len(fleet) - 1) // 2])


def _slowness(fleet: Snapshot) -> Column:
    """Return how many times as long each instance takes for a token of a prompt as the fastest."""
    return _over_least(fleet.costs.mixed.b_s, len(fleet))


def _over_least(coefficient: float | Column, instances: int) -> Column:
    """Return a coefficient over its least; 1 everywhere where some fit says 0."""
    column: Column = np.full(instances, coefficient, np.float64)
    least = float(column.min())
    return column / least if least > 0.0 else np.ones(instances)


def prefill_order(fleet: Snapshot) -> NDArray[np.intp]:
    """Return the columns in the order in which they become instances for prefill only.

    First are those that lose least by it: whose steps are slow for what their prompts take. Of instances that
    are alike in this the slow ones are, for what is the same in every step spends more of the TPOT target
    there; then those that prefill only already, and those with the least to decode.
    """
    held: Column = fleet.decode_tokens + fleet.handoff_tokens
    slowness = _slowness(fleet)
    prompts_over_steps = np.round(slowness / _over_least(fleet.costs.step.a_s, len(fleet)), 3)
    return np.lexsort((held, ~fleet.labelled(Role.PREFILL), -np.round(slowness, 3), prompts_over_steps))


def flips_to(fleet: Snapshot, prefill: int, why: str) -> list[Flip]:
    """Return the flips after which ``prefill`` instances prefill only and the others do both, as far as those
    that cannot be flipped allow."""
    flippable = fleet.flippable
    fixed = int(np.count_nonzero(fleet.labelled(Role.PREFILL) & ~flippable))
    order = [at for at in prefill_order(fleet).tolist() if flippable[at]]
    roles = [Role.PREFILL if place < prefill - fixed else Role.MIXED for place in range(len(order))]
    return [
        Flip(fleet.ids[at], role, TARGET, why)
        for at, role in sorted(zip(order, roles, strict=True))
        if fleet.role[at] != float(role)
    ]
