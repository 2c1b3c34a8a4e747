"""The goodput search: few runs, in any order, and an honest answer when attainment is not monotone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError
from tidegate.experiments.goodput_search import GoodputSearch, SearchSettings, t_interval
from tidegate.reports.comparison import LevelGoodput, RunAt


def search_goodput(attainment: Callable[[float, int], float], settings: SearchSettings) -> LevelGoodput:
    search = GoodputSearch(settings)
    while probes := search.next_probes():
        search.tell(RunAt(p.rate_rps, p.seed, attainment(p.rate_rps, p.seed)) for p in probes)
    return search.result()


@given(at_rps=st.floats(0.02, 5e3), level=st.sampled_from([0.90, 0.99]))
def test_finds_the_knee_wherever_the_guess_is(at_rps: float, level: float) -> None:
    found = search_goodput(
        lambda rate, seed: 1.0 if rate <= at_rps else 0.5,
        SearchSettings(level=level, low_rps=5.0, high_rps=20.0),
    )
    assert found.goodput_rps <= at_rps <= found.goodput_rps * 1.02
    assert found.low_rps == found.goodput_rps == found.high_rps and found.reason == ""
    assert len(found.probes) <= 16


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
    assert nothing.goodput_rps == 0.0 and "even 0.001 requests/s" in nothing.reason
    everything = search_goodput(lambda rate, seed: 1.0, SearchSettings(low_rps=1.0, high_rps=2.0))
    assert everything.goodput_rps == 2000.0 and "still attain" in everything.reason


def test_the_interval_is_student_t_over_the_seeds() -> None:
    knees = {0: 10.0, 1: 11.0, 2: 12.0}
    found = search_goodput(
        lambda rate, seed: float(rate <= knees[seed]),
        SearchSettings(low_rps=5.0, high_rps=20.0, tolerance=1e-6, seeds=(0, 1, 2)),
    )
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert (found.goodput_rps, found.low_rps, found.high_rps) == pytest.approx(
        (11.0, 11 - half, 11 + half), rel=1e-4
    )
    assert t_interval([3.0]) == (3.0, 3.0, 3.0)


def test_answers_may_come_in_any_order_and_from_an_earlier_search() -> None:
    settings = SearchSettings(low_rps=5.0, high_rps=20.0, seeds=(0, 1))

    def answer(search: GoodputSearch, most: int) -> None:
        for _ in range(most):
            if not (probes := search.next_probes()):
                return
            search.tell(RunAt(p.rate_rps, p.seed, float(p.rate_rps <= 9.0)) for p in reversed(probes))

    whole = GoodputSearch(settings)
    answer(whole, 100)
    begun = GoodputSearch(settings)
    answer(begun, 3)
    resumed = GoodputSearch(settings)
    resumed.tell(begun.result().probes)
    assert resumed.next_probes() == begun.next_probes() != ()
    answer(resumed, 100)
    assert not resumed.next_probes()
    assert set(resumed.result().probes) == set(whole.result().probes)


@pytest.mark.parametrize(
    "wrong",
    [{"level": 0.0}, {"low_rps": 3.0, "high_rps": 2.0}, {"tolerance": 0.0}, {"seeds": ()}, {"seeds": (1, 1)}],
)
def test_refuses_what_it_cannot_search(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SearchSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="attainment"):
        GoodputSearch(SearchSettings()).tell([RunAt(1.0, 0, float("nan"))])
