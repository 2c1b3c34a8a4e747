"""Arrow v2 (arXiv 2505.11916v2), clause by clause: costs, Algorithm 1 and stateless instances.

A quotation names the section; "Narwhal" marks what an independent implementation of the paper adds.
"""

from __future__ import annotations

import math

import pytest

from tests.paper.arrow_fleet import (
    ARROW,
    D,
    M,
    P,
    decode,
    decode_on,
    fleet,
    pace,
    place_decode,
    place_prefill,
    prefill_on,
    queue,
)
from tidegate.core.decision import Flip, Path, Place
from tidegate.policies.arrow.published import COOLDOWN_S, L_SHRINK, ArrowPlacement, flip
from tidegate.policies.candidates import price_at
from tidegate.policies.pricing import tokens_over_limit, ttft_s
from tidegate_testing import instance, profile, request


class TestCostModels:
    """Section 3.1 and 4."""

    def test_prefill_time_is_quadratic_in_the_prompt(self) -> None:
        """Section 3.1: T(r, i) = a n^2 + b n + c."""
        made_of = profile(prefill=(0.5, 2e-3, 2e-6))
        assert made_of.prefill_s(1000) == pytest.approx(0.5 + 2.0 + 2e-6 * 1000**2 / 2)

    def test_step_time_is_linear_in_resident_tokens(self) -> None:
        """Section 3.1: interval = k0 + k1 * (total tokens of the batch)."""
        step = profile().step
        assert step.seconds(1, 3000) - step.seconds(1, 1000) == pytest.approx(2000e-5)

    def test_max_tokens_under_the_target(self) -> None:
        """Section 5.3: MT(i, S) = (S - k0) / k1, and 0 where k0 >= S."""
        step = profile().step
        assert step.max_context_tokens(0.05, 1) == pytest.approx(4000)
        assert step.max_context_tokens(0.01, 1) == 0.0

    def test_ttft_is_queue_plus_prefill(self) -> None:
        """Section 4.2: TTFT = q1 + p1; KV transfer is not in it."""
        ledger = fleet(P, D)
        queue(ledger, "i0", 300)
        snapshot = ledger.snapshot(0.0)
        assert price_at(snapshot, ttft_s(snapshot, request("new", 100)), 0) == pytest.approx(0.4)

    def test_time_already_spent_on_the_running_prefill_does_not_count(self) -> None:
        """Departure: the queue is what is left of it, where the paper sums whole prefills."""
        ledger = fleet(P, D)
        queue(ledger, "i0", 300)
        snapshot = ledger.snapshot(0.2)
        assert price_at(snapshot, ttft_s(snapshot, request("new", 100)), 0) == pytest.approx(0.2)


class TestCostPairs:
    """Section 5.3: cost functions, compared lexicographically."""

    def test_prefill_prefers_the_instance_without_decodes(self) -> None:
        """cost_prefill = (sum of L over decodes, sum of T over prefills with r): the first leads."""
        ledger = fleet(P, P, D)
        decode(ledger, "i0", 10)
        queue(ledger, "i1", 800)
        verdict = place_prefill(ledger)
        assert prefill_on(verdict) == "i1"
        assert verdict.flips == ()

    def test_prefill_ties_go_to_the_shorter_queue(self) -> None:
        ledger = fleet(P, P, D)
        queue(ledger, "i0", 300)
        queue(ledger, "i1", 200)
        assert prefill_on(place_prefill(ledger)) == "i1"

    def test_decode_prefers_the_instance_without_prefills(self) -> None:
        """cost_decode = (sum of L over prefills, sum of L over decodes with r - MT): the first leads."""
        ledger = fleet(P, D, D)
        queue(ledger, "i1", 10)
        decode(ledger, "i2", 3000)
        assert decode_on(place_decode(ledger, "i0")) == "i2"

    def test_decode_ties_go_to_the_most_room(self) -> None:
        ledger = fleet(P, D, D)
        decode(ledger, "i1", 2000)
        decode(ledger, "i2", 1000)
        assert decode_on(place_decode(ledger, "i0")) == "i2"

    def test_room_is_measured_per_instance(self) -> None:
        """MT(i, .) is the instance's own: more tokens on a faster one may leave more room."""
        ledger = fleet(P, D)
        ledger.instance_up(instance("fast"), profile(step=(1e-2, 0.0, 5e-6)), D, 0.0)
        decode(ledger, "i1", 1000)
        decode(ledger, "fast", 2000)
        assert decode_on(place_decode(ledger, "i0")) == "fast"

    def test_the_prefill_check_is_the_second_component_against_the_ttft_target(self) -> None:
        """meets_slo(prefill): second component <= SLO_TTFT; it may overrule the first component."""
        ledger = fleet(P, P, D)
        decode(ledger, "i0", 10)
        queue(ledger, "i1", 901)
        assert prefill_on(place_prefill(ledger)) == "i0"

    def test_the_decode_check_is_the_second_component_against_zero(self) -> None:
        """meets_slo(decode): second component <= 0; exactly at the limit still passes."""
        ledger = fleet(P, D, D)
        queue(ledger, "i1", 10)
        decode(ledger, "i2", 3901)
        assert decode_on(place_decode(ledger, "i0")) == "i1"
        snapshot = fleet(P, D).snapshot(0.0)
        assert price_at(snapshot, tokens_over_limit(request("new", 4000)), 1) == pytest.approx(0.0)

    def test_a_request_is_held_against_its_own_slo(self) -> None:
        ledger = fleet(P, P, D)
        decode(ledger, "i0", 10)
        queue(ledger, "i1", 1500)
        relaxed = request("new", 100, ttft_s=5.0)
        assert prefill_on(ARROW.place_prefill(relaxed, ledger.snapshot(0.0))) == "i1"

    def test_alternatives_carry_the_named_terms(self) -> None:
        ledger = fleet(P, P, D)
        verdict = place_prefill(ledger)
        assert verdict.alternatives is not None
        assert verdict.alternatives.top(9) == [
            {"instance": "i0", "decode_resident_tokens": 0.0, "ttft_s": 0.1},
            {"instance": "i1", "decode_resident_tokens": 0.0, "ttft_s": 0.1},
        ]
        verdict = place_decode(ledger, "i0")
        assert verdict.alternatives is not None
        assert verdict.alternatives.top(9) == [
            {"instance": "i2", "prefill_resident_tokens": 0.0, "tokens_over_limit": -3900.0}
        ]


class TestAlgorithm1:
    """Section 5.3, Algorithm 1: place a sub-request."""

    def test_line_1_decode_stays_on_its_prefill_instance_once_that_is_flipped(self) -> None:
        """if phase == decode and label(r.prefill_iid) == D: return r.prefill_iid."""
        ledger = fleet(P, D, D)
        decode(ledger, "i0", 3990)
        ledger.flip("i0", D, 1.0)
        verdict = place_decode(ledger, "i0", now=1.0)
        assert verdict.decision == Place("i0", "i0", Path.DISAGGREGATED)

    def test_line_1_not_before_it_is_flipped(self) -> None:
        assert decode_on(place_decode(fleet(P, D), "i0")) == "i1"

    def test_line_1_skips_an_instance_that_is_gone(self) -> None:
        assert decode_on(place_decode(fleet(P, D), "gone")) == "i1"

    def test_candidates_are_the_matching_pool(self) -> None:
        """Narwhal: the pool of the phase; profiles taken in pure phases mislead elsewhere."""
        ledger = fleet(P, D, D)
        queue(ledger, "i0", 500)
        assert prefill_on(place_prefill(ledger)) == "i0"
        assert decode_on(place_decode(ledger, "i0")) in ("i1", "i2")

    def test_line_2_candidates_may_be_every_instance(self) -> None:
        """C = [(cost(r, i), i) for i in instances]: the paper's own rule; the other label only costs more."""
        every = ArrowPlacement(candidates=lambda snapshot, role, tokens, held_on: snapshot.labels.everyone)
        ledger = fleet(P, D, D)
        queue(ledger, "i0", 950)
        decode(ledger, "i1", 10)
        assert prefill_on(every.place_prefill(request("new", 100), ledger.snapshot(0.0))) == "i2"

    def test_mixed_instances_belong_to_both_pools(self) -> None:
        ledger = fleet(P, M, D)
        queue(ledger, "i0", 500)
        decode(ledger, "i2", 500)
        assert prefill_on(place_prefill(ledger)) == "i1"
        assert decode_on(place_decode(ledger, "i0")) == "i1"

    def test_line_4_a_prefill_that_would_miss_flips_a_decode_instance(self) -> None:
        """F empty and decode load low: j = flip(D->P); line 5: return j."""
        ledger = fleet(P, D, D)
        queue(ledger, "i0", 2000)
        verdict = place_prefill(ledger)
        assert verdict.flips == (Flip("i1", P, "inline"),)
        assert prefill_on(verdict) == "i1"
        assert verdict.flips[0].sentence().startswith("no prefill instance meets ")
        assert ": the best waits 2," in verdict.flips[0].sentence(), "in ms, and what the target missed"

    def test_line_4_not_while_the_decode_pool_is_loaded(self) -> None:
        """The guard keeps requests from holding KV that nobody decodes."""
        ledger = fleet(P, D, D)
        now = pace(ledger, [decode(ledger, "i1", 100), decode(ledger, "i2", 100)], 0.04)
        queue(ledger, "i0", 2000, now)
        verdict = place_prefill(ledger, now=now)
        assert verdict.flips == ()
        assert prefill_on(verdict) == "i0"

    @pytest.mark.parametrize(("off_s", "flips"), [(-1e-4, 1), (1e-4, 0)])
    def test_low_decode_load_means_below_shrink(self, off_s: float, flips: int) -> None:
        """Narwhal: L_SHRINK, not L_EXPAND; else this flip and Algorithm 2's second trigger oscillate."""
        ledger = fleet(P, D, D)
        at_shrink = 0.01 + L_SHRINK * (0.05 - 0.01)
        both = [decode(ledger, "i1", 100), decode(ledger, "i2", 100)]
        now = pace(ledger, both, at_shrink + off_s)
        assert len(place_prefill(ledger, 2000, now).flips) == flips

    def test_line_4_a_decode_that_would_miss_flips_a_prefill_instance(self) -> None:
        """phase == decode: j = flip(P->D), not gated by load."""
        ledger = fleet(P, P, D)
        decode(ledger, "i2", 4000)
        queue(ledger, "i0", 900)
        verdict = place_decode(ledger, "i0")
        assert verdict.flips == (Flip("i1", D, "inline"),)
        assert verdict.decision == Place("i0", "i1", Path.DISAGGREGATED)
        assert "meets 50 ms per token: the best holds " in verdict.flips[0].sentence()

    def test_line_4_a_decode_flip_waits_for_the_cooldown(self) -> None:
        ledger = fleet(P, P, P, D)
        decode(ledger, "i3", 4000)
        ledger.flip("i2", D, 100.0)
        decode(ledger, "i2", 4000, 100.0)
        assert place_decode(ledger, "i0", now=100.0 + COOLDOWN_S - 0.1).flips == ()
        assert len(place_decode(ledger, "i0", now=100.0 + COOLDOWN_S).flips) == 1

    def test_line_6_best_effort_is_the_least_cost_of_all(self) -> None:
        """return argmin(C): no flip is legal, so the best of the bad."""
        ledger = fleet(P, D)
        queue(ledger, "i0", 5000)
        verdict = place_prefill(ledger)
        assert (prefill_on(verdict), verdict.flips) == ("i0", ())
        assert "best effort" in verdict.reason
        decode(ledger, "i1", 9000)
        verdict = place_decode(ledger, "i0")
        assert (decode_on(verdict), verdict.flips) == ("i1", ())

    def test_every_instance_may_serve_when_a_pool_is_empty(self) -> None:
        """Narwhal: an empty pool falls back to every instance; a fleet of one serves both phases."""
        ledger = fleet(P)
        assert decode_on(place_decode(ledger, "i0")) == "i0"
        ledger = fleet(D)
        assert prefill_on(place_prefill(ledger)) == "i0"


class TestStatelessInstances:
    """Section 5.1: a flip is a label write; work in progress is not touched."""

    def test_a_flipped_instance_keeps_its_old_work_beside_the_new(self) -> None:
        ledger = fleet(P, D, D)
        running = decode(ledger, "i1", 100)
        queue(ledger, "i0", 2000)
        verdict = place_prefill(ledger)
        for moved in verdict.flips:
            ledger.flip(moved.instance, moved.to, 0.0)
        ledger.prefill_dispatched(request("new", 100), prefill_on(verdict), 0.0)
        ledger.flip("i1", P, 0.0)
        assert ledger.residents("i1").decodes == (running,)
        ledger.check_integrity()

    def test_no_transfer_where_both_phases_share_an_instance(self) -> None:
        """KV moves only when the decode instance differs from the prefill instance."""
        ledger = fleet(P, D)
        ledger.prefill_dispatched(request("r", 100), "i0", 0.0)
        ledger.prefill_ended("r", 0.1)
        ledger.flip("i0", D, 0.1)
        chosen = place_decode(ledger, "i0", now=0.1)
        assert decode_on(chosen) == "i0"
        ledger.decode_dispatched("r", "i0", 101, 0.1)
        assert not ledger.transfer_ended("r", 0.1), "nothing moved"

    def test_the_first_flip_to_decode_owes_no_cooldown(self) -> None:
        """Ours: Narwhal starts the cooldown with the process; here none has happened."""
        ledger = fleet(P, P, D)
        assert ledger.snapshot(0.0).last_flip_to_decode_s == -math.inf
        assert flip(ledger.snapshot(0.0), D, "inline", cooldown_s=COOLDOWN_S) is not None
