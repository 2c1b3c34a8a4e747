"""DOPD's manager: it holds the split that the forecast needs, and moves there before the load does.

Once per forecast it plans (``plan``) for the highest rate that is likely until an instance that is asked for
now would serve; each role has its own start-up time. *Hysteresis*: a pool has the most that any two of the
newest plans in a row wanted, so it grows with the second one and shrinks once all agree, later where that
was taken back before (``hysteresis``). *Dead band*: a plan wants less only if less would do for more than is
expected, and more only if what there is would not do for less. *Idle shrink*: without requests for a while
the fleet goes to its least at once (the released code does the same). *Emergency*: between the periods, a
pool whose queue or KV says that it is short now gets an instance, or on a full budget one of the other's.

It is always a split: instances that do both are left to ``Sizing.mixed_attains`` (the plan is made without
them), for neither the label nor the target of a mixed fleet exists here.

The control plane executes the targets, flips first. Everything is a function of the snapshot and the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from tidegate.core.decision import ControlDecision, SetTarget
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.core.load_forecast import LoadForecast
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.dopd.forecast_traffic import (
    decode_rate_rps,
    expected_traffic,
    peak_rate_rps,
    serving_model,
)
from tidegate.policies.dopd.hysteresis import Pool
from tidegate.policies.dopd.plan import REACHED, Rates, attains, best_split, smallest_fleet
from tidegate.policies.dopd.pool_loads import Emergency, PoolLoads
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.service import Values
from tidegate.policies.protocols import Signal

Split = tuple[int, int]
"""Prefill and decode instances."""
NO_SPLIT: Split = (0, 0)


@dataclass(frozen=True, slots=True)
class DopdConstants:
    """All ours but ``idle_s`` (the released code's 50 s).

    ``level`` is the share of requests to size for, with gaps of ``gaps_scv`` between arrivals, at a rate the
    share ``prefill_upper`` or ``decode_upper`` of the way from the forecast to the end of its interval (its
    0.9 quantile): the TTFT target lets a prefill queue wait out the shortest bursts. The newest
    ``agreeing`` plans have to want less of a pool, with the rate ``dead_band`` above the forecast one and of
    the misses that ``level`` allows the share ``safer``; to want more it has to be so with the rate as much
    below and ``laxer`` times the misses: tails of few requests are noise. On a
    fixed fleet flips have to gain a share ``flip_gain`` of predicted goodput. Emergencies are
    ``emergency_gap_s`` apart; an instance that one adds stays as long as plans count, and one that it lends
    keeps its label for ``lent_s``. A fit that is still going on is waited for up to ``settle_s``.
    """

    tick_s: float = 5.0
    level: float = 0.99
    gaps_scv: float = 2.0
    prefill_upper: float = 0.0
    decode_upper: float = 0.5
    agreeing: int = 12
    dead_band: float = 0.1
    safer: float = 0.5
    laxer: float = 2.0
    flip_gain: float = 0.05
    idle_s: float = 50.0
    emergency_gap_s: float = 15.0
    lent_s: float = 60.0
    settle_s: float = 2.0
    trend_ticks: int = 6
    correction_weight: float = 0.05


@dataclass(frozen=True, slots=True)
class DopdState:
    """What is remembered from tick to tick.

    ``target`` is the split that the fleet has or was asked to get, ``asked_s`` when; ``pools`` have what the
    newest plans wanted of each, ``planned_s`` the time of the last forecast that one was made of; ``queues``
    the prompts that waited per prefill instance; ``busy_s`` when a request was there last; ``corrections``
    observed over predicted times of prefills and of decode steps; ``saying`` the reason that holds until the
    next plan.
    """

    target: Split = NO_SPLIT
    asked_s: float = -np.inf
    pools: tuple[Pool, Pool] = (Pool(), Pool())
    planned_s: float = -np.inf
    queues: tuple[float, ...] = ()
    busy_s: float = -np.inf
    emergency_s: float = -np.inf
    corrections: tuple[float, float] = (1.0, 1.0)
    saying: str = "holding because there is no forecast yet"


@dataclass(frozen=True, slots=True)
class DopdController:
    """Plans the two pools for ``slo``.

    ``fleet`` is the least and the most instances; None keeps those that there are and changes labels alone.
    ``start_delay_s`` are those of a prefill and of a decode instance, until starts were seen. With ``advise``
    it says what it would do, and does nothing. Raises ConfigError for a fleet that has no room for two pools.
    """

    slo: Slo
    fleet: tuple[int, int] | None = None
    start_delay_s: tuple[float, float] = (30.0, 45.0)
    advise: bool = False
    constants: DopdConstants = field(default_factory=DopdConstants)
    name: str = "dopd"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE, Signal.FORECAST})

    def __post_init__(self) -> None:
        check_two_pools(self.fleet)

    @property
    def period_s(self) -> float:
        return self.constants.tick_s

    def initial(self) -> DopdState:
        return DopdState()

    def decide(self, snapshot: Snapshot, state: DopdState) -> ControlDecision[DopdState]:
        """See ``Controller.decide``."""
        prefill_s, decode_s = self.start_delay_s
        seen_s = snapshot.start_s
        delays_s = seen_s.get(Role.PREFILL, prefill_s), seen_s.get(Role.DECODE, decode_s)
        return replace(self, start_delay_s=delays_s)._decide(snapshot, state)

    def _decide(self, snapshot: Snapshot, state: DopdState) -> ControlDecision[DopdState]:
        now, fleet = snapshot.at_s, snapshot.without_draining()
        if not fleet.ids:
            return ControlDecision(state, reason="no instance is up")
        pools = PoolLoads.of(fleet)
        state = self._observed(state, fleet, pools)
        have = (pools.prefill, pools.decode)
        if self.fleet is None and sum(have) < 2:
            return ControlDecision(state, reason="holding because one instance does both")
        before = state.target
        if not pools.requests and now - state.busy_s > self.constants.idle_s:
            state = self._idle(state)
        else:
            urgent = self._emergency(state, pools, now)
            state = urgent or self._planned(state, fleet, pools)
        if self.advise:
            would = f"would have {_words(state.target)}, has {_words(have)}: " if state.target != have else ""
            return ControlDecision(state, reason=would + state.saying)
        lost = state.target != have and now - state.asked_s >= max(self.start_delay_s)
        if state.target == before and not lost:
            return ControlDecision(state, reason=state.saying)
        asked = SetTarget(*state.target, state.saying)
        return ControlDecision(replace(state, asked_s=now), (asked,), state.saying)

    def _observed(self, state: DopdState, fleet: Snapshot, pools: PoolLoads) -> DopdState:
        """Take what the snapshot shows into the state; a fixed fleet's target is what is up, as labelled."""
        have = (pools.prefill, pools.decode)
        target = state.target
        if target == NO_SPLIT or (self.fleet is None and sum(target) != sum(have)):
            target = max(1, have[0] - (not have[1])), max(1, have[1] - (not have[0]))
        return replace(
            state,
            target=target,
            asked_s=fleet.at_s if state.target == NO_SPLIT else state.asked_s,
            queues=(*state.queues, pools.waiting)[-self.constants.trend_ticks :],
            busy_s=fleet.at_s if pools.requests or state.busy_s == -np.inf else state.busy_s,
            corrections=_corrected(state.corrections, fleet, self.constants.correction_weight),
        )

    def _idle(self, state: DopdState) -> DopdState:
        """Shrink to the least without waiting for plans to agree."""
        if self.fleet is None or sum(state.target) <= self.fleet[0]:
            return replace(state, saying=f"holding {_words(state.target)} because nothing comes")
        decode = max(1, round(self.fleet[0] * state.target[1] / sum(state.target)))
        least = max(1, self.fleet[0] - decode), min(decode, self.fleet[0] - 1)
        return replace(
            state, target=least, pools=(Pool(), Pool()), saying=f"{_words(least)} because nothing comes"
        )

    def _emergency(self, state: DopdState, pools: PoolLoads, now: float) -> DopdState | None:
        """Return the state with one more instance where a pool is short now; None where none is."""
        emergency = Emergency.of(pools, state.queues, self.slo)
        why = "; ".join(filter(None, (emergency.prefill, emergency.decode)))
        if not why or now - state.emergency_s < self.constants.emergency_gap_s:
            return None
        prefill, decode = state.target
        if emergency.prefill:
            # What is queued is to be gone in the time that an instance takes to start; one that does counts.
            waiting = pools.queue_s * pools.prefill / max(1.0, self.start_delay_s[0])
            prefill = max(prefill, pools.prefill + 1, math.ceil(pools.demand + waiting))
        if emergency.decode:
            decode = max(decode, pools.decode + 1)
        most = sum(state.target) if self.fleet is None else self.fleet[1]
        lent = emergency.lends(pools, self.slo)
        if lent:
            step = 1 if emergency.prefill else -1
            prefill, decode = state.target[0] + step, state.target[1] - step
        elif (
            (prefill, decode) == state.target
            or prefill + decode > most
            or not emergency.lasts(pools, self.start_delay_s[0], self.slo)
        ):
            return None
        wanted = (prefill, decode)
        saying = f"{_words(wanted)} in an emergency: {why}"
        state = replace(state, emergency_s=now)
        if lent:
            return replace(state, target=wanted, saying=saying)
        return self._becoming(self._confirming(self._confirming(state, wanted), wanted), wanted, saying)

    def _confirming(self, state: DopdState, wanted: Split) -> DopdState:
        """Take one more plan into the state."""
        prefill, decode = state.pools
        agreeing = self.constants.agreeing
        return replace(
            state, pools=(prefill.planned(wanted[0], agreeing), decode.planned(wanted[1], agreeing))
        )

    def _becoming(self, state: DopdState, target: Split, saying: str) -> DopdState:
        """Change the target."""
        (prefill, decode), (p, d), agreeing = state.pools, state.target, self.constants.agreeing
        pools = prefill.became(p, target[0], agreeing), decode.became(d, target[1], agreeing)
        return replace(state, target=target, pools=pools, saying=saying)

    def _planned(self, state: DopdState, fleet: Snapshot, pools: PoolLoads) -> DopdState:
        """Plan once per forecast."""
        forecast, now = fleet.forecast, fleet.at_s
        if forecast is None or forecast.at_s <= state.planned_s:
            return state
        settles = forecast.rate_rps.reason and now - forecast.at_s < self.constants.settle_s
        if settles and now + self.period_s < forecast.at_s + forecast.period_s:
            return state
        state = replace(state, planned_s=forecast.at_s)
        try:
            return self._planned_with(state, fleet, pools, forecast)
        except ConfigError as error:  # lengths that no instance's KV holds
            return replace(state, saying=f"holding {_words(state.target)} because {error.message}")

    def _planned_with(
        self, state: DopdState, fleet: Snapshot, pools: PoolLoads, forecast: LoadForecast
    ) -> DopdState:
        model = serving_model(fleet, *state.corrections)
        known = forecast.rate_rps.high[0] >= 0
        traffic = expected_traffic(forecast, self.constants.gaps_scv) if known else None
        if traffic is None:
            return replace(state, saying="holding because no answer's length is known yet")
        # A plan that comes a period later has to be in time for what follows.
        delays_s = (forecast.period_s,) * 2 if self.fleet is None else self.start_delay_s
        prefill_s, decode_s = (delay_s + forecast.period_s for delay_s in delays_s)
        lifetime_s = max(1.0, Sizing(traffic, model, self.slo).lifetime_s)
        rates_rps = (
            peak_rate_rps(forecast, prefill_s, self.constants.prefill_upper),
            decode_rate_rps(forecast, decode_s, self.constants.decode_upper, pools.requests, lifetime_s),
        )
        sizing = Sizing(replace(traffic, rate_rps=rates_rps[0]), model, self.slo)
        source = forecast.rate_rps
        told = f" (by {source.source}, for {source.reason})" if source.reason else ""
        if self.fleet is None:
            return self._relabelled(state, sizing, rates_rps, told)
        return self._resized(state, sizing, rates_rps, told)

    def _relabelled(self, state: DopdState, sizing: Sizing, rates_rps: Rates, told: str) -> DopdState:
        """Plan a fixed fleet: hold what attains, else take the split that serves most."""
        level, have = self.constants.level, state.target
        attained = attains(sizing, rates_rps, *have).both
        share = f"{100 * attained:.1f} % of {rates_rps[0]:.3g} requests/s attain{told}"
        words = f"holding {_words(have)} because {share}"
        wanted = min(level, REACHED * sizing.at_best.both)
        if attained >= wanted:
            return replace(state, saying=words)
        plan = best_split(sizing, sum(have), level, mixed=False)
        gain = 1.0 + self.constants.flip_gain
        if (plan.goodput_rps or 0.0) <= gain * sizing.split_goodput_rps(*have, wanted):
            return replace(state, saying=f"{words}, and no other split serves clearly more")
        better = (plan.prefill, plan.decode)
        return replace(state, target=better, saying=f"{_words(better)}: {plan.reason}{told}")

    def _resized(self, state: DopdState, sizing: Sizing, rates_rps: Rates, told: str) -> DopdState:
        """Plan a fleet that grows and shrinks: the most that any of the newest plans wanted."""
        level = self.constants.level
        wanted, reason = self._smallest(sizing, rates_rps, level)
        pools = tuple(zip(wanted, state.target, strict=True))
        if any(want < have for want, have in pools):
            safe, _ = self._smallest(
                sizing, self._beside(rates_rps, 1.0), self._missing(self.constants.safer)
            )
            wanted = _between(wanted, state.target, safe)
        if any(want > have for want, have in pools):
            least, _ = self._smallest(
                sizing, self._beside(rates_rps, -1.0), self._missing(self.constants.laxer)
            )
            wanted = _kept(wanted, state.target, least)
        state, agreeing = self._confirming(state, wanted), self.constants.agreeing
        prefill, decode = state.pools
        held = prefill.held(state.target[0], agreeing), decode.held(state.target[1], agreeing)
        if self.fleet and sum(held) > self.fleet[1]:
            held = wanted if sum(wanted) == self.fleet[1] else state.target
        lent = state.planned_s - state.emergency_s < self.constants.lent_s
        if lent and sum(held) == sum(state.target):
            return replace(
                state, saying=f"holding {_words(state.target)} because an emergency just relabelled"
            )
        if held != state.target:
            return self._becoming(state, held, f"{_words(held)}: {reason}{told}")
        why = ""
        if wanted[0] > held[0] or wanted[1] > held[1]:
            why = f" because one plan alone wants {_words(wanted)}"
        elif wanted != held:
            plans = zip(prefill.wanted[-agreeing:], decode.wanted[-agreeing:], strict=True)
            agreed = sum(p < held[0] or d < held[1] for p, d in plans)
            why = f" because {agreed} of {agreeing} plans want less, the newest {_words(wanted)}"
        return replace(state, saying=f"holding {_words(held)}{why}: {reason}{told}")

    def _beside(self, rates_rps: Rates, side: float) -> Rates:
        factor = 1.0 + side * self.constants.dead_band
        return factor * rates_rps[0], factor * rates_rps[1]

    def _missing(self, factor: float) -> float:
        return 1.0 - factor * (1.0 - self.constants.level)

    def _smallest(self, sizing: Sizing, rates_rps: Rates, level: float) -> tuple[Split, str]:
        """Return the fewest instances, with why; what a least fleet has beyond them goes where it attains
        most."""
        assert self.fleet is not None
        sizing = replace(sizing, traffic=replace(sizing.traffic, rate_rps=rates_rps[0]))
        plan = smallest_fleet(sizing, level, budget=self.fleet[1], mixed=False, decode_rate_rps=rates_rps[1])
        split = (plan.prefill, plan.decode)
        while sum(split) < self.fleet[0]:
            more = ((split[0] + 1, split[1]), (split[0], split[1] + 1))
            split = max(more, key=lambda each: attains(sizing, rates_rps, *each).both)
        return split, plan.reason


def check_two_pools(fleet: tuple[int, int] | None) -> None:
    """Raise ConfigError for a least and a most number of instances between which no two pools fit."""
    if fleet is None:
        return
    least, most = fleet
    if most < 2:
        raise ConfigError(f"a budget of {most} instances has no room for a prefill and a decode pool")
    if not 2 <= least <= most:
        raise ConfigError(f"a fleet of {least}..{most} instances: two pools take at least 2")


def _between(wanted: Split, target: Split, cautious: Split) -> Split:
    """Return ``wanted``, where it is less than ``target`` no less than ``cautious``."""
    pools = zip(wanted, target, cautious, strict=True)
    prefill, decode = (want if want >= have else min(have, safe) for want, have, safe in pools)
    return prefill, decode


def _kept(wanted: Split, target: Split, least: Split) -> Split:
    """Return ``wanted``, but ``target`` where that is enough with ``least``."""
    pools = zip(wanted, target, least, strict=True)
    prefill, decode = (have if want > have >= low else want for want, have, low in pools)
    return prefill, decode


def _corrected(known: tuple[float, float], fleet: Snapshot, weight: float) -> tuple[float, float]:
    """Return smoothed observed over predicted times: of prefills, and of steps where nothing prefills.

    Prefills that shared a step took less than predicted, which the model knows: they count as right.
    """
    prefilling = fleet.labelled(Role.PREFILL) & (fleet.prefill_requests > 0) & (fleet.prefill_slowness > 0)
    decoding = fleet.labelled(Role.DECODE) & (fleet.decode_requests > 0) & (fleet.mean_gap_s > 0)
    decoding &= fleet.prefill_requests == 0
    steps_s = np.asarray(fleet.costs.step.seconds(fleet.decode_requests, fleet.decode_tokens))
    seen: tuple[tuple[Values, Callable[[Values], Values]], ...] = (
        (fleet.prefill_slowness[prefilling], lambda ratio: np.maximum(1.0, ratio)),
        (fleet.mean_gap_s[decoding] / steps_s[decoding], lambda ratio: ratio),
    )
    prefill, step = (
        float(was + weight * (np.clip(counted(ratio).mean(), 0.5, 3.0) - was)) if len(ratio) else was
        for was, (ratio, counted) in zip(known, seen, strict=True)
    )
    return prefill, step


def _words(split: Split) -> str:
    return f"{split[0]} + {split[1]}"
