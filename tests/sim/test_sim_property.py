"""The simulator under random clusters and workloads: leap equals step, nothing is lost, nothing is random."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from sim_cases import CASES, Case, Ended, ended

THOROUGH = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def placed(result: Ended) -> tuple[object, ...]:
    return (
        result.outcome,
        result.prefill_on,
        result.decode_on,
        result.output_tokens,
        result.preemptions,
        result.kv_transfer_bytes,
        sorted(result.stages_s),
    )


def times(result: Ended) -> list[float]:
    reached = (result.first_token_s, result.last_token_s, result.end_s)
    return [at_s for at_s in reached if at_s is not None]


@THOROUGH
@given(case=CASES)
def test_leap_equals_step(case: Case) -> None:
    leap, _ = case.run(leap=True)
    step, _ = case.run(leap=False)
    for jumped, walked in zip(ended(leap), ended(step), strict=True):
        assert placed(jumped) == placed(walked)
        assert times(jumped) == pytest.approx(times(walked), rel=1e-9)
        for stage, seconds in walked.stages_s.items():
            assert jumped.stages_s[stage] == pytest.approx(seconds, rel=1e-9, abs=1e-9)
    assert (leap.flips, leap.migrations) == (step.flips, step.migrations)
    assert [use.steps for use in leap.instances] == [use.steps for use in step.instances]


@THOROUGH
@given(case=CASES)
def test_every_request_ends_once_and_kv_fits(case: Case) -> None:
    # The run itself audits the ledger, the blocks and that each request has one end.
    run, _ = case.run(leap=True)
    assert len(run.requests) == case.requests
    offered = Counter((record.input_tokens, record.output_tokens) for record in case.trace())
    for result in ended(run):
        if result.ok:
            offered[result.input_tokens, result.output_tokens] -= 1
            assert result.first_token_s is not None and result.last_token_s is not None
            assert result.arrival_s < result.first_token_s <= result.last_token_s == result.end_s
            assert all(seconds >= -1e-12 for seconds in result.stages_s.values())
        else:
            assert result.outcome in ("prompt_too_long", "engine_unreachable")
    for use in run.instances:
        assert 0 <= use.most_kv_blocks <= use.kv_blocks
    assert all(left >= 0 for left in offered.values())
    assert run.migrations == sum(result.migrations for result in ended(run))


@settings(THOROUGH, max_examples=25)
@given(case=CASES)
def test_equal_inputs_give_equal_journals(case: Case) -> None:
    assert case.run(leap=True)[1] == case.run(leap=True)[1]
