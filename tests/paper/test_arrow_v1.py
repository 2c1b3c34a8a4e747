"""Arrow v1 as the xLLM technical report (section 3.2) describes it, clause by clause.

A prompt token takes 1 ms, a step 10 ms plus 10 us per resident token: the default targets (1 s, 50 ms)
allow 1,000 queued prompt tokens and 4,000 resident ones.
"""

from __future__ import annotations

import pytest

from tidegate.core.decision import Flip, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.policies.arrow.pools_v1 import (
    DECODE_FLOOR,
    MEMORY_SHORTAGE,
    ArrowV1Monitor,
    ArrowV1Placement,
    Pools,
    take,
)
from tidegate_testing import cluster, profile, request

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
V1 = ArrowV1Placement()


def fleet(*roles: Role, capacity: int = 400_000) -> Ledger:
    return cluster(len(roles), roles=roles, profile=profile(), kv_capacity_tokens=capacity)


def queue(ledger: Ledger, on: str, tokens: int) -> str:
    name = f"r{ledger.snapshot(0.0).placed_prefills}"
    ledger.prefill_dispatched(request(name, tokens), on, 0.0)
    return name


def decode(ledger: Ledger, on: str, tokens: int) -> str:
    name = queue(ledger, on, tokens)
    ledger.decode_dispatched(name, on, tokens, 0.0)
    return name


def place_prefill(ledger: Ledger, tokens: int = 100) -> Verdict:
    return V1.place_prefill(request("new", tokens), ledger.snapshot(0.0))


def place_decode(ledger: Ledger, ran_on: str = "i0", tokens: int = 100) -> Verdict:
    return V1.place_decode(request("new", tokens), ledger.snapshot(0.0), ran_on)


def prefill_on(verdict: Verdict) -> str:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.prefill_on


def decode_on(verdict: Verdict) -> str | None:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.decode_on


def test_the_four_pools_follow_from_label_and_residents() -> None:
    """P, D, P->D (takes decode, still drains prefills) and D->P (the mirror)."""
    ledger = fleet(P, P, D, D, M)
    decode(ledger, "i1", 10)
    queue(ledger, "i3", 10)
    pools = Pools.of(ledger.snapshot(0.0))
    assert pools.prefill.tolist() == [True, False, False, False, True]
    assert pools.decode_to_prefill.tolist() == [False, True, False, False, False]
    assert pools.decode.tolist() == [False, False, True, False, True]
    assert pools.prefill_to_decode.tolist() == [False, False, False, True, False]


def test_a_member_settles_when_the_other_phase_drains() -> None:
    """A P->D member whose prefills emptied is D; no event is needed."""
    ledger = fleet(P, D)
    name = queue(ledger, "i1", 10)
    assert Pools.of(ledger.snapshot(0.0)).prefill_to_decode[1]
    ledger.prefill_ended(name, 0.1)
    assert Pools.of(ledger.snapshot(0.1)).decode[1]


def test_prefill_goes_to_the_shortest_queue_of_p() -> None:
    """i = argmin over P of queue delay, if the predicted TTFT meets the target."""
    ledger = fleet(P, P, P, D)
    queue(ledger, "i0", 500)
    queue(ledger, "i1", 400)
    decode(ledger, "i2", 10)
    assert prefill_on(place_prefill(ledger)) == "i1", "i2 is in D->P and comes second"


def test_prefill_then_tries_the_d_to_p_pool() -> None:
    ledger = fleet(P, P, D)
    queue(ledger, "i0", 1000)
    decode(ledger, "i1", 10)
    verdict = place_prefill(ledger)
    assert (prefill_on(verdict), verdict.flips) == ("i1", ())


def test_prefill_then_takes_an_instance_from_decode() -> None:
    """The decode instance with the fewest running tokens moves."""
    ledger = fleet(P, D, D, D)
    queue(ledger, "i0", 1000)
    decode(ledger, "i1", 300)
    decode(ledger, "i2", 100)
    decode(ledger, "i3", 200)
    verdict = place_prefill(ledger)
    assert verdict.flips == (Flip("i2", P, "inline"),)
    assert prefill_on(verdict) == "i2"


def test_the_p_to_d_pool_gives_first() -> None:
    """src = P2D if non-empty else D."""
    ledger = fleet(P, D, D, D)
    decode(ledger, "i3", 900)
    queue(ledger, "i3", 10)
    snapshot = ledger.snapshot(0.0)
    assert take(snapshot, P, "inline") == Flip("i3", P, "inline")


def test_at_least_two_decode_instances_stay() -> None:
    """|decode-serving instances| <= 2: return none; then the best of P and D->P."""
    assert DECODE_FLOOR == 2
    ledger = fleet(P, P, D, D)
    queue(ledger, "i0", 3000)
    queue(ledger, "i1", 2000)
    verdict = place_prefill(ledger)
    assert (prefill_on(verdict), verdict.flips) == ("i1", ())


def test_decode_stays_where_the_prefill_ran_if_that_may_decode() -> None:
    """No KV transfer."""
    assert place_decode(fleet(D, D)).decision == Place("i0", "i0", Path.DISAGGREGATED)


def test_decode_goes_to_the_fewest_running_tokens() -> None:
    ledger = fleet(P, D, D)
    decode(ledger, "i1", 300)
    decode(ledger, "i2", 200)
    assert decode_on(place_decode(ledger)) == "i2"


def test_decode_then_tries_the_p_to_d_pool() -> None:
    ledger = fleet(P, P, D, D)
    decode(ledger, "i2", 4000)
    queue(ledger, "i3", 10)
    verdict = place_decode(ledger)
    assert (decode_on(verdict), verdict.flips) == ("i3", ())


@pytest.mark.parametrize("bound", ["compute", "memory"])
def test_decode_beyond_its_bounds_takes_an_instance_from_prefill(bound: str) -> None:
    """running_tokens + L <= min(memory bound, compute bound), else take the shortest prefill queue."""
    ledger = fleet(P, P, D, capacity=1000 if bound == "memory" else 400_000)
    decode(ledger, "i2", 950 if bound == "memory" else 4000)
    queue(ledger, "i0", 500)
    verdict = place_decode(ledger)
    assert verdict.flips == (Flip("i1", D, "inline"),)
    assert decode_on(verdict) == "i1"


def test_the_d_to_p_pool_gives_first() -> None:
    ledger = fleet(P, P, D)
    decode(ledger, "i1", 10)
    queue(ledger, "i1", 900)
    snapshot = ledger.snapshot(0.0)
    assert take(snapshot, D, "inline") == Flip("i1", D, "inline")


def test_one_prefill_instance_stays() -> None:
    ledger = fleet(P, D)
    decode(ledger, "i1", 9000)
    verdict = place_decode(ledger)
    assert (decode_on(verdict), verdict.flips) == ("i1", ())


class TestMonitor:
    """P -> D when decode is short of memory, too slow, or prefill idles."""

    def busy(self, *, capacity: int = 400_000) -> Ledger:
        ledger = fleet(P, P, D, capacity=capacity)
        queue(ledger, "i0", 200)
        queue(ledger, "i1", 100)
        return ledger

    def test_memory_shortage(self) -> None:
        ledger = self.busy(capacity=1000)
        decode(ledger, "i2", int(1000 * MEMORY_SHORTAGE))
        control = ArrowV1Monitor().decide(ledger.snapshot(0.0), None)
        assert control.actions == (Flip("i1", D, "monitor"),)
        assert "memory" in control.reason

    def test_mean_token_interval_above_the_target(self) -> None:
        ledger = self.busy()
        name = decode(ledger, "i2", 100)
        ledger.tokens(name, 1, 0.0)
        ledger.tokens(name, 10, 0.6)
        ledger.window_closed(0.6)
        control = ArrowV1Monitor().decide(ledger.snapshot(0.6), None)
        assert len(control.actions) == 1
        assert "interval" in control.reason

    def test_an_idle_prefill_instance(self) -> None:
        ledger = fleet(P, P, D)
        queue(ledger, "i0", 100)
        control = ArrowV1Monitor().decide(ledger.snapshot(0.0), None)
        assert control.actions == (Flip("i1", D, "monitor"),)

    def test_no_trigger_no_flip(self) -> None:
        assert ArrowV1Monitor().decide(self.busy().snapshot(0.0), None).actions == ()
