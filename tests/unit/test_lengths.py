"""Predicted lengths: what is learnt of answers, what engines report, and how a simulated predictor errs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.json import encode

from tidegate.core.errors import ConfigError
from tidegate.core.request import Request
from tidegate.signals.lengths.errors import (
    Distortion,
    ErrorLine,
    ErrorModel,
    Predicted,
    error_figures,
    fit_errors,
    packaged_errors,
    read_errors,
)
from tidegate.signals.lengths.groups import Level
from tidegate.signals.lengths.hidden import HiddenLengths
from tidegate.signals.lengths.histogram import HistogramLengths
from tidegate.signals.lengths.known import MaxTokensLengths
from tidegate.signals.lengths.simulated import SimulatedHidden
from tidegate.signals.lengths.survival import EDGES, Counts, Curves, bin_of
from tidegate_testing import request

LENGTHS = st.lists(st.integers(1, 20_000), min_size=1, max_size=60)


def curves_of(lengths: list[int]) -> Curves:
    counts, curves = Counts(1), Curves(1)
    for length in lengths:
        at = bin_of(length)
        counts.came(0, 0, at + 1, 1.0)
        counts.end(0, at, length, 1.0)
    curves.fit(np.array([0]), counts, None, 1e-9)
    curves.derive(np.array([0]))
    return curves


@given(LENGTHS, st.integers(0, 100), st.integers(1, 30_000))
def test_the_conditional_mean_is_that_of_the_answers_that_came_so_far(
    lengths: list[int], edge: int, limit: int
) -> None:
    done = int(EDGES[edge]) - 1
    longer = np.array([length for length in lengths if length > done])
    if not len(longer):
        return
    whole = int(EDGES[bin_of(done + limit)]) - done  # exact where both ends are edges
    mean, _, _ = curves_of(lengths).remaining(0, float(done), float(whole))
    assert mean == pytest.approx(np.minimum(longer - done, whole).mean(), rel=1e-4, abs=1e-4)


@given(LENGTHS)
def test_quantiles_are_in_order_and_ends_never_come_nearer(lengths: list[int]) -> None:
    curves = curves_of(lengths)
    done = np.arange(0, 25_000, 37)
    rows = np.zeros(len(done), np.intp)
    mean, low, high = curves.remaining(rows, done, np.full(len(done), 1e6))
    assert (low <= high).all() and (mean >= 1.0).all()
    for ends in (done + low, done + high):
        assert (np.diff(ends) >= -1e-6 * ends[1:]).all()
    one = curves.remaining(0, float(done[5]), 1e6)
    assert one == pytest.approx((mean[5], low[5], high[5]))


def test_quantiles_are_those_of_the_answers() -> None:
    lengths = np.random.default_rng(0).lognormal(6.0, 1.0, 5000).astype(int) + 1
    curves = curves_of(lengths.tolist())
    for done in (0, 200, 1000):
        _, low, high = curves.remaining(0, float(done), 1e6)
        left = lengths[lengths > done] - done
        assert (low, high) == pytest.approx(np.quantile(left, (0.1, 0.9)), rel=0.12)


def test_nothing_learnt_is_bounded_by_what_may_come() -> None:
    source = HistogramLengths()
    found = source.remaining(request(max_tokens=500), 0)
    assert found.source == "histogram" and 1.0 <= found.low <= found.mean <= found.high <= 500.0
    assert source.remaining(request(max_tokens=100_000), 0).low < 40 < 250 < found.mean
    assert source.remaining(request(max_tokens=100_000), 5000).mean > 5000


def test_running_answers_count_before_they_end() -> None:
    """Of answers that all began together only the short ones have ended: their mean says far too little."""
    rng = np.random.default_rng(1)
    lengths = rng.exponential(1000.0, 3000).astype(int) + 1
    source, now = HistogramLengths(()), 300
    asked = [request(f"r{k}", max_tokens=100_000) for k in range(len(lengths))]
    for one, length in zip(asked, lengths.tolist(), strict=True):
        if length <= now:
            source.finished(one, length, 1.0)
    running = [one for one, length in zip(asked, lengths.tolist(), strict=True) if length > now]
    source.tokens(running, np.full(len(running), now), 2.0)
    ended = lengths[lengths <= now]
    _, low, _ = source.remaining_many([request("new", max_tokens=100_000)], np.array([0]))
    assert ended.mean() < 160
    assert low[0] == pytest.approx(np.quantile(lengths, 0.1), rel=0.15)
    assert source.remaining(request("new", max_tokens=100_000), 0).mean > 600


def test_what_was_aborted_counts_as_far_as_it_came() -> None:
    source = HistogramLengths(())
    for k in range(200):
        one = request(f"r{k}", max_tokens=10_000)
        source.remaining(one, 0)
        if k % 2:
            source.aborted(one, 1000, 1.0)
        else:
            source.finished(one, 10, 1.0)
    source.tokens([], np.array([], np.int64), 2.0)
    assert source.remaining(request("new", max_tokens=10_000), 11).low > 900


def test_older_answers_fade() -> None:
    def learnt(half_life_s: float) -> float:
        source = HistogramLengths((), half_life_s=half_life_s)
        source.tokens([request("r300")], np.array([5]), 0.0)
        for k in range(400):
            source.finished(request(f"r{k}"), 1000 if k < 200 else 100, 0.0 if k < 200 else 100.0 * 3600)
        source.tokens([], np.array([], np.int64), 100.0 * 3600)
        return source.remaining(request("new", max_tokens=9000), 0).mean

    assert learnt(10.0) == pytest.approx(100, rel=0.2)
    assert learnt(1e12) == pytest.approx(550, rel=0.1)
    assert learnt(3600.0) == pytest.approx(100, rel=0.2)


def test_groups_are_told_apart_and_new_ones_begin_as_the_larger_group() -> None:
    source = HistogramLengths()
    for k in range(400):
        tenant, length = ("short", 50) if k % 2 else ("long", 5000)
        source.finished(Request(f"r{k}", 100, 9000, 0.0, tenant=tenant), length, 1.0)
    source.tokens([], np.array([], np.int64), 2.0)
    means = [
        source.remaining(Request(name, 100, 9000, 0.0, tenant=name), 0).mean
        for name in ("short", "long", "new")
    ]
    assert means == pytest.approx([50, 5000, 2525], rel=0.15)


def test_memory_is_bounded_and_live_requests_keep_their_groups() -> None:
    source = HistogramLengths([Level(("tenant",), 4.0)], rows=4)
    kept = Request("kept", 100, 9000, 0.0, tenant="kept")
    source.remaining(kept, 0)
    for k in range(50):
        source.finished(Request(f"r{k}", 100, 9000, 0.0, tenant=f"t{k}"), 100, 1.0)
    source.finished(kept, 4000, 1.0)
    source.tokens([], np.array([], np.int64), 2.0)
    again = source.remaining(Request("again", 100, 9000, 0.0, tenant="kept"), 0)
    new = source.remaining(Request("last", 100, 9000, 0.0, tenant="never"), 0)
    assert again.mean > 2 * new.mean


def test_reports_count_down_and_bad_ones_are_the_histograms() -> None:
    source = HiddenLengths()
    asked = request("r0", max_tokens=200)
    assert source.remaining(asked, 0).source == "histogram"
    source.reported("r0", 20, 100.0)
    assert [source.remaining(asked, at).mean for at in (20, 50, 119, 120)] == [100.0, 70.0, 1.0, 1.0]
    assert source.remaining(asked, 121).source == "histogram", "it was too short, and nothing else was said"
    found = source.remaining(asked, 30)
    assert (found.source, found.at_token) == ("hidden", 20) and found.low < found.mean < found.high <= 170.0
    source.reported("r0", 40, 1e5)
    assert source.remaining(asked, 40).mean == 160.0  # what may still come
    many = source.remaining_many([asked, request("r1", max_tokens=200)], np.array([40, 40]))
    alone = source.histogram.remaining(request("r1", max_tokens=200), 40)
    assert [each[1] for each in many] == pytest.approx([alone.mean, alone.low, alone.high])
    for bad in (math.nan, math.inf, -1.0, 1e9):
        source.reported("r0", 60, bad)
        assert source.remaining(asked, 60).source == "histogram"
    assert source.absurd == 4


def test_the_spread_of_reports_is_learnt() -> None:
    source = HiddenLengths()
    rng = np.random.default_rng(2)
    for k in range(800):
        asked = request(f"r{k}", max_tokens=100_000)
        source.reported(asked.id, 20, 1000.0)
        source.finished(asked, 20 + int(2000 * rng.uniform(0.8, 1.2)), 1.0)
    source.reported("new", 20, 500.0)
    found = source.remaining(request("new", max_tokens=100_000), 20)
    assert (found.low, found.high) == pytest.approx((1000 * 0.84, 1000 * 1.16), rel=0.1)


MADE_UP = ErrorModel(1024, (ErrorLine(0, ((0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 0.9),) * 4),), 0.3, 0.1)


def drawn(model: ErrorModel, answers: np.ndarray, times: int, every: int = 20) -> Predicted:
    """What a predictor that errs as the model says predicts along answers, each drawn so many times."""
    answers = np.tile(answers, times)
    counts = (answers - 1) // every + 1
    request_of = np.repeat(np.arange(len(answers)), counts)
    at = (np.arange(len(request_of)) - np.repeat(counts.cumsum() - counts, counts)) * every
    true = (answers[request_of] - at).astype(float)
    return Predicted(request_of, at, Distortion(model, seed=1)(request_of, at, true), true)


def test_a_simulated_predictor_errs_as_the_packaged_measurement_says() -> None:
    model = packaged_errors()
    assert model.measured is not None
    assert model.measured.command.startswith("tidegate predictor eval")
    figures = model.measured.figures
    found = error_figures(drawn(model, np.array(model.measured.answers), 60, model.measured.every))
    for ours, theirs in zip(found.by_progress, figures.by_progress, strict=True):
        assert ours.predictions == 60 * theirs.predictions
        assert ours.mae == pytest.approx(theirs.mae, rel=0.08)
        assert ours.bias == pytest.approx(theirs.bias, abs=0.05 * theirs.mae + 2.0)
    assert found.correlations == pytest.approx(figures.correlations, abs=0.08)
    assert figures.correlations[20] > 0.8 > figures.correlations[200] > 0.3, "requests stay misjudged"


def test_a_model_that_is_fitted_to_what_another_one_draws_is_that_one() -> None:
    model = packaged_errors()
    answers = np.minimum(np.random.default_rng(3).lognormal(5.5, 1.2, 800).astype(np.int64) + 5, 1024)
    table = drawn(model, answers, 1)
    fitted = fit_errors(table, 1024)
    assert [line.from_token for line in fitted.lines] == [line.from_token for line in model.lines]
    for ours, theirs in zip(fitted.lines[:3], model.lines[:3], strict=True):
        assert np.array(ours.shares) == pytest.approx(np.array(theirs.shares), abs=0.15)
    assert (fitted.lasting, fitted.fresh) == pytest.approx((model.lasting, model.fresh), abs=0.08)
    few = Predicted(table.request[:9], table.at_token[:9], table.predicted[:9], table.true[:9])
    with pytest.raises(ConfigError, match="no errors to fit"):
        fit_errors(few, 1024)


def test_noise_is_of_one_request_alike() -> None:
    requests = np.arange(20_000)
    distorted = Distortion(MADE_UP)
    first, near, far = (
        distorted(requests, np.full(20_000, at), np.full(20_000, 5000.0)) / (1024 - at)
        for at in (100, 110, 1000)
    )
    assert np.quantile(first, (0.02, 0.25, 0.5, 0.9)) == pytest.approx((0.1, 0.3, 0.5, 0.8), abs=0.01)
    assert np.corrcoef(first, near)[0, 1] == pytest.approx(0.9, abs=0.04)
    assert np.corrcoef(first, far)[0, 1] == pytest.approx(0.3, abs=0.03)


def test_a_file_that_is_no_model_is_refused() -> None:
    whole = encode(packaged_errors())
    assert read_errors(whole) == packaged_errors()
    short, beyond = encode(MADE_UP).replace(b",0.9]", b"]", 1), encode(MADE_UP).replace(b"0.9", b"1.9")
    for raw in (b"{", b'{"horizon": 9, "lines": [], "lasting": 0, "fresh": 0}', short, beyond):
        with pytest.raises(ConfigError, match="no error model"):
            read_errors(raw)


def test_simulated_reports_depend_on_the_request_alone() -> None:
    def source() -> SimulatedHidden:
        return SimulatedHidden({"r0": 400, "r1": 400}, packaged_errors())

    asked = [request(name, max_tokens=9000) for name in ("r0", "r1")]
    one, other = source(), source()
    for at in range(1, 300):
        one.remaining(asked[0], at)
    late = one.remaining_many(asked, np.array([300, 300]))[0]
    assert late.tolist() == other.remaining_many(asked, np.array([300, 300]))[0].tolist()
    assert late[0] != late[1]
    assert one.remaining(asked[0], 0).source == "histogram"
    assert [one.remaining(asked[0], at).at_token for at in (1, 20, 21, 320)] == [1, 1, 21, 301]


def test_behind_the_horizon_a_simulated_predictor_knows_nothing_as_the_real_one() -> None:
    asked = request("r0", max_tokens=90_000)

    def told(output: int) -> list[tuple[float, str]]:
        source = SimulatedHidden({"r0": output}, packaged_errors())
        found = [source.remaining(asked, at) for at in (0, *range(1, 1400, 7))]
        assert all(each.mean <= 1024 - at for each, at in zip(found[1:], range(1, 1021, 7), strict=False))
        return [(each.mean, each.source) for each in found]

    assert told(1500) == told(70_000), "both go beyond the horizon, which is all that it learnt"
    live = HiddenLengths()
    live.reported("r0", 1021, 3.0)  # the last one before the horizon
    simulated = SimulatedHidden({"r0": 70_000}, packaged_errors())
    for at in (1025, 1100, 20_000):
        assert (
            live.remaining(asked, at) == simulated.remaining(asked, at) == live.histogram.remaining(asked, at)
        )


def test_a_limit_counts_from_the_prompt_whenever_the_request_was_seen() -> None:
    source = MaxTokensLengths()
    early = Request("r0", 100, 50, 0.0)
    late = Request("r0", 120, 30, 0.0, generated=20)
    assert source.remaining(early, 25) == source.remaining(late, 25)
    assert source.remaining(late, 25).mean == 25.0
