"""When Arrow's pools lend an instance, and when an instance takes the other phase's work (ours)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.decision import Flip, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.windows import DEMAND_S
from tidegate.policies.arrow.lending import (
    LendingMonitor,
    LendingPlacement,
    decode_fullness,
    expected_wait_s,
)
from tidegate_testing import instance, profile, request

P, D = Role.PREFILL, Role.DECODE
SLO = Slo(1.0, 0.05)
LENDING = LendingPlacement(slo=SLO)
MONITOR = LendingMonitor(slo=SLO, sustain=1)


def fleet(*roles: Role, kv_tokens: int = 100_000) -> Ledger:
    """A prompt token takes 1 ms, a step 10 ms plus 10 us per resident token: 4,000 within 50 ms."""
    ledger = Ledger()
    for index, role in enumerate(roles):
        made = instance(f"i{index}", kv_capacity_tokens=kv_tokens, max_model_len=kv_tokens)
        ledger.instance_up(made, profile(), role, 0.0)
    ledger.window_closed(0.0)
    return ledger


def decode(ledger: Ledger, on: str, tokens: int) -> None:
    name = f"d-{on}-{tokens}-{ledger.snapshot(0.0).placed_prefills}"
    ledger.prefill_dispatched(request(name, tokens), on, 0.0)
    ledger.decode_dispatched(name, on, tokens, 0.0)


def queue(ledger: Ledger, on: str, tokens: int, now: float = 0.0) -> None:
    ledger.prefill_dispatched(request(f"p-{on}-{ledger.snapshot(0.0).placed_prefills}", tokens), on, now)


def came(ledger: Ledger, on: str, tokens: int, each_s: float, until_s: float) -> float:
    """Let a prefill of ``tokens`` come and end every ``each_s``, in windows of one second; return the end."""
    now, window = 0.0, 0.0
    while now < until_s:
        while window + 1.0 <= now:
            window += 1.0
            ledger.window_closed(window)
        name = f"c-{on}-{ledger.snapshot(0.0).placed_prefills}"
        ledger.prefill_dispatched(request(name, tokens), on, now)
        ledger.finished(name, now)
        now += each_s
    ledger.window_closed(until_s)
    return until_s


def prefill(ledger: Ledger, tokens: int = 100, now: float = 0.0) -> Verdict:
    return LENDING.place_prefill(request("new", tokens), ledger.snapshot(now))


def place_decode(ledger: Ledger, ran_on: str, tokens: int = 100, now: float = 0.0) -> Verdict:
    return LENDING.place_decode(request("new", tokens), ledger.snapshot(now), ran_on)


def flips(verdict: Verdict) -> list[Flip]:
    return list(verdict.flips)


def prefills_on(verdict: Verdict) -> str:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.prefill_on


def decodes_on(verdict: Verdict) -> str | None:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.decode_on


class TestLendingToPrefill:
    def test_a_pool_lends_what_fits_on_the_rest(self) -> None:
        ledger = fleet(P, D, D)
        queue(ledger, "i0", 2_000)
        decode(ledger, "i1", 1_500)
        decode(ledger, "i2", 1_500)
        assert [flip.to for flip in flips(prefill(ledger))] == [P]

    def test_it_keeps_what_would_not_fit(self) -> None:
        """3,800 resident tokens on one instance would take 48 ms of 50, more than nine tenths."""
        ledger = fleet(P, D, D)
        queue(ledger, "i0", 2_000)
        decode(ledger, "i1", 1_900)
        decode(ledger, "i2", 1_900)
        assert not flips(prefill(ledger))

    def test_full_kv_counts_as_load(self) -> None:
        ledger = fleet(P, D, D, kv_tokens=3_000)
        queue(ledger, "i0", 2_000)
        decode(ledger, "i1", 1_400)
        decode(ledger, "i2", 1_400)
        assert not flips(prefill(ledger))

    def test_a_prompt_that_misses_even_alone_moves_no_instance(self) -> None:
        assert not flips(prefill(fleet(P, D, D), tokens=1_100))

    def test_where_no_flip_is_due_a_decode_instance_with_time_to_spare_prefills(self) -> None:
        ledger = fleet(P, D)
        queue(ledger, "i0", 2_000)
        decode(ledger, "i1", 500)
        verdict = prefill(ledger)
        assert prefills_on(verdict) == "i1" and not flips(verdict)

    def test_one_whose_decodes_need_its_time_does_not(self) -> None:
        ledger = fleet(P, D)
        queue(ledger, "i0", 2_000)
        decode(ledger, "i1", 3_900)
        assert prefills_on(prefill(ledger)) == "i0"


class TestLendingToDecode:
    def test_a_busy_prefill_pool_keeps_its_instances(self) -> None:
        ledger = fleet(P, P, D)
        decode(ledger, "i2", 3_990)
        now = came(ledger, "i0", 500, 0.55, 60.0)
        verdict = place_decode(ledger, "i0", now=now)
        assert not flips(verdict)
        assert not MONITOR.decide(ledger.snapshot(now), MONITOR.initial()).actions

    def test_an_idle_one_lends(self) -> None:
        ledger = fleet(P, P, D)
        decode(ledger, "i2", 3_990)
        now = came(ledger, "i0", 100, 2.0, 60.0)
        actions = MONITOR.decide(ledger.snapshot(now), MONITOR.initial()).actions
        assert [action.to for action in actions if isinstance(action, Flip)] == [D]
        assert len(actions) == 1
        assert [flip.to for flip in flips(place_decode(ledger, "i0", now=now))] == [D]

    def test_a_decode_stays_beside_prefills_when_the_pool_is_full(self) -> None:
        ledger = fleet(P, D)
        queue(ledger, "i0", 100)
        decode(ledger, "i1", 3_990)
        verdict = place_decode(ledger, "i0")
        assert decodes_on(verdict) == "i0" and not flips(verdict)

    def test_kv_keeps_a_reserve_for_growth(self) -> None:
        """85 of 100 tokens may be placed: with 2,500 of 3,000 in use the cache is full."""
        ledger = fleet(P, D, D, kv_tokens=3_000)
        decode(ledger, "i1", 2_500)
        decode(ledger, "i2", 2_540)
        ledger.prefill_dispatched(request("new", 100), "i0", 0.0)
        ledger.prefill_ended("new", 0.1)
        assert decodes_on(place_decode(ledger, "i0")) == "i0"

    def test_of_instances_that_all_miss_the_least_pressed_takes_it(self) -> None:
        ledger = fleet(P, D, D)
        decode(ledger, "i0", 6_000)
        decode(ledger, "i1", 5_000)
        decode(ledger, "i2", 4_500)
        assert decodes_on(place_decode(ledger, "i0")) == "i2"


class TestMeasures:
    def test_fullness_is_of_the_pool_that_would_be_left(self) -> None:
        ledger = fleet(P, D, D)
        decode(ledger, "i1", 1_000)
        snapshot = ledger.snapshot(0.0)
        assert decode_fullness(snapshot, SLO) == pytest.approx(0.015 / 0.05)
        assert decode_fullness(snapshot, SLO, fewer=1) == pytest.approx(0.02 / 0.05)
        assert decode_fullness(snapshot, SLO, fewer=2) == math.inf

    def test_demand_follows_the_load_with_its_time_constant(self) -> None:
        ledger = fleet(P, D)
        now = came(ledger, "i0", 250, 0.5, DEMAND_S)
        assert ledger.snapshot(now).prefill_demand[0] == pytest.approx(0.5 * (1 - math.exp(-1)), rel=0.02)

    def test_one_instance_waits_as_in_an_m_g_1_queue(self) -> None:
        """Pollaczek-Khinchine, which the approximation equals there: use / (1 - use) * E[S^2] / 2 E[S]."""
        ledger = fleet(P, D)
        now = came(ledger, "i0", 300, 0.5, 200.0)
        snapshot = ledger.snapshot(now)
        use = float(snapshot.prefill_demand.sum())
        assert expected_wait_s(snapshot) == pytest.approx(use / (1 - use) * 0.15, rel=0.01)

    @given(pool=st.integers(1, 12), each_s=st.floats(0.11, 2.0))
    def test_a_smaller_pool_waits_longer(self, pool: int, each_s: float) -> None:
        ledger = fleet(*[P] * (pool + 1), D)
        snapshot = ledger.snapshot(came(ledger, "i0", 100, each_s, 20.0))
        assert expected_wait_s(snapshot, fewer=1) >= expected_wait_s(snapshot) >= 0.0
        assert expected_wait_s(snapshot, fewer=pool + 1) == math.inf
