"""What the reconciler takes for a lasting difference, and what for the noise of a busy engine."""

from __future__ import annotations

import pytest

from tidegate.ledger.reconcile import MISSING_READINGS, Difference, EngineLoad, Reconciler
from tidegate.ledger.records import Booked

CAPACITY_TOKENS = 10_000
IDLE = Booked(0, 0, 0, 0)


def kinds(
    reconciler: Reconciler, booked: Booked, told: EngineLoad, kept_tokens: int = 0
) -> list[tuple[str, int]]:
    news = reconciler.compare(booked, booked, told, kept_tokens)
    return [(drift.kind.value, drift.lasting) for drift in news]


@pytest.fixture
def reconciler() -> Reconciler:
    return Reconciler(CAPACITY_TOKENS, block_tokens=32)


def test_others_requests_are_seen_at_the_third_reading_and_gone_at_the_first_without(
    reconciler: Reconciler,
) -> None:
    told = [kinds(reconciler, IDLE, EngineLoad(n, 900)) for n in (4, 2, 5)]
    assert told == [[], [], [("requests", 2), ("kv", 900)]]
    assert (reconciler.foreign_requests, reconciler.foreign_tokens) == (2, 900)
    assert kinds(reconciler, IDLE, EngineLoad(0, 0)) == [("requests", 0), ("kv", 0)]
    assert (reconciler.foreign_requests, reconciler.foreign_tokens) == (0, 0)


def test_a_request_on_its_way_is_no_drift_on_a_busy_engine_but_is_on_an_idle_one(
    reconciler: Reconciler,
) -> None:
    busy = Booked(10, 0, 1000, 0)
    assert [kinds(reconciler, busy, EngineLoad(11, 1000)) for _ in range(9)] == [[]] * 9
    assert [kinds(reconciler, IDLE, EngineLoad(1, 0)) for _ in range(3)][-1] == [("requests", 1)]


def test_kv_is_explained_by_residents_handoffs_part_blocks_and_prefills_of_unsure_length(
    reconciler: Reconciler,
) -> None:
    booked = Booked(requests=4, prefill_tokens=500, decode_tokens=2000, handoff_tokens=300)
    explained = 2000 + 300 + 2 * 500 + 4 * 32
    for _ in range(5):
        assert kinds(reconciler, booked, EngineLoad(4, explained + CAPACITY_TOKENS // 50)) == []
    assert reconciler.foreign_tokens == 0
    for _ in range(3):
        last = kinds(reconciler, booked, EngineLoad(4, explained + CAPACITY_TOKENS // 50 + 1))
    assert last == [("kv", 201)]


def test_kv_that_ended_requests_keep_takes_room_without_being_a_drift(reconciler: Reconciler) -> None:
    for _ in range(4):
        assert kinds(reconciler, IDLE, EngineLoad(0, 1500), kept_tokens=1500) == []
    assert (reconciler.foreign_requests, reconciler.foreign_tokens) == (0, 1500)


def test_what_the_engine_lacks_is_told_late_and_corrects_nothing(reconciler: Reconciler) -> None:
    booked = Booked(5, 0, 1000, 0)
    told = [kinds(reconciler, booked, EngineLoad(2, 400)) for _ in range(MISSING_READINGS)]
    assert told == [[]] * (MISSING_READINGS - 1) + [[("missing", 3)]]
    assert (reconciler.foreign_requests, reconciler.foreign_tokens) == (0, 0)
    assert kinds(reconciler, IDLE, EngineLoad(0, 0)) == [("missing", 0)]


def test_what_an_engine_does_not_tell_is_never_taken_for_nothing(reconciler: Reconciler) -> None:
    for _ in range(3):
        reconciler.compare(IDLE, IDLE, EngineLoad(3, None))
    assert (reconciler.foreign_requests, reconciler.foreign_tokens) == (3, 0)
    assert kinds(reconciler, IDLE, EngineLoad(None, 5000)) == [("requests", 0)]
    for _ in range(MISSING_READINGS + 1):
        assert kinds(reconciler, Booked(5, 0, 100, 0), EngineLoad(None, None)) == []


def test_what_nobody_confirms_any_more_ends(reconciler: Reconciler) -> None:
    for _ in range(3):
        reconciler.compare(IDLE, IDLE, EngineLoad(3, 3000))
    ended = [(drift.kind, drift.lasting) for drift in reconciler.unheard()]
    assert ended == [(Difference.REQUESTS, 0), (Difference.KV, 0)]
    assert (reconciler.foreign_requests, reconciler.foreign_tokens) == (0, 0)
    assert reconciler.unheard() == []
