"""The share of an answer that a later prompt begins with: a tenant's own once it has told enough."""

from __future__ import annotations

import pytest

from tidegate.signals import retold
from tidegate.signals.retold import ENOUGH, HALF_LIFE, RetoldAnswers


def test_a_tenant_with_enough_answers_has_its_own_share() -> None:
    answers = RetoldAnswers()
    assert answers.share("a") == 1.0
    for _ in range(ENOUGH):
        answers.observed("a", 100, 0)
    for _ in range(ENOUGH - 1):
        answers.observed("b", 100, 100)
    assert answers.share("a") == 0.0
    assert answers.share("b") == answers.share("c") == pytest.approx(15 / 31, abs=0.02)
    answers.observed("b", 100, 100)
    assert answers.share("b") == pytest.approx(1.0)


def test_an_answer_counts_for_half_after_its_half_life() -> None:
    answers = RetoldAnswers()
    answers.observed("a", 1000, 1000)
    for _ in range(HALF_LIFE):
        answers.observed("a", 0, 0)
    answers.observed("a", 500, 0)
    assert answers.share("a") == pytest.approx(0.5, abs=0.01)


def test_the_longest_unheard_of_tenants_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retold, "MOST_GROUPS", 2)
    answers = RetoldAnswers()
    for tenant in ("a", "b", "c"):
        for _ in range(ENOUGH):
            answers.observed(tenant, 10, 10 if tenant == "a" else 0)
    assert answers.share("a") == answers.share("unknown") < 0.5
