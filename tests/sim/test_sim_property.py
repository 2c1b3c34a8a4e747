"""The simulator under random clusters and workloads: leap equals step, nothing is lost, nothing is random."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings

from tests.sim.sim_cases import BINARY, CASES, EXPERTS, Case, ended
from tests.slow import examples
from tidegate.core.stages import TTFT_STAGES
from tidegate.sim import SimRun

QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(QUICK, max_examples=examples(1000))


def leap_is_step(case: Case) -> None:
    """Not to a relative 1e-9 only: every time of every request and every line of the journal are equal."""
    (leap, leap_journal), (step, step_journal) = case.run(leap=True), case.run(leap=False)
    for name, jumped, walked in columns(leap, step):
        np.testing.assert_array_equal(jumped, walked, err_msg=name)
    assert leap.timeline.flips == step.timeline.flips
    assert leap.instances == step.instances
    assert leap.end_s == step.end_s
    assert leap_journal == step_journal


def columns(leap: SimRun, step: SimRun) -> list[tuple[str, object, object]]:
    """Return what both runs have per request and over time."""
    pairs = [
        *((field.name, leap.requests, step.requests) for field in fields(leap.requests)),
        *((field.name, leap.timeline, step.timeline) for field in fields(leap.timeline)),
    ]
    both = [
        (name, getattr(one, name), getattr(other, name))
        for name, one, other in pairs
        if isinstance(getattr(one, name), np.ndarray)
    ]
    stages = leap.requests.stages_s
    return both + [(name, stages[name], step.requests.stages_s[name]) for name in stages]


def requests_end_once_and_kv_fits(case: Case) -> None:
    """The run itself audits the ledger, too."""
    run, journal = case.run(leap=True)
    outcomes = [row for row in map(json.loads, journal.splitlines()) if row["type"] == "outcome"]
    assert sorted(row["request"] for row in outcomes) == sorted(f"r{i}" for i in range(case.requests))
    assert len(run.requests) == case.requests
    offered = Counter((record.input_tokens, record.output_tokens) for record in case.trace())
    for result in ended(run):
        if result.ok:
            offered[result.input_tokens, result.output_tokens] -= 1
            assert result.first_token_s is not None and result.last_token_s is not None
            assert result.arrival_s < result.first_token_s <= result.last_token_s == result.end_s
            assert all(seconds >= -1e-12 for seconds in result.stages_s.values())
            ttft_s = result.first_token_s - result.arrival_s
            assert math.isclose(sum(result.stages_s[stage] for stage in TTFT_STAGES), ttft_s, abs_tol=1e-9)
        else:
            assert result.outcome in ("prompt_too_long", "engine_unreachable")
    for use in run.instances:
        assert 0 <= use.most_kv_blocks <= use.kv_blocks
    assert all(left >= 0 for left in offered.values())
    assert run.migrations == sum(result.migrations for result in ended(run))


A_TICK_AT_A_STEP_END = Case(
    system="arrow-lending",
    order="fifo",
    tied=True,
    instances=2,
    requests=4,
    seed=0,
    rate_rps=300.0,
    longest_prompt=900,
    longest_answer=1,
    kv_tokens=1600,
    block_tokens=1,
    max_batch_tokens=3,
    max_num_seqs=1,
    pool="",
    front_s=0.0,
    host_s=0.0,
    shared_link=False,
    lease_s=0.0517,
    heartbeat_s=0.0,
    sessions=0,
    troubled=False,
    profile=BINARY,
)
"""The timeline is sampled at the very end of a step that is leapt over."""


TWO_THAT_END_TOGETHER = Case(
    system="arrow-v1",
    order="fifo",
    tied=False,
    instances=2,
    requests=11,
    seed=3686,
    rate_rps=20.0,
    longest_prompt=40,
    longest_answer=30,
    kv_tokens=1600,
    block_tokens=1,
    max_batch_tokens=64,
    max_num_seqs=4,
    pool="moving",
    front_s=0.0,
    host_s=0.0007,
    shared_link=False,
    lease_s=30.0,
    heartbeat_s=0.0,
    sessions=3,
    troubled=False,
    profile=EXPERTS,
)
"""One of two decodes that end in one step left for a migration, and joined again behind the other."""


@QUICK
@example(A_TICK_AT_A_STEP_END)
@example(TWO_THAT_END_TOGETHER)
@given(case=CASES)
def test_leap_equals_step(case: Case) -> None:
    leap_is_step(case)


@pytest.mark.slow
@MANY
@given(case=CASES)
def test_leap_equals_step_many_times(case: Case) -> None:
    leap_is_step(case)


@QUICK
@given(case=CASES)
def test_every_request_ends_once_and_kv_fits(case: Case) -> None:
    requests_end_once_and_kv_fits(case)


@pytest.mark.slow
@MANY
@given(case=CASES)
def test_every_request_ends_once_and_kv_fits_many_times(case: Case) -> None:
    requests_end_once_and_kv_fits(case)


@settings(QUICK, max_examples=20)
@given(case=CASES)
def test_equal_inputs_give_equal_journals(case: Case) -> None:
    assert case.run(leap=True)[1] == case.run(leap=True)[1]


@settings(QUICK, max_examples=20)
@given(case=CASES)
def test_who_misses_is_told_once_and_in_time(case: Case) -> None:
    told: list[int] = []
    run, _ = case.run(leap=True, missed=told.append)
    assert sorted(told) == np.flatnonzero(~run.requests.attained).tolist()
