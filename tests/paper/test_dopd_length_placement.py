"""Where short prompts are prefilled, by costs worked out by hand (DOPD, section 3.8 of the notes).

A prompt token takes 1 ms, a step 10 ms plus 10 us per resident token, which count twice beside a prefill. KV
moves at 1 GB/s: 131 us per token.
"""

from __future__ import annotations

import pytest

from tests.paper.arrow_fleet import D, M, P, decode, fleet, queue
from tidegate.core.decision import Hold, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.baselines import MINIMAL_LOAD
from tidegate.policies.dopd.length_placement import LengthPlacement
from tidegate.policies.protocols import Signal
from tidegate_testing import cluster, profile, request

ON_I1 = Place("i1", "i1", Path.COLOCATED)
ON_I0 = Place("i0", None, Path.DISAGGREGATED)


def placed(ledger: Ledger, tokens: int, now: float = 0.0) -> object:
    return LengthPlacement(MINIMAL_LOAD).place_prefill(request("new", tokens), ledger.snapshot(now)).decision


def test_without_neighbours_the_transfer_decides() -> None:
    """Both are idle: away costs the same prefill and a transfer."""
    assert placed(fleet(P, D), 100) == ON_I1


@pytest.mark.parametrize(("queued", "expected"), [(0, ON_I0), (100, ON_I1)])
def test_neighbours_are_worth_a_queue(queued: int, expected: Place) -> None:
    """Three decodes of 300 tokens: a step of 19 ms. With 100 tokens more it takes 103 + 18 = 121 ms, 102 ms
    longer for each of three; one second of TTFT is worth 256 * 50 ms of answer, so that counts 24 ms: 145 ms
    here. Away it is 100 + 13 ms; behind 100 queued tokens 100 more for it and 100 for who comes behind."""
    ledger = fleet(P, D)
    for _ in range(3):
        decode(ledger, "i1", 300)
    if queued:
        queue(ledger, "i0", queued)
    assert placed(ledger, 100) == expected


def test_decodes_without_time_get_no_prefill() -> None:
    """4,000 resident tokens make a step of 50 ms, the target; 80 % of that is 3,000 tokens."""
    for resident, expected in ((2_800, ON_I1), (3_100, ON_I0)):
        ledger = fleet(P, D)
        queue(ledger, "i0", 5_000)
        decode(ledger, "i1", resident)
        assert placed(ledger, 100) == expected


def test_prefills_of_late_take_of_the_time_for_decodes() -> None:
    """A step of 28 ms without prefills in between; half of the time went to those, which leaves 20 of 40."""
    for spent, expected in ((0, ON_I1), (10_000, ON_I0)):
        ledger = fleet(P, D)
        ledger.window_closed(0.0)
        for _ in range(spent // 500):
            decode(ledger, "i1", 500)
        for live in ledger.residents("i1").decodes:
            ledger.finished(live, 1.0)
        for at_s in range(1, 11):
            ledger.window_closed(float(at_s))
        decode(ledger, "i1", 1_700)
        queue(ledger, "i0", 5_000, 11.0)
        assert placed(ledger, 100, 11.0) == expected


def test_only_decode_instances_with_room_are_asked() -> None:
    ledger = fleet(P, M)
    queue(ledger, "i0", 500)
    place = placed(ledger, 100)
    assert isinstance(place, Place) and place.path is Path.DISAGGREGATED
    full = cluster(2, roles=(P, D), profile=profile(), kv_capacity_tokens=1_000)
    queue(full, "i0", 5_000)
    assert placed(full, 500) == ON_I1
    decode(full, "i1", 501)
    assert placed(full, 500) == ON_I0


def test_what_the_inner_placement_does_not_place_stays_so() -> None:
    class Holding:
        needs = frozenset({Signal.LENGTHS})

        def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
            return Verdict(Hold("later"))

    both = LengthPlacement(Holding())
    assert both.place_prefill(request(), fleet(Role.PREFILL, D).snapshot(0.0)).decision == Hold("later")
    assert both.needs == {Signal.LENGTHS, Signal.PROFILE}
