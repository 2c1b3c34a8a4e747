"""ProfileDrift follows an instance that changed, and nothing else."""

from __future__ import annotations

import math

import pytest

from tidegate.costs.drift import FEWEST, HALF_LIFE, ProfileDrift


def test_says_nothing_from_too_little() -> None:
    drift = ProfileDrift()
    for _ in range(FEWEST - 1):
        drift.observe(0.01, 0.1)
    assert drift.ratio is None and not drift.drifted
    drift.observe(0.01, 0.1)
    assert drift.drifted


def test_symmetric_noise_and_single_stalls_are_no_drift() -> None:
    drift = ProfileDrift()
    for i in range(200):
        drift.observe(0.01, 0.01 * (2.0 if i % 2 else 0.5))
    assert drift.ratio == pytest.approx(1.0, abs=0.03)
    drift.observe(0.01, 60.0)
    assert drift.ratio == pytest.approx(1.0, abs=0.1) and not drift.drifted


def test_follows_an_instance_that_became_slower() -> None:
    drift = ProfileDrift()
    for _ in range(1000):
        drift.observe(0.02, 0.02)
    for _ in range(HALF_LIFE):
        drift.observe(0.02, 0.08)
    assert drift.ratio == pytest.approx(2.0)  # half of the way, as logarithms go
    for _ in range(10 * HALF_LIFE):
        drift.observe(0.02, 0.08)
    assert drift.ratio == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_leaves_out_what_is_no_time(pair: tuple[float, float]) -> None:
    drift = ProfileDrift()
    drift.observe(*pair)
    assert drift.observations == 0
