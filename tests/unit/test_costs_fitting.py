"""Fits against a few measured points and against degenerate input."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.core.errors import ConfigError
from tidegate.costs.fitting import (
    SLOPE_FLOOR_S,
    PrefillSample,
    StepSample,
    fit_columns,
    fit_prefill,
    fit_profile,
    fit_step,
)
from tidegate.costs.forms import TransferCost

H100_PREFILL = [(512, 12.02), (1024, 22.26), (2048, 43.51), (4096, 90.94), (8192, 199.72), (32768, 1082.12)]
"""Milliseconds by prompt length: Llama 3.1 8B on one H100 (the form's own values at 1,024 and 4,096)."""
H100_STEP = [
    (1, 1024, 6.18), (1, 4096, 6.29), (32, 1024, 8.32), (32, 4096, 12.35),
    (128, 1024, 12.83), (128, 4096, 28.82), (256, 1024, 19.55), (256, 4096, 51.96),
]  # fmt: skip
"""Milliseconds by batch and context of each: the same engine."""


def prefill_samples() -> list[PrefillSample]:
    return [PrefillSample(n, 0, ms / 1e3) for n, ms in H100_PREFILL]


def step_samples() -> list[StepSample]:
    return [StepSample(b, b * each, ms / 1e3) for b, each, ms in H100_STEP]


def test_measured_prefill_fits_within_a_few_percent() -> None:
    cost, fit = fit_prefill(prefill_samples())
    assert fit.error_p50 < 0.03
    assert fit.error_p95 < 0.08
    assert cost.c_s == pytest.approx(7.8e-10, rel=0.1)


def test_measured_steps_fit_within_a_few_percent() -> None:
    cost, fit = fit_step(step_samples())
    assert fit.error_p50 < 0.05
    assert cost.a_s == pytest.approx(6.4e-3, rel=0.1)
    assert cost.c_s == pytest.approx(4.2e-8, rel=0.1)


def test_profile_carries_errors_source_and_the_mixed_slope() -> None:
    profile = fit_profile(
        "h100_sxm/llama", prefill_samples(), step_samples(), TransferCost(0.0, 1e9), source="inline"
    )
    assert profile.source == "inline"
    assert [form for form, _, _ in profile.errors] == ["prefill", "step"]
    assert profile.mixed.d_s == pytest.approx(2.0 * float(profile.step.c_s))
    assert profile.mixed.n0 == profile.prefill.n0


def test_coefficients_are_never_negative() -> None:
    fit = fit_columns([np.ones(4), np.array([1.0, 2.0, 3.0, 4.0])], np.array([4.0, 3.0, 2.0, 1.0]))
    assert min(fit.coefficients) >= 0.0


def test_flat_context_keeps_a_slope() -> None:
    cost, _ = fit_step([StepSample(b, 100 * b, 0.01) for b in (1, 2, 4, 8)])
    assert cost.c_s >= SLOPE_FLOOR_S
    assert np.isfinite(cost.max_context_tokens(0.05, 1))


def test_too_few_samples_and_zero_times_are_refused() -> None:
    with pytest.raises(ConfigError, match="measure more"):
        fit_step([StepSample(1, 1, 0.01)])
    with pytest.raises(ConfigError, match="positive"):
        fit_step([StepSample(1, 1, 0.0), StepSample(2, 2, 0.01), StepSample(3, 3, 0.01)])
