"""Predicted lengths: what is learnt of answers, what engines report, and how a simulated predictor errs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError
from tidegate.core.request import Request
from tidegate.signals.lengths.errors import (
    Distortion,
    ErrorLine,
    ErrorModel,
    Predicted,
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
    assert [source.remaining(asked, at).mean for at in (20, 50, 119, 150)] == [100.0, 70.0, 1.0, 1.0]
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


MODEL = ErrorModel(
    "made up",
    (ErrorLine(0, 0.1, 0.6, 0.5), ErrorLine(256, -0.1, 0.8, 0.3), ErrorLine(1024, 0.0, 0.95, 0.1)),
    0.4,
    0.1,
)


def test_a_fitted_model_errs_as_the_predictor_that_was_measured() -> None:
    outputs = np.random.default_rng(3).lognormal(7.0, 1.0, 800).astype(np.int64) + 30
    request_of = np.repeat(np.arange(800), outputs // 20 + 1)
    at = np.concatenate([np.maximum(np.arange(output // 20 + 1) * 20, 1) for output in outputs])
    true = np.maximum(outputs[request_of] - at, 0).astype(float)
    measured = Distortion(MODEL, outputs, seed=1)(request_of, at, true)
    fitted = fit_errors(Predicted(request_of, at, measured, true), "a test")
    again = Distortion(fitted, outputs, seed=2)(request_of, at, true)
    for start, end in ((1, 256), (256, 1024), (1024, 4096)):
        here = (at >= start) & (at < end)
        ours, theirs = (np.abs(each - true)[here].mean() for each in (again, measured))
        assert ours == pytest.approx(theirs, rel=0.15)
    assert fitted.lasting == pytest.approx(0.4, abs=0.12) and fitted.fresh == pytest.approx(0.1, abs=0.05)
    with pytest.raises(ConfigError, match="no errors to fit"):
        fit_errors(Predicted(request_of[:9], at[:9], measured[:9], true[:9]), "a test")


def test_noise_is_standard_and_of_one_request_alike() -> None:
    requests = np.arange(20_000)
    outputs = np.full(10, 1000)
    plain = ErrorModel("", (ErrorLine(0, 0.0, 1.0, 1.0),), 0.3, 0.1)
    distorted = Distortion(plain, outputs)
    at = [np.full(20_000, tokens) for tokens in (100, 110, 1000)]
    first, near, far = (
        np.log1p(distorted(requests, each, np.full(20_000, 1e6))) - math.log1p(1e6) for each in at
    )
    assert (first.mean(), first.std()) == pytest.approx((0.0, 1.0), abs=0.03)
    assert np.corrcoef(first, near)[0, 1] == pytest.approx(0.9, abs=0.04)
    assert np.corrcoef(first, far)[0, 1] == pytest.approx(0.3, abs=0.03)


def test_the_packaged_model_gives_the_published_figures() -> None:
    rng = np.random.default_rng(4)
    long = rng.integers(30_000, 32_000, 5000)
    mix = np.concatenate(
        (
            np.exp(rng.uniform(np.log(100), np.log(30_000), 4135)).astype(int),
            rng.integers(30_000, 32_768, 865),
        )
    )
    distorted = Distortion(packaged_errors(), mix)
    for at, published in ((1, 18_256), (8192, 2929)):
        true = (long - at).astype(float)
        error = np.abs(distorted(np.arange(5000), np.full(5000, at), true) - true).mean()
        assert error == pytest.approx(published, rel=0.15)


def test_a_file_that_is_no_model_is_refused() -> None:
    for raw in (b"{", b'{"source": "", "lines": [], "lasting": 0, "fresh": 0}'):
        with pytest.raises(ConfigError, match="no error model"):
            read_errors(raw)


def test_simulated_reports_depend_on_the_request_alone() -> None:
    def source() -> SimulatedHidden:
        return SimulatedHidden({"r0": 400, "r1": 400}, np.array([400, 400]), MODEL)

    asked = [request(name, max_tokens=9000) for name in ("r0", "r1")]
    one, other = source(), source()
    for at in range(1, 300):
        one.remaining(asked[0], at)
    late = one.remaining_many(asked, np.array([300, 300]))[0]
    assert late.tolist() == other.remaining_many(asked, np.array([300, 300]))[0].tolist()
    assert late[0] != late[1]
    assert one.remaining(asked[0], 0).source == "histogram"
    assert one.remaining(asked[0], 319).at_token == 300


def test_a_limit_counts_from_the_prompt_whenever_the_request_was_seen() -> None:
    source = MaxTokensLengths()
    early = Request("r0", 100, 50, 0.0)
    late = Request("r0", 120, 30, 0.0, generated=20)
    assert source.remaining(early, 25) == source.remaining(late, 25)
    assert source.remaining(late, 25).mean == 25.0
