"""Arrow v2 (arXiv 2505.11916v2), clause by clause.

A quotation names the section; "Narwhal" marks what an independent implementation of the paper adds.
The fleet's arithmetic: a prompt token takes 1 ms, a step 10 ms plus 10 us per resident token, so the
default targets (1 s, 50 ms) allow 1,000 queued prompt tokens and 4,000 resident ones.
"""

from __future__ import annotations

import math

import pytest

from tidegate.core.decision import Control, Flip, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.ledger import Ledger
from tidegate.policies.arrow import ArrowPlacement
from tidegate.policies.arrow_flip import COOLDOWN_S, flip
from tidegate.policies.arrow_loads import L_EXPAND, L_SHRINK, decode_pool_load, prefill_pool_load
from tidegate.policies.arrow_monitor import SUSTAIN_TICKS, ArrowMonitor
from tidegate.policies.pricing import tokens_over_limit, ttft_seconds
from tidegate.testing import cluster, instance, profile, request

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
ARROW = ArrowPlacement()


def fleet(*roles: Role) -> Ledger:
    return cluster(len(roles), roles=roles, profile=profile())


def queue(ledger: Ledger, on: str, tokens: int, now: float = 0.0) -> str:
    """Leave a prefill on ``on``; return its id."""
    name = f"p-{on}-{tokens}-{ledger.counts().dispatched}"
    ledger.prefill_dispatched(request(name, tokens), on, now)
    return name


def decode(ledger: Ledger, on: str, tokens: int, now: float = 0.0) -> str:
    """Leave a decode of ``tokens`` on ``on``; return its id."""
    name = queue(ledger, on, tokens, now)
    ledger.decode_dispatched(name, on, tokens, now)
    return name


def pace(ledger: Ledger, request_ids: list[str], gap_s: float, start: float = 0.0) -> float:
    """Let decodes produce ten tokens each, ``gap_s`` apart, in one window; return its end."""
    for name in request_ids:
        ledger.tokens(name, 1, start)
    ledger.window_closed(start)
    for name in request_ids:
        ledger.tokens(name, 10, start + 10 * gap_s)
    ledger.window_closed(start + 10 * gap_s)
    return start + 10 * gap_s


def place_prefill(ledger: Ledger, tokens: int = 100, now: float = 0.0) -> Verdict:
    return ARROW.place_prefill(request("new", tokens), ledger.snapshot(now))


def place_decode(ledger: Ledger, ran_on: str, tokens: int = 100, now: float = 0.0) -> Verdict:
    return ARROW.place_decode(request("new", tokens), ledger.snapshot(now), ran_on)


def prefill_on(verdict: Verdict) -> str:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.prefill_on


def decode_on(verdict: Verdict) -> str | None:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.decode_on


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
        assert ttft_seconds(ledger.snapshot(0.0), request("new", 100))[0] == pytest.approx(0.4)

    def test_time_already_spent_on_the_running_prefill_does_not_count(self) -> None:
        """Departure: the queue is what is left of it, where the paper sums whole prefills."""
        ledger = fleet(P, D)
        queue(ledger, "i0", 300)
        assert ttft_seconds(ledger.snapshot(0.2), request("new", 100))[0] == pytest.approx(0.2)


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
        assert tokens_over_limit(snapshot, request("new", 4000))[1] == pytest.approx(0.0)

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

    def test_kv_memory_is_a_filter_while_some_instance_fits(self) -> None:
        """Ours: a decode is not sent where its KV cannot lie."""
        ledger = cluster(3, roles=(P, D, D), profile=profile(), kv_capacity_tokens=1000)
        queue(ledger, "i2", 500)
        decode(ledger, "i1", 950)
        assert decode_on(place_decode(ledger, "i0")) == "i2"
        ledger = cluster(2, roles=(P, D), profile=profile(), kv_capacity_tokens=1000)
        decode(ledger, "i1", 950)
        assert decode_on(place_decode(ledger, "i0")) == "i1"

    def test_kv_that_lies_there_already_needs_no_second_room(self) -> None:
        """Ours: in the fallback the prefill instance competes, and holds the request's KV."""
        ledger = Ledger()
        for name in ("i0", "i1"):
            pinned = instance(name, kv_capacity_tokens=1000, flippable=False)
            ledger.instance_up(pinned, profile(), P, 0.0)
        ledger.prefill_ended(queue(ledger, "i0", 800), 0.0)
        queue(ledger, "i1", 50)
        assert decode_on(place_decode(ledger, "i0", tokens=800)) == "i0"


class TestLoads:
    """Section 5.5: loads are shares of the SLO target, never raw counts."""

    def test_prefill_load_is_predicted_seconds_over_the_ttft_target(self) -> None:
        ledger = fleet(P, P, D)
        queue(ledger, "i0", 500)
        queue(ledger, "i1", 300)
        assert prefill_pool_load(ledger.snapshot(0.0), Slo(2.0, 0.05)) == pytest.approx(0.2)

    def test_prefill_load_takes_the_larger_of_now_and_the_interval_average(self) -> None:
        """Narwhal: at low rates a queue is empty at most instants, and the reading aliases to zero."""
        ledger = fleet(P, D)
        ledger.window_closed(0.0)
        name = queue(ledger, "i0", 800)
        ledger.prefill_ended(name, 0.8)
        ledger.window_closed(1.0)
        assert ledger.snapshot(1.0).prefill_queue_s[0] == 0.0
        assert prefill_pool_load(ledger.snapshot(1.0), Slo()) == pytest.approx(0.64)

    def test_work_not_label_defines_the_prefill_pool(self) -> None:
        """Narwhal: a decode-labelled instance that still prefills counts; an idle one does not."""
        ledger = fleet(P, D, D)
        queue(ledger, "i1", 1000)
        assert prefill_pool_load(ledger.snapshot(0.0), Slo()) == pytest.approx(0.5)

    def test_decode_load_is_the_mean_gap_over_the_tpot_target_above_the_floor(self) -> None:
        """Narwhal: max(0, gap - k0) / (SLO_TPOT - k0), so an engine at its natural pace reads idle."""
        ledger = fleet(P, D)
        now = pace(ledger, [decode(ledger, "i1", 100)], 0.03)
        assert decode_pool_load(ledger.snapshot(now), Slo()) == pytest.approx(0.5)
        idle = fleet(P, D)
        now = pace(idle, [decode(idle, "i1", 100)], 0.01)
        assert decode_pool_load(idle.snapshot(now), Slo()) == pytest.approx(0.0, abs=1e-9)

    def test_where_the_floor_exceeds_the_target_the_plain_ratio_remains(self) -> None:
        """Narwhal: raw ratio if k0 >= SLO_TPOT. Heterogeneous fleets take it per instance."""
        for slow in (profile(step=(0.06, 0.0, 1e-5)), profile(step=(0.07, 0.0, 1e-5))):
            ledger = Ledger()
            ledger.instance_up(instance("i0"), profile(step=(0.06, 0.0, 1e-5)), P, 0.0)
            ledger.instance_up(instance("i1"), slow, D, 0.0)
            now = pace(ledger, [decode(ledger, "i1", 100)], 0.1)
            assert decode_pool_load(ledger.snapshot(now), Slo()) == pytest.approx(0.1 / 0.05)

    def test_a_stalled_instance_reads_its_longest_open_gap(self) -> None:
        """Narwhal: decodes but no token in the interval is not idleness."""
        ledger = fleet(P, D)
        name = decode(ledger, "i1", 100)
        ledger.tokens(name, 1, 0.0)
        ledger.window_closed(2.0)
        assert decode_pool_load(ledger.snapshot(2.0), Slo()) == pytest.approx((2.0 - 0.01) / 0.04)

    def test_an_idle_decode_pool_reads_zero(self) -> None:
        assert decode_pool_load(fleet(P, D).snapshot(0.0), Slo()) == 0.0

    def test_a_gap_of_decodes_that_ended_does_not_count(self) -> None:
        ledger = fleet(P, D)
        name = decode(ledger, "i1", 100)
        now = pace(ledger, [name], 0.2)
        ledger.finished(name, now)
        assert decode_pool_load(ledger.snapshot(now), Slo()) == 0.0

    def test_pool_load_is_the_mean_over_its_instances(self) -> None:
        ledger = fleet(P, D, D)
        now = pace(ledger, [decode(ledger, "i1", 100)], 0.05)
        assert decode_pool_load(ledger.snapshot(now), Slo()) == pytest.approx(0.5)


class TestAlgorithm2:
    """Section 5.5, Algorithm 2: the monitor moves instances from prefill to decode only."""

    def loaded(self, gap_s: float, prefill_tokens: int = 0) -> Ledger:
        """Return three prefill instances, and one decode instance with that mean gap."""
        ledger = fleet(P, P, P, D)
        now = pace(ledger, [decode(ledger, "i3", 100)], gap_s)
        for at in ("i0", "i1", "i2"):
            if prefill_tokens:
                queue(ledger, at, prefill_tokens, now)
        return ledger

    def ticks(self, ledger: Ledger, count: int, monitor: ArrowMonitor | None = None) -> list[Control]:
        controls: list[Control] = []
        for n in range(count):
            state = controls[-1].state if controls else None
            controls.append((monitor or ArrowMonitor()).step(ledger.snapshot(10.0 + n), state))
        return controls

    def test_decode_at_or_above_expand_for_the_sustained_ticks_flips_one(self) -> None:
        """LD >= L_EXPAND over a period: flip(P->D), and the count starts over."""
        controls = self.ticks(self.loaded(0.06, prefill_tokens=900), SUSTAIN_TICKS)
        assert [len(c.flips) for c in controls] == [0] * (SUSTAIN_TICKS - 1) + [1]
        assert controls[-1].flips[0].to == D
        assert controls[-1].flips[0].reason == "monitor"
        assert controls[-1].state == 0

    def test_idle_prefill_is_lent_while_decode_is_not_idle(self) -> None:
        """LP <= L_SHRINK and L_SHRINK <= LD: lend in anticipation of bursts."""
        ledger = self.loaded(0.04)
        load = decode_pool_load(ledger.snapshot(1.0), Slo())
        assert L_SHRINK <= load < L_EXPAND
        assert len(self.ticks(ledger, SUSTAIN_TICKS)[-1].flips) == 1

    def test_busy_prefill_is_not_lent_below_expand(self) -> None:
        ledger = self.loaded(0.04, prefill_tokens=900)
        assert all(not c.flips for c in self.ticks(ledger, 3 * SUSTAIN_TICKS))

    def test_idle_prefill_stays_while_decode_idles_too(self) -> None:
        assert all(not c.flips for c in self.ticks(self.loaded(0.011), 3 * SUSTAIN_TICKS))

    def test_one_quiet_tick_starts_the_count_over(self) -> None:
        """cnt = 0 when neither clause holds."""
        busy, quiet = self.loaded(0.06).snapshot(10.0), self.loaded(0.011).snapshot(10.0)
        state: object = None
        for snapshot in (busy, busy, quiet, busy, busy):
            control = ArrowMonitor().step(snapshot, state)
            state = control.state
            assert control.flips == ()
        assert state == 2

    def test_a_refused_flip_keeps_the_count(self) -> None:
        """Narwhal: the tick after the cooldown flips, not three ticks later."""
        ledger = self.loaded(0.06)
        ledger.flip("i0", D, 9.5)
        ledger.flip("i0", P, 9.6)
        controls = self.ticks(ledger, 11)
        assert [bool(c.flips) for c in controls] == [False] * 10 + [True]

    def test_it_never_moves_a_decode_instance(self) -> None:
        """P->D only; D->P is Algorithm 1's."""
        ledger = fleet(P, D, D, D)
        queue(ledger, "i0", 100_000)
        assert all(not c.flips for c in self.ticks(ledger, 9))

    def test_it_keeps_the_last_prefill_instance(self) -> None:
        ledger = fleet(P, D)
        name = decode(ledger, "i1", 100)
        ledger.tokens(name, 1, 0.0)
        ledger.window_closed(5.0)
        assert all(not c.flips for c in self.ticks(ledger, 9))

    def test_a_foreign_state_counts_as_none(self) -> None:
        assert ArrowMonitor().step(self.loaded(0.06).snapshot(10.0), "what").state == 1


class TestAlgorithm3:
    """Section 5.5, Algorithm 3: choose the instance to flip."""

    def test_the_cooldown_holds_back_prefill_to_decode(self) -> None:
        """now - last_p2d < COOLDOWN: return none."""
        ledger = fleet(P, P, P, D)
        ledger.flip("i0", D, 100.0)
        late = 100.0 + COOLDOWN_S
        assert flip(ledger.snapshot(late - 0.1), D, "inline", cooldown_s=COOLDOWN_S) is None
        assert flip(ledger.snapshot(late), D, "inline", cooldown_s=COOLDOWN_S) is not None

    def test_the_cooldown_does_not_hold_back_decode_to_prefill(self) -> None:
        """Cooldown only on P->D: prefill load is predicted, and met at once."""
        ledger = fleet(P, P, D, D)
        ledger.flip("i0", D, 100.0)
        assert flip(ledger.snapshot(100.0), P, "inline", cooldown_s=COOLDOWN_S) is not None

    def test_a_flip_to_prefill_does_not_start_the_cooldown(self) -> None:
        ledger = fleet(P, P, D, D)
        ledger.flip("i2", P, 100.0)
        assert flip(ledger.snapshot(100.0), D, "inline", cooldown_s=COOLDOWN_S) is not None

    @pytest.mark.parametrize(("roles", "to"), [((P, D, D), D), ((P, P, D), P)])
    def test_it_never_empties_a_pool(self, roles: tuple[Role, ...], to: Role) -> None:
        """|S| <= 1: return none."""
        assert flip(fleet(*roles).snapshot(0.0), to, "inline") is None

    def test_an_incompletely_flipped_instance_goes_back_first(self) -> None:
        """flip_cost(P-labelled) = (1[D empty], ...): it still holds decodes, so its indicator is 0."""
        ledger = fleet(P, P, D, D)
        decode(ledger, "i1", 100)
        queue(ledger, "i1", 900)
        moved = flip(ledger.snapshot(0.0), D, "inline")
        assert moved is not None
        assert moved.instance == "i1"
        queue(ledger, "i3", 100)
        decode(ledger, "i3", 3000)
        moved = flip(ledger.snapshot(0.0), P, "inline")
        assert moved is not None
        assert moved.instance == "i3"

    def test_among_settled_prefill_instances_the_shortest_queue_flips(self) -> None:
        """flip_cost(P-labelled i) = (1[D_i empty], sum of T over P_i)."""
        ledger = fleet(P, P, D)
        queue(ledger, "i0", 500)
        queue(ledger, "i1", 400)
        moved = flip(ledger.snapshot(0.0), D, "inline")
        assert moved == Flip("i1", D, "inline")

    def test_among_settled_decode_instances_the_fewest_tokens_flip(self) -> None:
        """flip_cost(D-labelled i) = (1[P_i empty], sum of L over D_i)."""
        ledger = fleet(P, D, D)
        decode(ledger, "i1", 500)
        decode(ledger, "i2", 400)
        assert flip(ledger.snapshot(0.0), P, "inline") == Flip("i2", P, "inline")

    def test_pinned_and_mixed_instances_never_flip(self) -> None:
        """A fleet where some instance is not flippable is planned around, and still counts as a member."""
        ledger = fleet(P, D, M)
        ledger.instance_up(instance("pinned", flippable=False), profile(), P, 0.0)
        queue(ledger, "i0", 5000)
        assert flip(ledger.snapshot(0.0), D, "inline") == Flip("i0", D, "inline")
        ledger.instance_down("i0", 0.0)
        ledger.instance_up(instance("pinned2", flippable=False), profile(), P, 0.0)
        assert flip(ledger.snapshot(0.0), D, "inline") is None


class TestRepair:
    """Ours: the paper has no failures. A pool whose only member died is refilled."""

    def test_the_next_placement_refills_an_empty_pool(self) -> None:
        ledger = fleet(P, D, D)
        decode(ledger, "i1", 100)
        ledger.instance_down("i0", 1.0)
        verdict = place_prefill(ledger, now=1.0)
        assert verdict.flips == (Flip("i2", P, "repair"),)
        assert prefill_on(verdict) == "i2"

    def test_the_next_tick_does_too_and_the_cooldown_does_not_matter(self) -> None:
        ledger = fleet(P, P, D)
        ledger.flip("i0", D, 0.9)
        ledger.flip("i0", P, 0.95)
        ledger.instance_down("i2", 1.0)
        assert ArrowMonitor().step(ledger.snapshot(1.0), None).flips == (Flip("i0", D, "repair"),)
        assert place_decode(ledger, "i0", now=1.0).flips == (Flip("i0", D, "repair"),)

    def test_one_survivor_serves_both_phases_unflipped(self) -> None:
        ledger = fleet(P, D)
        ledger.instance_down("i0", 1.0)
        verdict = place_prefill(ledger)
        assert (prefill_on(verdict), verdict.flips) == ("i1", ())
        assert ArrowMonitor().step(ledger.snapshot(1.0), None).flips == ()

    def test_a_mixed_instance_keeps_both_pools_alive(self) -> None:
        assert ArrowMonitor().step(fleet(M, D, D).snapshot(0.0), None).flips == ()
        assert ArrowMonitor().step(fleet(M, P, P).snapshot(0.0), None).flips == ()

    def test_an_empty_cluster_has_nothing_to_repair(self) -> None:
        assert ArrowMonitor().step(Ledger().snapshot(0.0), 2).flips == ()


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
        assert not ledger.transfer_started("r", 0.1)

    def test_the_first_flip_to_decode_owes_no_cooldown(self) -> None:
        """Ours: Narwhal starts the cooldown with the process; here none has happened."""
        ledger = fleet(P, P, D)
        assert ledger.snapshot(0.0).last_flip_to_decode_s == -math.inf
        assert flip(ledger.snapshot(0.0), D, "inline", cooldown_s=COOLDOWN_S) is not None
