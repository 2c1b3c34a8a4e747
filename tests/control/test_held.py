"""Orders that the control plane keeps: prompts are held, and placed in order as instances get room."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.control.effects import Effects, Replay
from tidegate.control.held import HeldRequests
from tidegate.control.live_request import LiveRequest
from tidegate.core.decision import Hold, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.baselines import LEAST_LOADED
from tidegate.policies.holding import HoldingPlacement
from tidegate.policies.order import Ticket
from tidegate.policies.orders import make_order
from tidegate.sim import simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord
from tidegate_testing import cluster, profile, request


def labels(effects: Effects) -> list[str]:
    return [effect.label for effect in effects if isinstance(effect, Replay)]


def test_who_holds_the_others_back_keeps_its_place_and_ends_the_asking() -> None:
    held = HeldRequests(make_order("length-aware"))
    lives = [LiveRequest(name, 100.0) for name in ("long", "short", "other")]
    tickets = [Ticket(0.0, 1.0, work_s) for work_s in (9.0, 1.0, 2.0)]
    for live, ticket in zip(lives, tickets, strict=True):
        held.hold(live, ticket)
    asked: list[str] = []
    room = 1

    def place(live: LiveRequest) -> Effects:
        nonlocal room
        asked.append(live.id)
        if not room:
            held.hold(live, tickets[lives.index(live)], with_all_behind=True)
            return []
        room -= 1
        return [Replay(live, live.id)]

    assert labels(held.ask_again(1.0, place)) == ["long"]  # its allowance is spent: the others come after it
    assert held.ask_again(2.0, place) == []
    assert (asked, len(held)) == (["long", "short", "short"], 2)
    room = 2
    assert labels(held.ask_again(3.0, place)) == ["short", "other"] and not len(held)


def test_a_request_that_holds_nobody_back_is_passed_over() -> None:
    held = HeldRequests(make_order("fifo"))
    first, second = LiveRequest("first", 5.0), LiveRequest("second", 9.0)
    for live in (first, second):
        held.hold(live, Ticket(0.0, 1.0, 1.0))

    def place(live: LiveRequest) -> Effects:
        if live is first:
            held.hold(live, Ticket(0.0, 1.0, 1.0))
            return []
        return [Replay(live, live.id)]

    assert labels(held.ask_again(1.0, place)) == ["second"] and len(held) == 1
    assert held.overdue(4.0) == [] and held.overdue(5.0) == [first] and not len(held)


def test_prompts_are_held_while_their_instance_has_enough_ahead() -> None:
    """A prompt token takes 1 ms; 50 ms may wait behind the running prefill."""
    holding = HoldingPlacement(LEAST_LOADED)
    ledger = cluster(2, roles=(Role.PREFILL, Role.DECODE), profile=profile())
    for name, tokens, expected in (("running", 500, Place), ("next", 51, Place), ("third", 10, Hold)):
        decision = holding.place_prefill(request(name, tokens), ledger.snapshot(0.0)).decision
        assert isinstance(decision, expected)
        if isinstance(decision, Place):
            ledger.prefill_dispatched(request(name, tokens), decision.prefill_on, 0.0)
    assert decision == Hold("prefill instances have enough ahead of them", with_all_behind=True)
    ledger.prefill_ended("running", 0.5)
    assert isinstance(holding.place_prefill(request("third"), ledger.snapshot(0.5)).decision, Place)


def test_what_is_prefilled_on_a_decode_instance_is_not_held() -> None:
    class Here:
        needs = LEAST_LOADED.needs

        def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
            return Verdict(Place("i1", "i1", Path.COLOCATED))

    ledger = cluster(2, roles=(Role.PREFILL, Role.DECODE), profile=profile())
    for number in range(5):
        ledger.prefill_dispatched(request(str(number), 500), "i1", 0.0)
    placed = HoldingPlacement(Here()).place_prefill(request(), ledger.snapshot(0.0))
    assert isinstance(placed.decision, Place)


@pytest.mark.parametrize("system", ["static", "colocated"])
def test_prompts_are_served_in_the_order_that_the_plane_keeps(system: str) -> None:
    """All come at once. Engines that serve by arrival get two, then the shortest of those that are held."""
    tokens = [8_000, 7_000, 6_000, 5_000, 4_000, 3_000]
    requests = [TraceRecord(0.001 * number, count, 2) for number, count in enumerate(tokens)]
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    replicas = replicas_of(packaged, 2 if system == "static" else 1)
    run = simulate(requests, make_system(f"{system}+held-sjf"), replicas)
    assert np.argsort(run.requests.first_token_s).tolist() == [0, 1, 5, 4, 3, 2]
