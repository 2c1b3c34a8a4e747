"""Forecasts of load: what sources say of odd series, how wide intervals are, and who answers instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError
from tidegate.signals.forecast import SERIES, LoadForecaster, LoadPeriod, SeriesForecaster
from tidegate.signals.forecast.choice import NAMES, series_sources
from tidegate.signals.forecast.load import load_periods
from tidegate.signals.forecast.scoring import choose, score
from tidegate.signals.forecast.simple import LastValue, OracleSeries, SeasonalNaive
from tidegate.signals.forecast.source import Expected, Floats, SeriesSource
from tidegate.workloads.trace import TraceRecord, Workload

SIMPLE = tuple(name for name in NAMES if name != "arima")
VALUES = st.lists(
    st.one_of(st.floats(0.0, 1e6), st.just(0.0), st.sampled_from([float("nan"), float("inf"), -1.0])),
    min_size=1,
    max_size=40,
)


class Failing(SeriesSource):
    """A fit that never comes to an end."""

    name = "failing"
    instead = "last"

    def expected(self, history: Floats, steps: int) -> Expected:
        return "the fit failed: singular matrix"


def pushed(values: list[float] | Floats, steps: int = 3, season: int = 0) -> SeriesForecaster:
    forecaster = SeriesForecaster(series_sources(SIMPLE, season=season), steps)
    for value in values:
        forecaster.push(float(value))
    return forecaster


@given(VALUES, st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_any_series_has_finite_forecasts_inside_of_their_intervals(values: list[float], season: int) -> None:
    known = [value for value in values if 0 <= value < float("inf")]
    forecaster = pushed(values, season=season)
    for ahead in map(forecaster.forecast, forecaster.names):
        if not known:
            assert ahead.source == "" and np.isnan(ahead.mean).all()
            continue
        assert (ahead.low >= 0).all() and (ahead.low <= ahead.mean).all() and (ahead.mean <= ahead.high).all()
        assert np.isfinite(ahead.high).all()
        slack = 1e-9 * max(known)
        assert ahead.mean.min() >= min(known) - slack and ahead.mean.max() <= max(known) + slack


@given(st.floats(0.0, 1e6), st.integers(1, 60), st.lists(st.integers(0, 59), max_size=40))
@settings(deadline=None, max_examples=30)
def test_a_constant_series_with_gaps_is_forecast_as_that_constant(
    value: float, count: int, gaps: list[int]
) -> None:
    values = [float("nan") if at in gaps and at else value for at in range(count)]
    forecaster = pushed(values, season=7)
    for ahead in map(forecaster.forecast, forecaster.names):
        assert ahead.mean == pytest.approx([value] * 3)


@pytest.mark.parametrize("steps", [1, 4])
def test_intervals_hold_four_fifths_of_noise(steps: int) -> None:
    rng = np.random.default_rng(5)
    values = 20.0 * np.exp(0.3 * rng.standard_normal(800))
    for one in score(values, series_sources(SIMPLE, season=24), steps, lambda share: None):
        assert one.coverage == pytest.approx(0.8, abs=0.04), one.source


def test_who_cannot_answer_names_who_does_and_why() -> None:
    forecaster = SeriesForecaster([LastValue(), Failing(), SeasonalNaive(4)], 2)
    for value in (3.0, 4.0, 5.0):
        forecaster.push(value)
    failing, seasonal = forecaster.forecast("failing"), forecaster.forecast("seasonal-naive")
    assert (failing.source, failing.reason) == ("last", "the fit failed: singular matrix")
    assert (seasonal.source, seasonal.reason) == ("last", "there is no season of history yet")
    assert failing.mean.tolist() == [5.0, 5.0]
    forecaster.push(6.0)
    assert forecaster.forecast("seasonal-naive").mean.tolist() == [3.0, 4.0]
    with pytest.raises(ConfigError, match="needs last"):
        SeriesForecaster([Failing()], 1)


def test_the_ensemble_follows_the_source_that_is_right() -> None:
    season = np.tile([5.0, 5.0, 50.0, 5.0], 40)
    ahead = pushed(season, steps=4, season=4).forecast("ensemble")
    assert ahead.mean == pytest.approx([5.0, 5.0, 50.0, 5.0], rel=0.02)


def test_a_small_advantage_chooses_no_complex_source() -> None:
    rng = np.random.default_rng(1)
    simple = rng.uniform(0.1, 0.3, 60)
    assert choose({"last": simple, "ewma": simple + rng.normal(-0.005, 0.1, 60)}, 1) == "last"
    assert choose({"last": simple, "ewma": simple - 0.08}, 3) == "ewma"


def test_periods_of_a_trace_and_a_warm_start_from_them() -> None:
    records = [TraceRecord(t, 100 * (1 + k % 2), 10) for k, t in enumerate((0.0, 1.0, 2.0, 25.0, 39.0))]
    periods = load_periods(Workload.of(records), 10.0, long_tokens=150.0)
    assert periods[0] == pytest.approx((0.3, 400 / 3, 20_000.0, 10.0, 100.0, 1 / 3))
    assert periods[1].rate_rps == 0.0 and np.isnan(periods[1].input_tokens)
    assert len(periods) == 3, "the last period is cut short by the trace's end"

    def of(_: int) -> list[SeriesSource]:
        return list(series_sources(SIMPLE, season=0))

    warm, walked = LoadForecaster(of, 2), LoadForecaster(of, 2)
    warm.warm(periods)
    for period in periods:
        walked.push(period)
    for name in SERIES:
        assert warm.forecast[name].mean == pytest.approx(walked.forecast[name].mean)


def test_the_oracle_knows_what_comes_after_a_warm_start_of_nothing() -> None:
    truth = np.array([1.0, 2.0, np.nan, 4.0])
    forecaster = SeriesForecaster([LastValue(), OracleSeries(truth)], 2)
    forecaster.push(1.0)
    assert forecaster.forecast("oracle").mean.tolist() == [2.0, 3.0]


def test_arima_follows_a_trend_and_says_when_it_cannot() -> None:
    pytest.importorskip("statsforecast")
    forecaster = SeriesForecaster(series_sources(("arima",), season=0), 3)
    for value in range(100, 119):
        forecaster.push(float(value))
    early = forecaster.forecast("arima")
    assert (early.source, early.reason) == ("ewma", "19 of 20 periods are known")
    for later in (119.0, float("nan"), 121.0, 122.0):
        forecaster.push(later)
    ahead = forecaster.forecast("arima")
    assert ahead.source == "arima"
    assert ahead.mean == pytest.approx([123.0, 124.0, 125.0], rel=0.01)


def test_an_arima_of_a_series_that_dies_stays_finite() -> None:
    pytest.importorskip("statsforecast")
    forecaster = SeriesForecaster(series_sources(("arima",), season=0), 3)
    rng = np.random.default_rng(3)
    for count in [*rng.poisson(20.0, 40), *[0] * 30, *rng.poisson(900.0, 5)]:
        forecaster.push(float(count))
        assert np.isfinite(forecaster.forecast("arima").high).all()


def test_nothing_imports_the_library_before_a_fit() -> None:
    check = (
        "import sys, tidegate.cli.trace, tidegate.gateway.run, tidegate.signals.forecast.arima;"
        "sys.exit(bool({'statsforecast', 'pandas'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", check], cwd=root, timeout=60).returncode == 0


def test_an_unknown_period_is_a_gap() -> None:
    forecaster = LoadForecaster(lambda _: series_sources(SIMPLE, season=0), 1)
    forecaster.push(LoadPeriod(2.0, 100.0, 1e4, 10.0, 100.0, 0.0))
    forecaster.push(LoadPeriod(0.0, *[float("nan")] * 5))
    assert forecaster.forecast["input_tokens"].mean.tolist() == [100.0]
