"""DOPD's manager: it holds the split that the forecast needs, and moves there before the load does.

Once per forecast it plans (``plan``) for the highest rate that is likely until an instance that is asked for
now would serve; each role has its own start-up time. *Hysteresis*: a pool has the most that any two of the
newest plans in a row wanted, so it grows with the second one and shrinks once all agree, later where that
was taken back before (``hysteresis``). *Dead band*: a plan wants less only if less would do for more than is
expected, and more only if what there is would not do for less. *Idle shrink*: without requests for a while
the fleet goes to its least at once (the released code does the same). *Emergency*: between the periods, a
pool whose queue or KV says that it is short now gets an instance, or on a full budget one of the other's.

Which pools there are is ``pools``: DOPD has two (``two_pools``), and its plan knows no mixed instances.

The control plane executes the targets, flips first. Everything is a function of the snapshot and the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import lt

import numpy as np

from tidegate.core.decision import ControlDecision
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
from tidegate.policies.dopd.plan import REACHED, Rates, attains, best_split
from tidegate.policies.dopd.pool_loads import Emergency, PoolLoads
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.service import Values
from tidegate.policies.dopd.two_pools import Counts, Shortage, SizedPools, TwoPools
from tidegate.policies.protocols import Signal


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

    ``target`` is what each pool has or was asked to get, empty before the first look, ``asked_s`` when;
    ``pools`` have what the newest plans wanted of each, ``planned_s`` the time of the last forecast that one
    was made of; ``queues`` the prompts that waited per prefill instance; ``busy_s`` when a request was there
    last; ``corrections`` observed over predicted times of prefills and of decode steps; ``saying`` the reason
    that holds until the next plan.
    """

    target: Counts = ()
    asked_s: float = -np.inf
    pools: tuple[Pool, ...] = ()
    planned_s: float = -np.inf
    queues: tuple[float, ...] = ()
    busy_s: float = -np.inf
    emergency_s: float = -np.inf
    corrections: tuple[float, float] = (1.0, 1.0)
    saying: str = "holding because there is no forecast yet"


@dataclass(frozen=True, slots=True)
class DopdController:
    """Plans the pools for ``slo``.

    ``fleet`` is the least and the most instances; None keeps those that there are and changes labels alone.
    ``start_delay_s`` are those of a prefill and of a decode instance, until starts were seen. With ``advise``
    it says what it would do, and does nothing. Raises ConfigError for a fleet that has no room for ``pools``.
    """

    slo: Slo
    fleet: tuple[int, int] | None = None
    start_delay_s: tuple[float, float] = (30.0, 45.0)
    advise: bool = False
    constants: DopdConstants = field(default_factory=DopdConstants)
    pools: SizedPools = field(default_factory=TwoPools)
    name: str = "dopd"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE, Signal.FORECAST})

    def __post_init__(self) -> None:
        self.pools.check(self.fleet)

    @property
    def period_s(self) -> float:
        return self.constants.tick_s

    def initial(self) -> DopdState:
        return DopdState()

    def decide(self, snapshot: Snapshot, state: DopdState) -> ControlDecision[DopdState]:
        """See ``Controller.decide``."""
        told_s, seen_s = self.start_delay_s, snapshot.start_s
        prefill_s, decode_s = map(seen_s.get, self.pools.roles, told_s)
        return replace(self, start_delay_s=(prefill_s, decode_s))._decide(snapshot, state)

    def _decide(self, snapshot: Snapshot, state: DopdState) -> ControlDecision[DopdState]:
        now, fleet = snapshot.at_s, snapshot.without_draining()
        if not fleet.ids:
            return ControlDecision(state, reason="no instance is up")
        pools = PoolLoads.of(fleet)
        have = self.pools.have(fleet)
        state = self._observed(state, fleet, pools, have)
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
        asked = self.pools.asked(state.target, state.saying)
        return ControlDecision(replace(state, asked_s=now), (asked,), state.saying)

    def _observed(self, state: DopdState, fleet: Snapshot, pools: PoolLoads, have: Counts) -> DopdState:
        """Take what the snapshot shows into the state; a fixed fleet's target is what is up, as labelled."""
        target = state.target
        if not target or (self.fleet is None and sum(target) != sum(have)):
            target = self.pools.first(have)
        return replace(
            state,
            target=target,
            pools=state.pools or (Pool(),) * len(target),
            asked_s=state.asked_s if state.target else fleet.at_s,
            queues=(*state.queues, pools.waiting)[-self.constants.trend_ticks :],
            busy_s=fleet.at_s if pools.requests or state.busy_s == -np.inf else state.busy_s,
            corrections=_corrected(state.corrections, fleet, self.constants.correction_weight),
        )

    def _idle(self, state: DopdState) -> DopdState:
        """Shrink to the least without waiting for plans to agree."""
        if self.fleet is None or sum(state.target) <= self.fleet[0]:
            return replace(state, saying=f"holding {_words(state.target)} because nothing comes")
        least = self.pools.least(self.fleet[0], state.target)
        pools = (Pool(),) * len(least)
        return replace(state, target=least, pools=pools, saying=f"{_words(least)} because nothing comes")

    def _emergency(self, state: DopdState, pools: PoolLoads, now: float) -> DopdState | None:
        """Return the state with one more instance where a pool is short now; None where none is."""
        emergency = Emergency.of(pools, state.queues, self.slo)
        why = "; ".join(filter(None, (emergency.prefill, emergency.decode)))
        if not why or now - state.emergency_s < self.constants.emergency_gap_s:
            return None
        most = sum(state.target) if self.fleet is None else self.fleet[1]
        shortage = Shortage(emergency, pools, self.slo, self.start_delay_s[0], most)
        wanted, lent = self.pools.relieved(state.target, shortage)
        if wanted == state.target:
            return None
        saying = f"{_words(wanted)} in an emergency: {why}"
        state = replace(state, emergency_s=now)
        if lent:
            return replace(state, target=wanted, saying=saying)
        return self._becoming(self._confirming(self._confirming(state, wanted), wanted), wanted, saying)

    def _confirming(self, state: DopdState, wanted: Counts) -> DopdState:
        """Take one more plan into the state."""
        pools = zip(state.pools, wanted, strict=True)
        return replace(
            state, pools=tuple(pool.planned(want, self.constants.agreeing) for pool, want in pools)
        )

    def _becoming(self, state: DopdState, target: Counts, saying: str) -> DopdState:
        """Change the target."""
        pools = tuple(
            pool.became(has, becomes, self.constants.agreeing)
            for pool, has, becomes in zip(state.pools, state.target, target, strict=True)
        )
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
        level = self.constants.level
        have = state.target[0], state.target[-1]
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
        held = tuple(pool.held(has, agreeing) for pool, has in zip(state.pools, state.target, strict=True))
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
        if any(want > holds for want, holds in zip(wanted, held, strict=True)):
            why = f" because one plan alone wants {_words(wanted)}"
        elif wanted != held:
            plans = zip(*(pool.wanted[-agreeing:] for pool in state.pools), strict=True)
            agreed = sum(any(map(lt, plan, held)) for plan in plans)
            why = f" because {agreed} of {agreeing} plans want less, the newest {_words(wanted)}"
        return replace(state, saying=f"holding {_words(held)}{why}: {reason}{told}")

    def _beside(self, rates_rps: Rates, side: float) -> Rates:
        factor = 1.0 + side * self.constants.dead_band
        return factor * rates_rps[0], factor * rates_rps[1]

    def _missing(self, factor: float) -> float:
        return 1.0 - factor * (1.0 - self.constants.level)

    def _smallest(self, sizing: Sizing, rates_rps: Rates, level: float) -> tuple[Counts, str]:
        assert self.fleet is not None
        sizing = replace(sizing, traffic=replace(sizing.traffic, rate_rps=rates_rps[0]))
        return self.pools.smallest(sizing, rates_rps, level, self.fleet)


def _between(wanted: Counts, target: Counts, cautious: Counts) -> Counts:
    """Return ``wanted``, where it is less than ``target`` no less than ``cautious``."""
    pools = zip(wanted, target, cautious, strict=True)
    return tuple(want if want >= have else min(have, safe) for want, have, safe in pools)


def _kept(wanted: Counts, target: Counts, least: Counts) -> Counts:
    """Return ``wanted``, but ``target`` where that is enough with ``least``."""
    pools = zip(wanted, target, least, strict=True)
    return tuple(have if want > have >= low else want for want, have, low in pools)


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


def _words(counts: Counts) -> str:
    return " + ".join(map(str, counts))
