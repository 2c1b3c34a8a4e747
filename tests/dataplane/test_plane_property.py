"""The data plane under random legs: leap equals step, blocks are conserved, every leg ends once."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from plane_cases import CASES, PlaneCase, PlaneRun

THOROUGH = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@THOROUGH
@given(case=CASES)
def test_leap_equals_step(case: PlaneCase) -> None:
    leap, step = PlaneRun(case, leap=True).run(), PlaneRun(case, leap=False).run()
    for jumped, walked in zip(leap.told, step.told, strict=True):
        assert jumped.story == walked.story
        assert len(jumped.tokens_s) == len(walked.tokens_s)
        if walked.end_s is not None:
            assert jumped.end_s == pytest.approx(walked.end_s, rel=1e-9)
            assert jumped.tokens_s[0] == pytest.approx(walked.tokens_s[0], rel=1e-9)
    assert leap.steps == step.steps


@THOROUGH
@given(case=CASES)
def test_legs_end_once_and_leave_nothing_behind(case: PlaneCase) -> None:
    run = PlaneRun(case, leap=True).run(audit=True)
    for told, (_, _, answer) in zip(run.told, run.choices, strict=True):
        assert (told.end_s is None) == told.aborted
        assert told.aborted or len(told.tokens_s) == answer
    for instance in run.cluster.instances:
        assert instance.batcher.blocks.free == instance.batcher.blocks.total
        assert not instance.batcher.running and not instance.batcher.waiting
