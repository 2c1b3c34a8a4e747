"""The baselines' placements, candidates and prices."""

from __future__ import annotations

import pytest

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.errors import NoInstance
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.policies.baselines import LEAST_LOADED, MINIMAL_LOAD, Colocated, RoundRobin
from tidegate.policies.candidates import pool_with_room, with_room
from tidegate.policies.protocols import DecodePlacement, PrefillPlacement
from tidegate_testing import cluster, instance, profile, request

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def place(verdict: Verdict) -> Place:
    assert isinstance(verdict.decision, Place)
    return verdict.decision


def prefill_on(policy: PrefillPlacement, ledger: Ledger, tokens: int = 100) -> str:
    return place(policy.place_prefill(request("new", tokens), ledger.snapshot(0.0))).prefill_on


def decode_on(policy: DecodePlacement, ledger: Ledger, tokens: int = 100, ran_on: str = "i0") -> str | None:
    return place(policy.place_decode(request("new", tokens), ledger.snapshot(0.0), ran_on)).decode_on


def queue(ledger: Ledger, name: str, on: str, tokens: int) -> None:
    ledger.prefill_dispatched(request(name, tokens), on, 0.0)


def decode(ledger: Ledger, name: str, on: str, tokens: int) -> None:
    queue(ledger, name, on, tokens)
    ledger.prefill_ended(name, 0.0)
    ledger.decode_dispatched(name, on, tokens, 0.0)


NAMES = ["round-robin", "static", "minimal-load", "colocated"]
ALL = [RoundRobin(), LEAST_LOADED, MINIMAL_LOAD, Colocated()]


@pytest.mark.parametrize("policy", ALL, ids=NAMES)
def test_an_empty_fleet_has_no_instance(policy: RoundRobin) -> None:
    with pytest.raises(NoInstance):
        policy.place_prefill(request(), Ledger().snapshot(0.0))
    with pytest.raises(NoInstance):
        policy.place_decode(request(), Ledger().snapshot(0.0), "gone")


@pytest.mark.parametrize("policy", ALL, ids=NAMES)
@pytest.mark.parametrize("role", list(Role))
def test_a_fleet_of_one_serves_both_phases_under_any_label(policy: RoundRobin, role: Role) -> None:
    ledger = cluster(1, roles=(role,))
    assert prefill_on(policy, ledger) == "i0"
    assert decode_on(policy, ledger) == "i0"


@pytest.mark.parametrize("policy", ALL[:3], ids=NAMES[:3])
def test_labels_are_respected_and_mixed_serves_both(policy: RoundRobin) -> None:
    ledger = cluster(3, roles=(P, D, D))
    assert prefill_on(policy, ledger) == "i0"
    assert decode_on(policy, ledger) in ("i1", "i2")
    mixed = cluster(2, roles=(D, M))
    assert prefill_on(policy, mixed) == "i1"


def test_round_robin_walks_each_pool_by_the_ledgers_counters() -> None:
    ledger = cluster(4, roles=(P, D, P, D))
    prefills, decodes = [], []
    for n in range(4):
        at = prefill_on(RoundRobin(), ledger)
        queue(ledger, f"r{n}", at, 10)
        ledger.prefill_ended(f"r{n}", 0.0)
        to = decode_on(RoundRobin(), ledger)
        assert to is not None
        ledger.decode_dispatched(f"r{n}", to, 10, 0.0)
        prefills.append(at)
        decodes.append(to)
    assert prefills == ["i0", "i2", "i0", "i2"]
    assert decodes == ["i1", "i3", "i1", "i3"]


def test_least_loaded_counts_tokens() -> None:
    ledger = cluster(4, roles=(P, P, D, D))
    queue(ledger, "a", "i0", 500)
    queue(ledger, "b", "i1", 400)
    decode(ledger, "c", "i2", 900)
    decode(ledger, "d", "i3", 800)
    assert prefill_on(LEAST_LOADED, ledger) == "i1"
    assert decode_on(LEAST_LOADED, ledger) == "i3"
    assert LEAST_LOADED.needs == frozenset()


def test_minimal_load_counts_predicted_seconds() -> None:
    """The same queue in tokens is shorter in seconds on the faster instance."""
    ledger = Ledger()
    slow, fast = profile(prefill=(0.0, 2e-3, 0.0)), profile(prefill=(0.0, 1e-3, 0.0))
    for name, made_of, role in (("slow", slow, P), ("fast", fast, P), ("d", fast, D)):
        ledger.instance_up(instance(name), made_of, role, 0.0)
    queue(ledger, "a", "slow", 300)
    queue(ledger, "b", "fast", 500)
    assert prefill_on(MINIMAL_LOAD, ledger, 50) == "fast"
    assert prefill_on(LEAST_LOADED, ledger, 50) == "slow"


def test_minimal_load_weighs_batch_and_context() -> None:
    ledger = cluster(3, roles=(P, D, D), profile=profile(step=(0.01, 1e-3, 1e-6)))
    decode(ledger, "long", "i1", 2000)
    for n in range(4):
        decode(ledger, f"short{n}", "i2", 100)
    assert decode_on(MINIMAL_LOAD, ledger) == "i1"


def test_colocated_takes_one_leg_where_wait_and_step_are_least() -> None:
    ledger = cluster(2, roles=(M, M), profile=profile())
    decode(ledger, "a", "i0", 3000)
    verdict = Colocated().place_prefill(request("new"), ledger.snapshot(0.0))
    assert verdict.decision == Place("i1", "i1", Path.COLOCATED)
    queue(ledger, "b", "i1", 5000)
    assert prefill_on(Colocated(), ledger) == "i0", "five seconds of queue outweigh a slower step"


def test_colocated_load_adds_its_terms() -> None:
    ledger = cluster(2, roles=(M, M), profile=profile())
    verdict = Colocated().place_prefill(request("new", 1000), ledger.snapshot(0.0))
    assert verdict.alternatives is not None
    best = verdict.alternatives.top(1)[0]
    assert best["load_s"] == pytest.approx(1.0 + (0.01 + 0.01) * 1.0 / 0.05)


def test_colocated_decodes_where_it_prefilled_unless_that_is_gone() -> None:
    ledger = cluster(2, roles=(M, M))
    decode(ledger, "a", "i0", 3000)
    assert decode_on(Colocated(), ledger, ran_on="i0") == "i0"
    assert decode_on(Colocated(), ledger, ran_on="gone") == "i1"


def test_instances_without_room_are_skipped_while_one_has_room() -> None:
    ledger = cluster(3, roles=(P, D, D), kv_capacity_tokens=1000)
    decode(ledger, "a", "i1", 500)
    decode(ledger, "b", "i2", 600)
    snapshot = ledger.snapshot(0.0)
    assert list(pool_with_room(snapshot, D, 450)) == [1]
    assert list(pool_with_room(snapshot, D, 900)) == [1, 2], "none has room: no filter"
    assert list(with_room(snapshot, snapshot.labels.decoding, 900)) == []


def test_kv_already_held_is_not_counted_twice_and_unknown_capacity_has_room() -> None:
    ledger = cluster(1, roles=(P,), kv_capacity_tokens=1000)
    ledger.instance_up(instance("unknown", kv_capacity_tokens=0), profile(), D, 0.0)
    queue(ledger, "r", "i0", 800)
    ledger.prefill_ended("r", 0.0)
    snapshot = ledger.snapshot(0.0)
    everyone = snapshot.labels.everyone
    assert list(with_room(snapshot, everyone, 800)) == [1]
    assert list(with_room(snapshot, everyone, 800, held_on="i0")) == [0, 1]
    assert list(with_room(snapshot, everyone, 800, held_on="i0", reserve=0.3)) == [1], (
        "no part of the reserve"
    )
