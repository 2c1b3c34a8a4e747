"""The data plane under random legs: leap equals step, blocks are conserved, every leg ends once."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.dataplane.plane_cases import CASES, PlaneCase, PlaneRun
from tests.slow import examples

QUICK = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(QUICK, max_examples=examples(2000))


def leap_is_step(case: PlaneCase) -> None:
    """To the last bit, with every block of every instance counted after every event."""
    leap, step = (PlaneRun(case, leap=mode).run(audit=True) for mode in (True, False))
    for jumped, walked in zip(leap.told, step.told, strict=True):
        assert jumped.story == walked.story
        assert len(jumped.tokens_s) == len(walked.tokens_s)
        assert jumped.tokens_s[:1] == walked.tokens_s[:1]
        assert (jumped.end_s, jumped.aborted) == (walked.end_s, walked.aborted)
    assert leap.steps == step.steps
    for one, other in zip(leap.cluster.instances, step.cluster.instances, strict=True):
        assert one.batcher.blocks.most_used == other.batcher.blocks.most_used


def legs_end_once_and_leave_nothing_behind(case: PlaneCase) -> None:
    run = PlaneRun(case, leap=True).run(audit=True)
    for told, (_, _, answer) in zip(run.told, run.choices, strict=True):
        assert (told.end_s is None) == told.aborted
        assert told.aborted or len(told.tokens_s) == answer
    for instance in run.cluster.instances:
        assert instance.batcher.blocks.free == instance.batcher.blocks.total
        assert not instance.batcher.running and not instance.batcher.waiting
        dues = instance.batcher.decode.dues
        assert dues is None or not len(dues)


@QUICK
@given(case=CASES)
def test_leap_equals_step(case: PlaneCase) -> None:
    leap_is_step(case)


@pytest.mark.slow
@MANY
@given(case=CASES)
def test_leap_equals_step_many_times(case: PlaneCase) -> None:
    leap_is_step(case)


@QUICK
@given(case=CASES)
def test_legs_end_once_and_leave_nothing_behind(case: PlaneCase) -> None:
    legs_end_once_and_leave_nothing_behind(case)


@pytest.mark.slow
@MANY
@given(case=CASES)
def test_legs_end_once_and_leave_nothing_behind_many_times(case: PlaneCase) -> None:
    legs_end_once_and_leave_nothing_behind(case)
