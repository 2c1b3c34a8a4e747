"""Golden numbers for percentiles, attainment and goodput."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.measure.attainment import Observation, goodput, score
from tidegate.measure.percentiles import summarize

SLO = Slo(ttft_s=0.5, tpot_s=0.05)


def test_percentiles_interpolate_between_order_statistics() -> None:
    summary = summarize([4.0, 1.0, 3.0, None, 2.0])
    assert summary is not None
    assert (summary.count, summary.mean, summary.p50, summary.max) == (4, 2.5, 2.5, 4.0)
    assert summary.p90 == pytest.approx(3.7)
    assert summary.p99 == pytest.approx(3.97)


def test_nothing_measured_is_not_zero() -> None:
    assert summarize([None, None]) is None


def test_failures_miss_every_target_and_limits_are_inclusive() -> None:
    seen = [
        Observation(0.0, True, 0.5, 0.05, SLO),  # both, exactly at the limit
        Observation(1.0, True, 0.6, 0.01, SLO),  # tpot only
        Observation(2.0, True, 0.1, 0.06, SLO),  # ttft only
        Observation(3.0, True, 0.1, None, SLO),  # one token: no TPOT to miss
        Observation(4.0, False, 0.1, 0.01, SLO),  # fast, then failed
        Observation(5.0, False, None, None, SLO),  # rejected
    ]
    result = score(seen)
    assert (result.offered, result.attained) == (6, 2)
    assert (result.ttft_attained, result.tpot_attained) == (3, 3)
    assert result.share == pytest.approx(2 / 6)


def test_each_request_is_scored_by_its_own_slo() -> None:
    strict, lax = Slo(0.1, 0.01), Slo(10.0, 1.0)
    assert score([Observation(0, True, 0.5, 0.05, s) for s in (strict, lax)]).attained == 1


def test_goodput_is_the_attained_part_of_the_offered_rate() -> None:
    arrivals_s = [10.0 + 0.5 * i for i in range(11)]  # 2 requests per second, wherever it starts
    seen = [Observation(t, i != 0, 0.1, 0.01, SLO) for i, t in enumerate(arrivals_s)]
    rates = goodput(score(seen), arrivals_s, level=0.9)
    assert rates.offered_rps == pytest.approx(2.0)
    assert rates.attained_rps == pytest.approx(2.0 * 10 / 11)
    assert rates.level_met
    assert not goodput(score(seen), arrivals_s, level=0.95).level_met


def test_a_rate_needs_time_between_arrivals() -> None:
    rates = goodput(score([Observation(3.0, True, 0.1, None, SLO)]), [3.0])
    assert rates.offered_rps is None
    assert rates.level_met
    assert not goodput(score([]), []).level_met


@pytest.mark.parametrize("level", [0.0, 1.01, -1.0])
def test_a_level_is_a_share(level: float) -> None:
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        goodput(score([]), [], level)


latency = st.one_of(st.none(), st.floats(0, 2))


@given(st.lists(st.builds(Observation, st.floats(0, 9), st.booleans(), latency, latency, st.just(SLO))))
def test_attained_never_exceeds_its_parts(seen: list[Observation]) -> None:
    result = score(seen)
    assert result.attained <= min(result.ttft_attained, result.tpot_attained)
    assert max(result.ttft_attained, result.tpot_attained) <= sum(o.ok for o in seen) <= result.offered
