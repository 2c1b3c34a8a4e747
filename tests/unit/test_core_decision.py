"""Alternatives as a journal shows them, and the clocks."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.core.clock import WallClock
from tidegate.core.decision import Alternatives
from tidegate.core.instance import Role
from tidegate_testing import VirtualClock


def test_top_orders_by_the_terms_in_turn() -> None:
    alternatives = Alternatives(
        ("a", "b", "c"),
        lambda: {"resident_tokens": np.array([5.0, 0.0, 0.0]), "ttft_s": np.array([0.1, 0.9, 0.2])},
    )
    assert alternatives.top(2) == [
        {"instance": "c", "resident_tokens": 0.0, "ttft_s": 0.2},
        {"instance": "b", "resident_tokens": 0.0, "ttft_s": 0.9},
    ]


def test_top_shows_candidates_only() -> None:
    cost = np.array([1.0, 3.0, 2.0])
    alternatives = Alternatives(("a", "b", "c"), lambda: {"cost_s": cost}, (1, 2))
    assert [row["instance"] for row in alternatives.top(5)] == ["c", "b"]


def test_top_without_terms_keeps_the_order() -> None:
    assert Alternatives(("a", "b"), dict).top(1) == [{"instance": "a"}]


def test_roles_have_lower_case_labels() -> None:
    assert [role.label for role in Role] == ["prefill", "decode", "mixed"]


def test_virtual_clock_only_moves_forward() -> None:
    clock = VirtualClock(5.0)
    assert clock.advance(1.5) == clock.now() == 6.5
    clock.set(6.5)
    with pytest.raises(ValueError, match="cannot go back"):
        clock.set(6.0)


def test_wall_clock_never_decreases() -> None:
    clock = WallClock()
    assert clock.now() <= clock.now()
