"""When plans of labels agree: after as many answers as lengths are believed from, for the same fleet."""

from __future__ import annotations

import pytest

from tidegate.core.decision import Flip
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.policies.protocols import AnswerLengths
from tidegate.policies.tidegate.labels import FleetShape, ShapeState
from tidegate.policies.tidegate.shape import RecentLengths
from tidegate_testing import FAST, cluster, request

P, M = Role.PREFILL, Role.MIXED
LONG, SHORT = AnswerLengths(15_000, 0, 150), AnswerLengths(290, 0, 370)


def shape(answers: int, length: AnswerLengths = LONG) -> FleetShape:
    return FleetShape(RecentLengths([length] * answers), Slo(2.0, 0.05))


@pytest.mark.parametrize(
    ("length", "before"),
    [
        (SHORT, ShapeState()),
        (LONG, ShapeState(-1, known=(99, 0.0, 8, 0))),
        (LONG, ShapeState(1, wanted=1, known=(99, 0.0, 8, 0))),
    ],
    ids=["what there is", "fewer", "more, and was carried out"],
)
def test_a_split_grows_only_as_many_answers_after_a_plan_that_wanted_something_else(
    length: AnswerLengths, before: ShapeState
) -> None:
    first = shape(100, length).decide(cluster(8, roles=(M,) * 8, profile=FAST).snapshot(10.0), before)
    prefill = len(first.actions)
    ledger, state = cluster(8, roles=(P,) * prefill + (M,) * (8 - prefill), profile=FAST), first.state
    for answers in (110, 120, 131):
        decision = shape(answers).decide(ledger.snapshot(10.0), state)
        assert not decision.actions and decision.state.plans > 0, answers
        state = decision.state
    assert shape(132).decide(ledger.snapshot(10.0), state).actions


def test_after_an_emergency_as_many_answers_pass() -> None:
    ledger = cluster(4, roles=(P, P, M, M), kv_capacity_tokens=1000)
    for on in ("i2", "i3"):
        ledger.prefill_dispatched(request(on, 999), on, 0.0)
        ledger.decode_dispatched(on, on, 999, 0.0)
    decision = shape(100).decide(ledger.snapshot(10.0), ShapeState())
    assert decision.actions and decision.state.since == 100


def test_a_split_shrinks_as_soon_as_two_plans_agree_and_by_the_lesser_of_the_last_two() -> None:
    ledger = cluster(8, roles=(P,) * 7 + (M,), profile=FAST)
    state = ShapeState(-3, wanted=6, since=99, known=(99, 0.0, 8, 7))
    (flip,) = shape(100, SHORT).decide(ledger.snapshot(10.0), state).actions
    assert isinstance(flip, Flip) and flip.to is M


def test_plans_of_another_fleet_do_not_count() -> None:
    """Two of six instances that prefill only are gone; one of those before wanted five."""
    state = ShapeState(-1, wanted=5, known=(99, 0.0, 8, 6))
    ledger = cluster(6, roles=(P,) * 4 + (M, M), profile=FAST)
    decision = shape(100, SHORT).decide(ledger.snapshot(10.0), state)
    assert not decision.actions and decision.state.plans == -1
