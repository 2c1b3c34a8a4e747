"""The goodput search: few runs, in any order, and an honest answer when attainment is not monotone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.costs.library import packaged_profile
from tidegate.experiments.compare import best_candidate, search_candidates
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import find_limit, largest_limit
from tidegate.experiments.search import SearchSettings, raced_from
from tidegate.experiments.search import search_goodput as search
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.experiments.systems import Candidate
from tidegate.measure.percentiles import t_interval
from tidegate.reports.comparison import LevelGoodput
from tidegate.workloads.choice import WorkloadChoice


def search_goodput(
    attainment: Callable[[float, int], float], settings: SearchSettings, seeds: Sequence[int] = (0,)
) -> LevelGoodput:
    async def run(rate_rps: float, seed: int) -> float:
        return attainment(rate_rps, seed)

    return asyncio.run(search(settings, seeds, run))


@given(at_rps=st.floats(0.06, 5e3), level=st.sampled_from([0.90, 0.99]))
def test_finds_the_knee_wherever_the_guess_is(at_rps: float, level: float) -> None:
    found = search_goodput(
        lambda rate, seed: 1.0 if rate <= at_rps else 0.5,
        SearchSettings(level=level, low_rps=5.0, high_rps=20.0),
    )
    assert found.goodput_rps <= at_rps <= found.goodput_rps * 1.02
    assert found.low_rps == found.goodput_rps == found.high_rps and found.reason == ""
    assert len(found.probes) <= 16


@given(at_rps=st.floats(0.06, 5e3))
def test_a_seeds_search_is_credited_once_in_growing_steps(at_rps: float) -> None:
    credited: list[float] = []

    async def run(rate_rps: float, seed: int) -> float:
        return float(rate_rps <= at_rps * (1 + seed))

    asyncio.run(search(SearchSettings(low_rps=5.0, high_rps=20.0), (0, 1), run, None, credited.append))
    assert sum(credited) == pytest.approx(2.0) and min(credited) >= 0.0 and len(credited) > 6


def test_a_good_guess_takes_few_runs() -> None:
    found = search_goodput(
        lambda rate, seed: 1.0 if rate <= 61.7 else 0.3, SearchSettings(low_rps=50.0, high_rps=80.0)
    )
    assert len(found.probes) <= 8


def test_a_rate_that_meets_above_one_that_missed_does_not_count() -> None:
    def attainment(rate: float, seed: int) -> float:
        return 0.5 if 30 < rate < 40 or rate > 60 else 1.0

    found = search_goodput(attainment, SearchSettings(low_rps=20.0, high_rps=58.0))
    missed = [run.rate_rps for run in found.probes if run.attainment < 0.9]
    assert all(found.goodput_rps < rate for rate in missed)
    assert 29 < found.goodput_rps <= 30


def test_nothing_met_is_zero_and_all_met_is_the_ceiling_each_with_a_reason() -> None:
    nothing = search_goodput(lambda rate, seed: 0.89, SearchSettings(low_rps=1.0, high_rps=2.0))
    assert nothing.goodput_rps == 0.0 and "even 0.01 requests/s" in nothing.reason
    everything = search_goodput(lambda rate, seed: 1.0, SearchSettings(low_rps=1.0, high_rps=2.0))
    assert everything.goodput_rps == 2000.0 and "still attain" in everything.reason


def test_the_interval_is_student_t_over_the_seeds() -> None:
    knees = {0: 10.0, 1: 11.0, 2: 12.0}
    found = search_goodput(
        lambda rate, seed: float(rate <= knees[seed]),
        SearchSettings(low_rps=5.0, high_rps=20.0, tolerance=1e-6),
        (0, 1, 2),
    )
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert (found.goodput_rps, found.low_rps, found.high_rps) == pytest.approx(
        (11.0, 11 - half, 11 + half), rel=1e-4
    )
    assert t_interval([3.0]) == (3.0, 3.0, 3.0)


def test_the_limit_of_several_draws_is_the_largest_of_theirs() -> None:
    fleet = SimulatedFleet(((packaged_profile("h100_sxm/llama-3.1-8b"), 1),))
    setting = Setting(WorkloadChoice(trace="like:code:300"), fleet, "arrow")

    async def largest() -> float | None:
        async with Workers(1, Store(None)) as workers:
            found = await largest_limit(setting, 0.9, 8192, range(3), workers)
        limit_rps: float | None = found["limit_rps"]
        return limit_rps

    each = [find_limit(setting, 0.9, 8192, seed)["limit_rps"] for seed in range(3)]
    assert len(set(each)) > 1 and asyncio.run(largest()) == max(each)


@given(knees=st.lists(st.floats(1.0, 100.0), min_size=3, max_size=12), seeds=st.sampled_from([1, 3]))
def test_of_many_candidates_the_best_is_found_by_runs_that_most_do_not_need(
    knees: list[float], seeds: int
) -> None:
    tried: list[tuple[str, int]] = []

    async def search_one(candidate: Candidate, seeds: int, best_rps: float) -> LevelGoodput:
        async def run(rate_rps: float, seed: int) -> float:
            tried.append((candidate.label, seed))
            return 1.0 if rate_rps <= knees[int(candidate.label)] else 0.5

        return await search(
            raced_from(SearchSettings(low_rps=5.0, high_rps=20.0), best_rps), range(seeds), run
        )

    candidates = [Candidate("static", label=str(at)) for at in range(len(knees))]
    found = asyncio.run(search_candidates(candidates, seeds, search_one))
    best = found[best_candidate(found)]
    assert best.below_rps is None and best.seeds == seeds
    assert max(knees) / 1.02**2 <= best.goodput_rps <= max(knees)
    for candidate, each in found.items():
        assert each.below_rps is None or knees[int(candidate.label)] < each.below_rps * 1.001
    beaten = sum(each.below_rps is not None for each in found.values())
    assert sum(len(each.probes) == 1 for each in found.values()) >= beaten
