"""The cost formulas against hand computation, for floats and for arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost, attention_work, positive_part


def test_attention_work_counts_query_key_pairs() -> None:
    assert attention_work(4, 0) == 8
    assert attention_work(4, 10) == 48


def test_prefill_is_flat_until_the_hinge() -> None:
    cost = PrefillCost(a_s=1.0, b_s=0.1, c_s=0.01, n0=100.0)
    assert cost.seconds(60, 0.0) == cost.seconds(100, 0.0) == 1.0
    assert cost.seconds(110, 50.0) == pytest.approx(1.0 + 1.0 + 0.5)


def test_step_adds_batch_and_context() -> None:
    assert StepCost(0.01, 0.001, 1e-5).seconds(3, 200) == pytest.approx(0.01 + 0.003 + 0.002)


def test_expected_experts_read_rise_from_k_to_all() -> None:
    cost = StepCost(0.0, 0.0, 1e-6, e_s=1.0, experts=8.0, active_experts=2.0)
    assert cost.seconds(1, 0) == pytest.approx(2.0)
    assert cost.seconds(2, 0) == pytest.approx(8 * (1 - 0.75**2))
    assert cost.seconds(1000, 0) == pytest.approx(8.0)


def test_max_context_inverts_the_step() -> None:
    cost = StepCost(0.01, 0.001, 1e-5)
    limit = cost.max_context_tokens(0.05, 4)
    assert cost.seconds(4, limit) == pytest.approx(0.05)


def test_max_context_is_zero_when_the_target_is_out_of_reach() -> None:
    """Arrow v2: MT(i, S) = 0 if k0 >= S."""
    assert StepCost(0.05, 0.0, 1e-5).max_context_tokens(0.05, 1) == 0.0
    assert StepCost(0.06, 0.0, 1e-5).max_context_tokens(0.05, 1) == 0.0


def test_mixed_charges_its_own_context_slope() -> None:
    cost = MixedCost(1.0, 0.1, 0.01, 0.5, n0=10.0)
    assert cost.seconds(12, 100, 4) == pytest.approx(1.0 + 0.2 + 1.0 + 2.0)


def test_transfer_is_latency_plus_bytes() -> None:
    assert TransferCost(0.5, 100.0).seconds(200) == 2.5


def test_arrays_and_floats_agree() -> None:
    coefficients = [(0.01, 0.001, 1e-5), (0.02, 0.002, 2e-5)]
    stacked = StepCost(*(np.array(column) for column in zip(*coefficients, strict=True)))
    batch, context = np.array([1.0, 7.0]), np.array([100.0, 900.0])
    alone = [float(StepCost(*c).seconds(b, x)) for c, b, x in zip(coefficients, batch, context, strict=True)]
    np.testing.assert_allclose(np.asarray(stacked.seconds(batch, context)), alone)


def test_positive_part() -> None:
    assert positive_part(-1.0) == 0.0
    np.testing.assert_array_equal(positive_part(np.array([-1.0, 2.0])), [0.0, 2.0])
