"""What stands around every version of Arrow (ours): room for KV, and pools whose members died.

A prompt token takes 1 ms, a step 10 ms plus 10 us per resident token.
"""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.core.decision import ControlDecision, Flip, Place, Verdict
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.systems import make_system
from tidegate_testing import cluster, instance, profile, request

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
VERSIONS = ("arrow", "arrow-lending", "arrow-v1")
every_version = pytest.mark.parametrize("version", VERSIONS)


def fleet(*roles: Role, kv_tokens: int = 400_000) -> Ledger:
    return cluster(len(roles), roles=roles, profile=profile(), kv_capacity_tokens=kv_tokens)


def queue(ledger: Ledger, on: str, tokens: int) -> str:
    name = f"p-{on}-{tokens}"
    ledger.prefill_dispatched(request(name, tokens), on, 0.0)
    return name


def decode(ledger: Ledger, on: str, tokens: int) -> None:
    ledger.decode_dispatched(queue(ledger, on, tokens), on, tokens, 0.0)


def place_prefill(version: str, ledger: Ledger, now: float = 1.0) -> Verdict:
    return make_system(version).prefill.place_prefill(request("new", 100), ledger.snapshot(now))


def place_decode(version: str, ledger: Ledger, ran_on: str, tokens: int = 100, now: float = 1.0) -> Verdict:
    return make_system(version).decode.place_decode(request("new", tokens), ledger.snapshot(now), ran_on)


def tick(version: str, ledger: Ledger, now: float = 1.0) -> ControlDecision[Any]:
    (controller,) = make_system(version).controllers
    return controller.decide(ledger.snapshot(now), controller.initial())


def place(verdict: Verdict) -> Place:
    assert isinstance(verdict.decision, Place)
    return verdict.decision


class TestRoom:
    def test_a_decode_is_not_sent_where_its_kv_cannot_lie_while_some_instance_fits(self) -> None:
        ledger = fleet(P, D, D, kv_tokens=1000)
        queue(ledger, "i2", 500)
        decode(ledger, "i1", 950)
        assert place(place_decode("arrow", ledger, "i0")).decode_on == "i2"
        ledger = fleet(P, D, kv_tokens=1000)
        decode(ledger, "i1", 950)
        assert place(place_decode("arrow", ledger, "i0")).decode_on == "i1"

    def test_kv_that_lies_there_already_needs_no_second_room(self) -> None:
        """In the fallback to every instance the prefill instance competes, and holds the request's KV."""
        ledger = Ledger()
        for name in ("i0", "i1"):
            pinned = instance(name, kv_capacity_tokens=1000, flippable=False)
            ledger.instance_up(pinned, profile(), P, 0.0)
        ledger.prefill_ended(queue(ledger, "i0", 800), 0.0)
        queue(ledger, "i1", 50)
        assert place(place_decode("arrow", ledger, "i0", tokens=800)).decode_on == "i0"


class TestRepair:
    @every_version
    def test_the_next_placement_refills_an_empty_pool(self, version: str) -> None:
        ledger = fleet(P, D, D)
        decode(ledger, "i1", 100)
        ledger.instance_down("i0", 1.0)
        verdict = place_prefill(version, ledger)
        assert verdict.flips == (Flip("i2", P, "repair"),)
        assert place(verdict).prefill_on == "i2"

    @every_version
    def test_the_next_tick_does_too_and_the_cooldown_does_not_matter(self, version: str) -> None:
        ledger = fleet(P, P, D)
        ledger.flip("i0", D, 0.9)
        ledger.flip("i0", P, 0.95)
        ledger.instance_down("i2", 1.0)
        assert tick(version, ledger).actions == (Flip("i0", D, "repair"),)
        assert place_decode(version, ledger, "i0").flips == (Flip("i0", D, "repair"),)

    @every_version
    def test_an_instance_that_drains_is_no_capacity(self, version: str) -> None:
        ledger = fleet(P, P, D)
        ledger.drains("i2", True)
        assert tick(version, ledger).actions == (Flip("i0", D, "repair"),)
        ledger.drains("i0", True)
        assert tick(version, ledger).actions == (), "i1 is the last one that prefills"

    @every_version
    def test_one_survivor_serves_both_phases_unflipped(self, version: str) -> None:
        ledger = fleet(P, D)
        ledger.instance_down("i0", 1.0)
        verdict = place_prefill(version, ledger)
        assert (place(verdict).prefill_on, verdict.flips) == ("i1", ())
        assert tick(version, ledger).actions == ()

    @every_version
    def test_a_decode_whose_whole_fleet_cannot_decode_goes_to_the_least_loaded(self, version: str) -> None:
        """Nobody may flip and the prefill instance is gone: everyone is a candidate."""
        ledger = Ledger()
        for name in ("i0", "i1"):
            ledger.instance_up(instance(name, flippable=False), profile(), P, 0.0)
        decode(ledger, "i0", 9_000)
        verdict = place_decode(version, ledger, "gone")
        assert (place(verdict).decode_on, verdict.flips) == ("i1", ())

    @every_version
    def test_a_mixed_instance_keeps_both_pools_alive(self, version: str) -> None:
        assert all(flip.reason != "repair" for flip in tick(version, fleet(M, D, D)).actions)
        assert all(flip.reason != "repair" for flip in tick(version, fleet(M, P, P)).actions)

    @every_version
    def test_an_empty_fleet_has_nothing_to_repair(self, version: str) -> None:
        control = tick(version, Ledger())
        assert (control.actions, control.reason) == ((), "no instance is up")
