"""Costs grow with tokens, and fits find the coefficients that made the samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.costs.fitting import (
    HINGES,
    MixedSample,
    PrefillSample,
    StepSample,
    fit_mixed,
    fit_prefill,
    fit_step,
)
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, attention_work
from tidegate.costs.profile import Profile, ProfileTable
from tidegate_testing import REFERENCE

seconds = st.floats(0.0, 0.1)
slope = st.floats(1e-9, 1e-4)
prefills = st.builds(PrefillCost, seconds, slope, st.floats(0.0, 1e-8), st.sampled_from(HINGES).map(float))
steps = st.builds(
    StepCost, seconds, slope, slope, st.floats(0.0, 1e-3), st.integers(2, 128).map(float), st.just(1.0)
)
tokens = st.integers(1, 100_000)


@given(prefills, tokens, tokens, st.integers(0, 100_000))
def test_prefill_never_falls_with_more_tokens(cost: PrefillCost, n: int, more: int, cached: int) -> None:
    small = cost.seconds(n, attention_work(n, cached))
    assert cost.seconds(n + more, attention_work(n + more, cached)) >= small
    assert cost.seconds(n, attention_work(n, cached + more)) >= small


@given(steps, st.integers(1, 512), st.integers(1, 512), tokens, tokens)
def test_a_step_never_falls_with_batch_or_context(
    cost: StepCost, batch: int, joining: int, context: int, more: int
) -> None:
    base = cost.seconds(batch, context)
    assert cost.seconds(batch + joining, context) >= base
    assert cost.seconds(batch, context + more) > base


@given(steps, st.integers(1, 512), st.floats(1e-3, 1.0))
def test_the_limit_is_exactly_what_meets_the_target(cost: StepCost, batch: int, target_s: float) -> None:
    limit = cost.max_context_tokens(target_s, batch)
    assert limit >= 0
    if limit > 0:
        assert cost.seconds(batch, limit) == pytest.approx(target_s)
    else:
        assert cost.seconds(batch, 0.0) >= target_s


@given(
    st.floats(1e-3, 0.1), st.floats(1e-6, 1e-3), st.floats(1e-10, 1e-7), st.sampled_from([0, 128, 320, 768])
)
def test_fit_recovers_a_prefill(a: float, b: float, c: float, n0: int) -> None:
    truth = PrefillCost(a, b, c, float(n0))
    lengths = [16, 48, 96, 160, 224, 288, 352, 448, 640, 1024, 2048, 4096, 8192, 16384]
    samples = [
        PrefillSample(n, cached, float(truth.seconds(n, attention_work(n, cached))))
        for n in lengths
        for cached in (0, 2048)
    ]
    found, fit = fit_prefill(samples)
    for sample in samples:
        predicted = found.seconds(sample.new_tokens, attention_work(sample.new_tokens, sample.cached_tokens))
        assert predicted == pytest.approx(sample.seconds, rel=1e-4)
    assert fit.error_p95 < 1e-4


@given(st.floats(1e-3, 0.1), st.floats(1e-6, 1e-3), st.floats(1e-9, 1e-5))
def test_fit_recovers_a_step(a: float, b: float, c: float) -> None:
    truth = StepCost(a, b, c)
    samples = [
        StepSample(batch, batch * each, float(truth.seconds(batch, batch * each)))
        for batch in (1, 4, 16, 64, 256)
        for each in (64, 512, 4096)
    ]
    found, _ = fit_step(samples)
    assert (found.a_s, found.b_s, found.c_s) == pytest.approx((a, b, c), rel=1e-5, abs=1e-12)


@given(st.lists(st.tuples(prefills, steps), min_size=1, max_size=6), tokens, st.integers(1, 64))
def test_a_table_prices_every_instance_as_its_profile_does(
    pairs: list[tuple[PrefillCost, StepCost]], n: int, batch: int
) -> None:
    made_of = [Profile("p", prefill, step, REFERENCE.mixed, REFERENCE.transfer) for prefill, step in pairs]
    table = ProfileTable.of(made_of)
    count = len(made_of)
    prefill_s = np.broadcast_to(table.prefill.seconds(n, attention_work(n, 0)), count)
    step_s = np.asarray(table.step.seconds(np.full(count, float(batch)), np.full(count, float(n))))
    np.testing.assert_allclose(prefill_s, [p.prefill_s(n) for p in made_of], rtol=1e-12)
    np.testing.assert_allclose(step_s, [float(p.step.seconds(batch, n)) for p in made_of], rtol=1e-12)


@given(
    a=st.floats(1e-3, 1e-2),
    c=st.floats(1e-8, 1e-7),
    e=st.floats(1e-5, 1e-4),
)
def test_fit_recovers_a_mixture_of_experts_step(a: float, c: float, e: float) -> None:
    true = StepCost(a, 1e-5, c, e, 64.0, 8.0)
    samples = [
        StepSample(batch, batch * context, float(true.seconds(batch, batch * context)))
        for batch in (1, 2, 4, 8, 16, 32, 64, 128)
        for context in (256, 1024, 4096)
    ]
    found, fit = fit_step(samples, experts=64, active_experts=8)
    assert fit.error_p95 < 1e-6
    assert float(found.seconds(24, 24_000)) == pytest.approx(float(true.seconds(24, 24_000)), rel=1e-6)


@given(b=st.floats(1e-6, 1e-4), d=st.floats(1e-8, 1e-6), n0=st.sampled_from(HINGES))
def test_fit_recovers_a_mixed_step(b: float, d: float, n0: int) -> None:
    true = MixedCost(0.005, b, 1e-9, d, float(n0))
    samples = [
        MixedSample(new, cached, batch, batch * 900, float(true.seconds(new + batch, work, batch * 900)))
        for new in (64, 256, 1024, 4096)
        for cached in (0, 2048)
        for batch in (1, 16, 64)
        for work in (new * (0.5 * new + cached),)
    ]
    found, fit = fit_mixed(samples)
    assert fit.error_p95 < 1e-6
    assert found.d_s == pytest.approx(d, rel=1e-3)
