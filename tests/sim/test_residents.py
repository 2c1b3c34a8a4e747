"""Runs that stand for a part of a longer one: residents at the start, and an end before answers end."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import Replica
from tidegate.experiments.setting import SimulatedFleet
from tidegate.sim import simulate
from tidegate.systems import make_system
from tidegate.workloads.residents import MidAnswers
from tidegate.workloads.trace import TraceRecord, Workload


def replicas(count: int) -> list[Replica]:
    return list(SimulatedFleet(((packaged_profile("h100_sxm/llama-3.1-70b/tp4"), count),)).replicas())


def steady(count: int, gap_s: float, answers: tuple[int, ...] = (400, 2000)) -> Workload:
    return Workload.of(TraceRecord(gap_s * i, 200, answers[i % len(answers)]) for i in range(count))


def test_long_answers_are_found_as_often_as_they_last_long_at_any_of_their_tokens() -> None:
    drawn = list(islice(MidAnswers(steady(10, 1.0, (101, 301, 1)), 1.0).drawn(), 4000))
    answers = np.array([record.output_tokens for record, _ in drawn])
    tokens = np.array([tokens for _, tokens in drawn])
    assert set(answers) == {101, 301}
    assert np.mean(answers == 301) == pytest.approx(300 * 3 / (300 * 3 + 100 * 4), abs=0.03)
    assert tokens.min() >= 1 and (tokens < answers).all()
    assert tokens[answers == 301].mean() == pytest.approx(150.5, rel=0.03)
    assert drawn == list(islice(MidAnswers(steady(10, 1.0, (101, 301, 1)), 1.0).drawn(), 4000))


@pytest.mark.parametrize("name", ["colocated", "minimal-load", "tidegate"])
def test_a_fleet_with_residents_is_as_full_as_one_that_has_run_for_long(name: str) -> None:
    """Behind 500 s of arrivals to an empty fleet, and behind 35 s to one with residents."""
    answers, gap_s = (1500, 4500), 0.5
    there = MidAnswers(steady(100, gap_s, answers), 1 / gap_s)
    gaps_s = []
    for residents, before_s in ((None, 500), (there, 35), (None, 35)):
        before = int(before_s / gap_s)
        workload = steady(before + 60, gap_s, answers)
        run = simulate(
            workload,
            make_system(name),
            replicas(2),
            residents=residents,
            until_s=float(workload.arrival_s[-1]),
        )
        assert len(run.requests) == before + 60
        gaps_s.append(float(np.nanmean(run.requests.tpot_s[before : before + 40])))
    settled_s, filled_s, empty_s = gaps_s
    assert filled_s == pytest.approx(settled_s, rel=0.07)
    assert empty_s < 0.9 * settled_s


def test_residents_are_in_no_result_and_end() -> None:
    workload = steady(100, 0.1, (20, 40))
    run = simulate(workload, make_system("colocated"), replicas(2), residents=MidAnswers(workload, 10.0))
    assert len(run.requests) == 100 and run.requests.ok.all()
    again = simulate(workload, make_system("colocated"), replicas(2), residents=MidAnswers(workload, 10.0))
    assert (run.requests.end_s == again.requests.end_s).all()


def test_an_answer_that_is_cut_off_counts_as_far_as_it_came() -> None:
    """Its next token is taken to come at the end, so that one that stalls shows."""
    records = [TraceRecord(0.0, 100, 20), TraceRecord(0.0, 100, 8000), TraceRecord(30.0, 100, 5)]
    workload = Workload.of(records)
    table = simulate(workload, make_system("colocated"), replicas(1), until_s=30.0).requests
    assert [table.outcomes[code] for code in table.outcome.tolist()] == ["ok", "ok", "unfinished"]
    assert table.attained.tolist() == [True, True, False]
    whole, cut = table.output_tokens[:2].tolist()
    assert whole == 20 and 30.0 / 0.05 < cut < 8000
    assert table.end_s[1] == table.last_token_s[1] == 30.0
    alone = simulate(workload[1:2], make_system("colocated"), replicas(1)).requests
    assert table.tpot_s[1] == pytest.approx(alone.tpot_s[0], rel=0.05)
