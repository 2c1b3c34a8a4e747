"""Controllers around the planners that DOPD is compared with: its released formula, and Dynamo's two.

They adjust once per interval, as the released code does: without hysteresis, and without asking whether what
they asked for is up. It skips an interval in which the counts changed; so do they. On a fixed fleet
(``fleet`` None) there is nothing to add: the counts' ratio is filled up to the fleet, rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tidegate.core.decision import ControlDecision, SetTarget
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.dopd.forecast_traffic import serving_model
from tidegate.policies.dopd.planners import IntervalLoad, PoolsSeen, dopd_code, dynamo_load, dynamo_sla
from tidegate.policies.dopd.pool_loads import PoolLoads
from tidegate.policies.dopd.service import ServingModel
from tidegate.policies.dopd.two_pools import Split, check_two_pools
from tidegate.policies.protocols import Signal

INTERVAL_S = 20.0
"""Seconds of an adjustment interval: the upper end of DOPD's experiments (10 to 20 s). The released default
is 180 s, which follows no load that changes within minutes."""
PULL_S = 5.0
"""Seconds between two looks at the queues."""
IDLE_S = 50.0
"""Seconds without requests after which the released code goes to its least pools."""


@dataclass(frozen=True, slots=True)
class PlannerState:
    """When the interval began, with which counts, and what it showed; ``busy_s`` as in ``DopdState``."""

    began_s: float = -np.inf
    had: Split = (0, 0)
    seen: tuple[PoolLoads, ...] = ()
    busy_s: float = -np.inf
    grace: int = 0
    saying: str = "the first interval has not ended"


Planned = Callable[[Snapshot, PlannerState, int], tuple[Split, PlannerState]]
"""The counts that a planner wants within a budget, by a state whose interval has just ended."""


@dataclass(frozen=True, slots=True)
class PlannerController:
    """Asks ``planned`` once per interval; a system's ``needs`` are those of the planner."""

    name: str
    planned: Planned
    fleet: tuple[int, int] | None = None
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})
    period_s: float = PULL_S

    def __post_init__(self) -> None:
        check_two_pools(self.fleet)

    def initial(self) -> PlannerState:
        return PlannerState()

    def decide(self, snapshot: Snapshot, state: PlannerState) -> ControlDecision[PlannerState]:
        """See ``Controller.decide``: look at the pools, and plan at the end of an interval."""
        now, there = snapshot.at_s, snapshot.without_draining()
        if len(there) < 2:
            return ControlDecision(state, reason="holding because there are no two instances")
        pools = PoolLoads.of(there)
        have = (pools.prefill, pools.decode)
        if state.began_s == -np.inf:
            state = replace(state, began_s=now, had=have, busy_s=now)
        busy_s = now if pools.requests else state.busy_s
        state = replace(state, seen=(*state.seen, pools), busy_s=busy_s)
        if now - state.began_s < INTERVAL_S:
            return ControlDecision(state, reason=f"holding {have[0]} + {have[1]}: {state.saying}")
        following = replace(state, began_s=now, had=have, seen=())
        if state.had != have:
            return ControlDecision(following, reason="holding because the counts changed in the interval")
        least, most = self.fleet or (len(there), len(there))
        if now - busy_s > IDLE_S:
            wanted, state = (1, 1), replace(state, saying="nothing comes")
        else:
            wanted, state = self.planned(snapshot, state, most)
        following = replace(following, grace=state.grace, saying=state.saying)
        wanted = _filled(wanted, least)
        if wanted == have:
            return ControlDecision(following, reason=f"holding {have[0]} + {have[1]}: {state.saying}")
        said = f"{wanted[0]} + {wanted[1]}: {state.saying}"
        return ControlDecision(following, (SetTarget(*wanted, said),), said)


def by_load(fleet: tuple[int, int] | None) -> Planned:
    """Return ``planners.dynamo_load`` on what was seen in the interval."""

    def planned(snapshot: Snapshot, state: PlannerState, budget: int) -> tuple[Split, PlannerState]:
        seen, (prefill, decode) = state.seen, state.had
        queues = [pools.waiting for pools in seen]
        shown = PoolsSeen(
            queues[0],
            queues[-1],
            float(np.mean(queues)),
            float(np.mean([pools.kv_share for pools in seen])),
            seen[-1].unroomed,
        )
        # On a fixed fleet what is added to one pool is the other's.
        most = budget + (fleet is None)
        *wanted, grace = dynamo_load(shown, prefill, decode, state.grace, budget=most)
        kv = f"decodes take {100 * shown.kv_share:.0f} % of their KV"
        said = f"{shown.mean_queue:.1f} prompts wait per prefill instance, {kv}"
        if fleet is None:
            wanted = [*_lent((prefill, decode), (wanted[0], wanted[1]))]
        return (wanted[0], wanted[1]), replace(state, grace=grace, saying=said)

    return planned


Counts = Callable[[IntervalLoad, ServingModel, int], Split]
"""Of a load on such instances within a budget."""


def by_forecast(counts: Counts) -> Planned:
    """Return ``counts`` of the mean load that is forecast for the next interval."""

    def planned(snapshot: Snapshot, state: PlannerState, budget: int) -> tuple[Split, PlannerState]:
        forecast = snapshot.forecast
        if forecast is None:
            return state.had, replace(state, saying="there is no forecast yet")
        means = (forecast.rate_rps, forecast.input_tokens, forecast.output_tokens)
        rate_rps, inputs, outputs = (float(each.mean[0]) for each in means)
        if not (rate_rps == rate_rps and inputs >= 1 and outputs >= 1):
            return state.had, replace(state, saying="no answer's length is known yet")
        load = IntervalLoad(rate_rps * INTERVAL_S, INTERVAL_S, inputs, outputs)
        try:
            wanted = counts(load, serving_model(snapshot, 1.0, 1.0), budget)
        except ConfigError as error:
            return state.had, replace(state, saying=error.message)
        said = f"{rate_rps:.3g} requests/s of {inputs:.0f} and {outputs:.0f} tokens are expected"
        return wanted, replace(state, saying=said)

    return planned


def code_counts(load: IntervalLoad, model: ServingModel, budget: int) -> Split:
    """Return ``planners.dopd_code``."""
    return dopd_code(load, model.profile, budget=budget)


def sla_counts(slo: Slo) -> Counts:
    """Return ``planners.dynamo_sla`` for a target."""

    def counts(load: IntervalLoad, model: ServingModel, budget: int) -> Split:
        return dynamo_sla(load, model.profile, slo.tpot_s, model.kv_capacity_tokens, budget=budget)

    return counts


def _filled(split: Split, least: int) -> Split:
    """Return the split; of less than ``least`` instances, its ratio filled up to as many."""
    if sum(split) >= least:
        return split
    prefill = min(max(1, round(least * split[0] / sum(split))), least - 1)
    return prefill, least - prefill


def _lent(have: Split, wanted: Split) -> Split:
    """Return the split of a fixed fleet of which the planner wants ``wanted``: the pool that grows takes one
    from the other, and one that shrinks gives it up to a pool that does not."""
    step = (wanted[0] > have[0]) - (wanted[0] < have[0]) - (wanted[1] > have[1]) + (wanted[1] < have[1])
    step = min(1, max(-1, step))
    prefill = min(max(1, have[0] + step), sum(have) - 1)
    return prefill, sum(have) - prefill
