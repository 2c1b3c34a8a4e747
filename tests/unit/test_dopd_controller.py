"""DOPD's controller: when it moves, when it holds, and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tidegate.core.decision import ControlDecision, SetTarget
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.core.load_forecast import LoadForecast, SeriesForecast
from tidegate.core.slo import Slo
from tidegate.ledger.ledger import Ledger
from tidegate.policies.dopd.controller import DopdConstants, DopdController, DopdState
from tidegate.policies.dopd.forecast_traffic import decode_rate_rps, expected_traffic, peak_rate_rps
from tidegate.policies.starting_roles import SplitRoles
from tidegate.systems import make_system
from tidegate_testing import cluster, instance, request
from tidegate_testing.builders import REFERENCE

SLO = Slo(0.5, 0.05)
CONSTANTS = DopdConstants()
PROMPT, ANSWER = 2000.0, 200.0


def series(mean: float, high: float | None = None, reason: str = "") -> SeriesForecast:
    means = np.full(6, mean)
    highs = means if high is None else np.full(6, high)
    return SeriesForecast(means, means, highs, "ewma", reason)


def forecast(at_s: float, rate_rps: float, high_rps: float | None = None, reason: str = "") -> LoadForecast:
    """Return what is expected at a time: a rate of equal prompts and answers."""
    lengths = (series(PROMPT), series(PROMPT**2), series(ANSWER), series(ANSWER**2))
    return LoadForecast(at_s, 30.0, PROMPT, series(rate_rps, high_rps, reason), *lengths, series(0.5))


@dataclass
class Played:
    """A controller on a fleet that becomes at once what is asked for; requests decode somewhere."""

    controller: DopdController
    ledger: Ledger = field(default_factory=lambda: cluster(4))
    now: float = 0.0

    def __post_init__(self) -> None:
        self.state: DopdState = self.controller.initial()
        self.busy(1)

    def busy(self, decodes: int) -> None:
        for number in range(decodes):
            self.ledger.prefill_dispatched(request(f"d{number}", 10), self.ledger.ids[0], self.now)
            self.ledger.prefill_ended(f"d{number}", self.now)
            self.ledger.decode_dispatched(f"d{number}", self.ledger.ids[1], 11, self.now)

    def tick(self, seconds: float = 5.0) -> ControlDecision[DopdState]:
        self.now += seconds
        decision = self.controller.decide(self.ledger.snapshot(self.now), self.state)
        self.state = decision.state
        for action in decision.actions:
            assert isinstance(action, SetTarget)
            loaded, known = self.ledger.load_forecast, [str(name) for name in self.ledger.ids]
            roles = SplitRoles(action.n_prefill, action.n_decode)(action.n_prefill + action.n_decode)
            for name in known:
                self.ledger.instance_down(name, self.now)
            for at, role in enumerate(roles):
                self.ledger.instance_up(instance(f"i{at}"), REFERENCE, role, self.now)
            self.ledger.load_forecast = loaded
            self.busy(1) if not decision.reason.endswith("nothing comes") else None
        return decision

    def plan(self, rate_rps: float, high_rps: float | None = None) -> ControlDecision[DopdState]:
        """Make a forecast and decide."""
        self.ledger.load_forecast = forecast(self.now + 30.0, rate_rps, high_rps)
        return self.tick(30.0)

    def plan_twice(self, rate_rps: float, high_rps: float | None = None) -> ControlDecision[DopdState]:
        """Confirm a plan."""
        self.plan(rate_rps, high_rps)
        return self.plan(rate_rps, high_rps)

    @property
    def split(self) -> tuple[int, int]:
        snapshot = self.ledger.snapshot(self.now)
        prefill, decode = (int(snapshot.labelled(role).sum()) for role in (Role.PREFILL, Role.DECODE))
        return prefill, decode


def elastic(least: int = 2, most: int = 12, **options: object) -> Played:
    return Played(DopdController(SLO, (least, most), **options))  # type: ignore[arg-type]


def test_it_grows_with_the_second_plan_and_shrinks_once_all_agree() -> None:
    played = elastic()
    alone = played.plan(60.0)
    assert not alone.actions and "because one plan alone wants 3 + 2" in alone.reason
    played.plan(60.0)
    grown = played.split
    assert sum(grown) > 4
    low = [played.plan(5.0) for _ in range(CONSTANTS.agreeing - 1)]
    assert all(not decision.actions for decision in low[:-1])
    assert low[2].reason.startswith(
        f"holding {grown[0]} + {grown[1]} because 3 of {CONSTANTS.agreeing} plans want"
    )
    assert "needs 0.2 prefill instances because 5 requests/s take" in low[2].reason
    assert low[-1].actions and sum(played.split) < sum(grown)


def test_the_interval_and_not_the_mean_is_sized_for() -> None:
    sure, unsure = (elastic(constants=replace(CONSTANTS, prefill_upper=0.25)) for _ in range(2))
    sure.plan_twice(20.0)
    unsure.plan_twice(20.0, 120.0)
    assert unsure.split[0] > sure.split[0]


def test_a_dead_band_keeps_what_a_little_more_would_need() -> None:
    wide, none = (elastic(constants=replace(CONSTANTS, agreeing=1, dead_band=band)) for band in (0.1, 0.0))
    for played in (wide, none):
        played.plan(60.0)
    rates = np.linspace(60.0, 10.0, 51)
    needed = []
    for rate in rates:
        none.plan(float(rate))
        needed.append(sum(none.split))
    step = next(at for at, total in enumerate(needed) if total < needed[0])
    for rate in rates[: step + 1]:
        wide.plan(float(rate))
    assert sum(wide.split) == needed[0], "just below the step the dead band holds"
    wide.plan(float(rates[step]) / 1.2)
    assert sum(wide.split) < needed[0]


def test_a_budget_bounds_both_ends() -> None:
    played = elastic(3, 5)
    decision = played.plan_twice(500.0)
    assert sum(played.split) == 5 and "a budget of 5 holds" in decision.reason
    for _ in range(2 * CONSTANTS.agreeing):
        played.plan(0.1)
    assert sum(played.split) == 3


@pytest.mark.parametrize("fleet", [(1, 1), (1, 4), (4, 3), (0, 2)])
def test_a_budget_below_two_pools_is_refused(fleet: tuple[int, int]) -> None:
    for name in ("dopd", "dopd-code", "dynamo-load", "dynamo-sla"):
        with pytest.raises(ConfigError, match="pool"):
            make_system(name, fleet=fleet)


def test_without_requests_it_shrinks_at_once() -> None:
    played = elastic()
    played.plan_twice(60.0)
    played.ledger.aborted("d0", played.now)
    for _ in range(int(CONSTANTS.idle_s // 5)):
        assert not played.tick().actions
    assert played.tick().reason.endswith("because nothing comes") and sum(played.split) == 2


def queue_prompts(played: Played, count: int, tokens: int = 4000) -> None:
    snapshot = played.ledger.snapshot(played.now)
    prefilling = [snapshot.ids[at] for at in snapshot.labelled(Role.PREFILL).nonzero()[0]]
    for number in range(count):
        name = prefilling[number % len(prefilling)]
        played.ledger.prefill_dispatched(request(f"q{played.now}.{number}", tokens), name, played.now)


def test_a_queue_that_an_instance_would_still_find_is_an_emergency() -> None:
    played = elastic()
    played.plan(5.0)
    before = played.state.target
    queue_prompts(played, 1000)
    decision = played.tick()
    assert decision.reason.startswith(f"{before[0] + 1} + ") or played.state.target[0] > before[0]
    assert "in an emergency: " in decision.reason and "prompts wait per prefill instance" in decision.reason
    queue_prompts(played, 1000)
    assert not played.tick().actions, "the next one has to wait"


def test_on_a_fixed_fleet_only_labels_change() -> None:
    played = Played(DopdController(SLO), cluster(6))
    assert played.plan(10.0).reason.startswith("holding 3 + 3 because 100.0 % of 10 requests/s attain")
    decision = played.plan(100.0)
    assert sum(played.split) == 6 and played.split[0] > 3
    assert "of 6 instances" in decision.reason
    assert not played.plan(100.0).actions


def test_gaps_hold_and_a_late_fit_is_named() -> None:
    played = elastic()
    assert played.tick().reason == "holding because there is no forecast yet"
    assert "no answer's length is known" in played.plan(float("nan")).reason
    played.ledger.load_forecast = forecast(played.now + 4.5, 60.0, reason="the fit is not done yet")
    waiting = played.controller.decide(played.ledger.snapshot(played.now + 5.0), played.state)
    assert not waiting.actions, "a fit that is under way is waited for"
    assert played.tick(10.0).reason.endswith("(by ewma, for the fit is not done yet)")


def test_advice_changes_nothing() -> None:
    played = elastic(advise=True)
    decision = played.plan_twice(60.0)
    assert not decision.actions and played.split == (2, 2)
    assert decision.reason.startswith("would have ") and "has 2 + 2: " in decision.reason


def test_what_is_lost_is_asked_for_again() -> None:
    played = elastic()
    played.plan_twice(60.0)
    wanted = played.split
    played.ledger.instance_down(played.ledger.ids[-1], played.now)
    assert not played.tick().actions, "it may be about to return"
    played.tick(45.0)
    assert played.split == wanted


def test_a_pool_forgets_as_fast_as_answers_end() -> None:
    expected = forecast(0.0, 10.0, 20.0)
    assert peak_rate_rps(expected, 45.0, 0.5) == 15.0
    assert decode_rate_rps(expected, 60.0, 1.0, 0.0, 1.0) == pytest.approx(20.0)
    assert decode_rate_rps(expected, 60.0, 1.0, 3000.0, 1e6) == pytest.approx(0.003, rel=0.3)
    half = decode_rate_rps(expected, 30.0, 1.0, 240.0, 120.0)
    assert half == pytest.approx(2.0 * np.exp(-0.25) + 15.0 * (1 - np.exp(-0.25)))


def test_lengths_lean_to_the_forecast_as_far_as_it_tells_more() -> None:
    few = forecast(0.0, 1.0)
    known = np.tile((1000.0, 100.0), (300, 1))
    sampled = expected_traffic(few._replace(lengths=known), 1.0)
    assert sampled is not None
    assert 1000.0 < sampled.mean(sampled.input_tokens) < 1200.0
    many = expected_traffic(forecast(0.0, 1000.0)._replace(lengths=known), 1.0)
    assert many is not None and many.mean(many.input_tokens) > 1900.0
    made = expected_traffic(few._replace(input_tokens_squared=series(3 * PROMPT**2)), 1.0)
    assert made is not None
    assert made.mean(made.input_tokens) == pytest.approx(PROMPT, rel=0.01)
    assert made.input_tokens.std() > PROMPT


def test_starts_that_were_seen_count_for_the_lead_time_not_those_that_were_told() -> None:
    rising = forecast(30.0, 1.0)
    steps = np.array([1.0, 1.0, 1.0, 1.0, 60.0, 60.0])
    rising = rising._replace(rate_rps=SeriesForecast(steps, steps, steps, "ewma"))
    sizes = []
    for start_s in ({}, {Role.PREFILL: 130.0, Role.DECODE: 130.0}):
        played = Played(DopdController(SLO, (2, 16), (10.0, 10.0)))
        played.ledger.start_s = start_s
        for at_s in (30.0, 60.0):
            played.ledger.load_forecast = rising._replace(at_s=at_s)
            played.tick(30.0)
        sizes.append(sum(played.state.target))
    assert sizes[0] == 4 and sizes[1] > 4, "the rise is two minutes ahead"
