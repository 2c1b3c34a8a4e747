"""Profiles as files, and as a table over a fleet."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tidegate.core.errors import ConfigError
from tidegate.costs.profile import Profile, ProfileTable
from tidegate_testing import REFERENCE, profile


def test_json_round_trip() -> None:
    assert Profile.from_json(json.loads(json.dumps(REFERENCE.to_json()))) == REFERENCE


@pytest.mark.parametrize("part", ["prefill", "step", "mixed", "transfer", "name"])
def test_a_missing_part_is_named(part: str) -> None:
    data = REFERENCE.to_json()
    del data[part]
    with pytest.raises(ConfigError, match="incomplete"):
        Profile.from_json(data)


def test_an_unknown_coefficient_is_refused() -> None:
    data = REFERENCE.to_json()
    data["step"]["z_s"] = 1.0
    with pytest.raises(ConfigError, match="z_s"):
        Profile.from_json(data)


def test_cached_tokens_are_attended_to_but_not_computed() -> None:
    full, rest = REFERENCE.prefill_s(4000), REFERENCE.prefill_s(1000, 3000)
    assert REFERENCE.prefill_s(1000) < rest < full


def test_a_uniform_table_keeps_floats_and_a_mixed_one_prices_each() -> None:
    fast, slow = profile(step=(0.01, 0.0, 1e-5)), profile(step=(0.02, 0.0, 1e-5))
    assert ProfileTable.of([fast, fast]).step.a_s == 0.01
    table = ProfileTable.of([fast, slow])
    np.testing.assert_allclose(table.step.seconds(np.ones(2), np.array([1000.0, 1000.0])), [0.02, 0.03])
    assert table.step.c_s == 1e-5


def test_an_empty_table_is_allowed() -> None:
    assert isinstance(ProfileTable.of([]).prefill.a_s, np.ndarray)
