"""What ``tidegate`` learns of instances that are slower than the others of their fleet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tidegate.control.actions import Actions
from tidegate.core.decision import Rescale
from tidegate.core.instance import Role
from tidegate.costs.drift import MOST_RATIO
from tidegate.experiments.run import run_once
from tidegate.experiments.suites.stress import rows
from tidegate.ledger.ledger import Ledger
from tidegate.policies.tidegate.speed import ObservedSpeed, Speeds
from tidegate_testing import cluster, request

M = Role.MIXED


class Fleet:
    """Instances that prefill without a pause, each ``slowness`` times as long as predicted."""

    def __init__(self, *slowness: float, tokens: int = 1000) -> None:
        self.ledger: Ledger = cluster(len(slowness), roles=(M,) * len(slowness))
        self.speed, self.state = ObservedSpeed(), ObservedSpeed().initial()
        self.told: list[Rescale] = []
        self._slowness, self._tokens = slowness, tokens
        self._count = 0
        self.now = 0.0
        self.ledger.window_closed(0.0)
        self._alone_s = 0.0
        self._runs = [self._prefill(at, 0.0) for at in range(len(slowness))]

    def run(self, seconds: int) -> Speeds:
        """Let time pass, window by window, and do what is asked for."""
        for _ in range(seconds):
            self.now += 1.0
            for at, slowness in enumerate(self._slowness):
                while (ends_s := self._runs[at][1] + slowness * self._alone_s) < self.now:
                    self.ledger.prefill_ended(self._runs[at][0], ends_s)
                    self.ledger.finished(self._runs[at][0], ends_s)
                    self._runs[at] = self._prefill(at, ends_s)
            self.ledger.window_closed(self.now)
            decision = self.speed.decide(self.ledger.snapshot(self.now), self.state)
            self.state = decision.state
            for action in decision.actions:
                assert isinstance(action, Rescale)
                self.told.append(action)
                self.ledger.profile_scaled(action.instance, action.prefill, action.step)
        return self.state

    def _prefill(self, at: int, began_s: float) -> tuple[str, float]:
        """Begin a prefill; return its name and when it began."""
        self._count += 1
        name = f"r{self._count}"
        predicted_s = self.ledger.prefill_dispatched(request(name, self._tokens), f"i{at}", began_s)
        self._alone_s = self._alone_s or predicted_s
        return name, began_s


def test_an_instance_that_takes_twice_as_long_is_rescaled_once() -> None:
    fleet = Fleet(1.0, 2.0, 1.0, 1.0)
    fleet.run(60)
    (told,) = fleet.told
    assert told.instance == "i1" and told.prefill == told.step == pytest.approx(2.0, rel=0.05)


def test_an_instance_that_recovers_is_rescaled_back() -> None:
    fleet = Fleet(1.0, 1.0, 1.0)
    fleet.ledger.profile_scaled("i2", 3.0, 3.0)
    fleet.run(60)
    (told,) = fleet.told
    assert told.instance == "i2" and told.step == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("slowness", [(1.0, 1.15, 0.9, 1.0), (2.0, 2.0, 2.0, 2.0)])
def test_what_is_alike_for_all_and_small_differences_change_nothing(slowness: tuple[float, ...]) -> None:
    fleet = Fleet(*slowness)
    fleet.run(60)
    assert not fleet.told


def test_prefills_in_the_queue_may_be_done_already() -> None:
    """Prompts of 10 s end in few windows: between their ends an instance looks as if it did nothing."""
    fleet = Fleet(1.0, 1.0, 1.0, tokens=100_000)
    fleet.run(100)
    assert not fleet.told


def test_a_stall_counts_up_to_a_bound_and_one_instance_alone_says_nothing() -> None:
    alone = Fleet(3.0)
    alone.run(60)
    assert not alone.told
    fleet = Fleet(1.0, 100.0, 1.0, tokens=200)
    fleet.run(120)
    assert fleet.told and all(each.step <= MOST_RATIO for each in fleet.told)


def test_the_plane_learns_that_a_simulated_instance_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the others nothing."""
    found: list[tuple[str, float]] = []
    rescale = Actions.rescale

    def noted(self: Actions, instance: str, prefill: float, step: float, now: float) -> None:
        found.append((instance, step))
        rescale(self, instance, prefill, step, now)

    monkeypatch.setattr(Actions, "rescale", noted)
    (row,) = (
        each for each in rows(quick=True) if each.workload == "half-speed" and each.world.name == "ideal"
    )
    choice = replace(row.choice, duration_s=20.0)
    run_once(replace(replace(row, choice=choice).setting(), system="tidegate"), rate_rps=60.0)
    assert {name for name, _ in found} == {"i1"}
    product = 1.0
    for _, step in found:
        product *= step
    assert product == pytest.approx(2.0, rel=0.2)
