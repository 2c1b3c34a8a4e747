"""Decodes that move to an instance which becomes mixed because the others are crowded."""

from __future__ import annotations

import pytest

from tidegate.core.decision import Flip, Migrate
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.ledger import Ledger
from tidegate.policies.starting_roles import TARGET
from tidegate.policies.tidegate.labels import FleetShape, ShapeState
from tidegate.policies.tidegate.relief import relief
from tidegate.policies.tidegate.shape import RecentLengths
from tidegate_testing import cluster, request

P, M = Role.PREFILL, Role.MIXED


def decoding(ledger: Ledger, on: str, answers: list[int], prompt: int = 1000) -> None:
    """Have an instance decode requests that have so many tokens of their answers."""
    for number, answered in enumerate(answers):
        name = f"{on}-{number}"
        ledger.prefill_dispatched(request(name, prompt), on, 0.0)
        ledger.decode_dispatched(name, on, prompt + answered, 0.0)


def moves(ledger: Ledger, *joins: str) -> set[tuple[str, str, str]]:
    return {
        (move.request, move.src, move.dst)
        for move in relief(ledger.snapshot(1.0), [Flip(name, M, TARGET) for name in joins], "crowded")
    }


def test_who_joins_gets_an_equal_share_of_the_newest() -> None:
    ledger = cluster(3, roles=(P, M, M))
    decoding(ledger, "i1", [50, 10, 40, 20, 30, 60])
    decoding(ledger, "i2", [5, 70, 80])
    # Nine decodes on three: each has three, and i2 has no more than that.
    assert moves(ledger, "i0") == {("i1-1", "i1", "i0"), ("i1-3", "i1", "i0"), ("i1-4", "i1", "i0")}
    assert moves(ledger) == set()


@pytest.mark.parametrize(("prompt", "found"), [(1000, 3), (90_000, 1), (200_000, 0)])
def test_what_joins_has_room_for_moves(prompt: int, found: int) -> None:
    ledger = cluster(2, roles=(P, M), kv_capacity_tokens=150_000)
    decoding(ledger, "i1", [1, 2, 3, 4, 5, 6], prompt)
    assert len(moves(ledger, "i0")) == found


def test_who_waits_for_its_kv_stays() -> None:
    ledger = cluster(2, roles=(P, M))
    for number in range(4):
        ledger.prefill_dispatched(request(f"r{number}", 1000), "i0", 0.0)
        ledger.prefill_ended(f"r{number}", 0.0)
        ledger.decode_dispatched(f"r{number}", "i1", 1001, 0.0)
    assert moves(ledger, "i0") == set()


def test_who_moves_to_one_that_drains_stays_and_an_instance_that_prefills_from_now_on_gives_none() -> None:
    ledger = cluster(4, roles=(P, M, M, M))
    decoding(ledger, "i1", [1, 2, 3, 4])
    decoding(ledger, "i2", [5, 6])
    ledger.moves("i1-0", "i3", 0.5)
    ledger.drains("i3", True)
    flips = [Flip("i0", M, TARGET), Flip("i2", P, TARGET)]
    found = [move.request for move in relief(ledger.snapshot(1.0), flips, "crowded")]
    assert found == ["i1-1", "i1-2"]


def test_an_instance_that_is_taken_back_for_crowded_decodes_gets_some_at_once() -> None:
    ledger = cluster(3, roles=(P, P, M), kv_capacity_tokens=100_000)
    decoding(ledger, "i2", [1, 2, 3, 4], 24_999)
    decision = FleetShape(RecentLengths(), Slo(2.0, 0.05)).decide(ledger.snapshot(1.0), ShapeState())
    (flip, *others) = decision.actions
    assert isinstance(flip, Flip) and flip.to is M
    assert [(move.src, move.dst) for move in others if isinstance(move, Migrate)] == [
        ("i2", flip.instance)
    ] * 2
