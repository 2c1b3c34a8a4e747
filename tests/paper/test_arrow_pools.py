"""Arrow v2 (arXiv 2505.11916v2), clause by clause: loads, Algorithms 2 and 3.

A quotation names the section; "Narwhal" marks what an independent implementation of the paper adds.
"""

from __future__ import annotations

import pytest

from tests.paper.arrow_fleet import (
    D,
    M,
    P,
    decode,
    fleet,
    pace,
    queue,
)
from tidegate.core.decision import ControlDecision, Flip
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.ledger import Ledger
from tidegate.policies.arrow.published import (
    COOLDOWN_S,
    L_EXPAND,
    L_SHRINK,
    SUSTAIN_TICKS,
    ArrowMonitor,
    decode_pool_load,
    flip,
    prefill_pool_load,
)
from tidegate_testing import instance, profile


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

    def ticks(
        self, ledger: Ledger, count: int, monitor: ArrowMonitor | None = None
    ) -> list[ControlDecision[int]]:
        controls: list[ControlDecision[int]] = []
        for n in range(count):
            state = controls[-1].state if controls else 0
            controls.append((monitor or ArrowMonitor()).decide(ledger.snapshot(10.0 + n), state))
        return controls

    def test_decode_at_or_above_expand_for_the_sustained_ticks_flips_one(self) -> None:
        """LD >= L_EXPAND over a period: flip(P->D), and the count starts over."""
        controls = self.ticks(self.loaded(0.06, prefill_tokens=900), SUSTAIN_TICKS)
        assert [len(c.actions) for c in controls] == [0] * (SUSTAIN_TICKS - 1) + [1]
        (flipped,) = controls[-1].actions
        assert isinstance(flipped, Flip)
        assert (flipped.to, flipped.reason) == (D, "monitor")
        assert controls[-1].state == 0

    def test_idle_prefill_is_lent_while_decode_is_not_idle(self) -> None:
        """LP <= L_SHRINK and L_SHRINK <= LD: lend in anticipation of bursts."""
        ledger = self.loaded(0.04)
        load = decode_pool_load(ledger.snapshot(1.0), Slo())
        assert L_SHRINK <= load < L_EXPAND
        assert len(self.ticks(ledger, SUSTAIN_TICKS)[-1].actions) == 1

    def test_busy_prefill_is_not_lent_below_expand(self) -> None:
        ledger = self.loaded(0.04, prefill_tokens=900)
        assert all(not c.actions for c in self.ticks(ledger, 3 * SUSTAIN_TICKS))

    def test_idle_prefill_stays_while_decode_idles_too(self) -> None:
        assert all(not c.actions for c in self.ticks(self.loaded(0.011), 3 * SUSTAIN_TICKS))

    def test_one_quiet_tick_starts_the_count_over(self) -> None:
        """cnt = 0 when neither clause holds."""
        busy, quiet = self.loaded(0.06).snapshot(10.0), self.loaded(0.011).snapshot(10.0)
        state = ArrowMonitor().initial()
        for snapshot in (busy, busy, quiet, busy, busy):
            control = ArrowMonitor().decide(snapshot, state)
            state = control.state
            assert control.actions == ()
        assert state == 2

    def test_a_refused_flip_keeps_the_count(self) -> None:
        """Narwhal: the tick after the cooldown flips, not three ticks later."""
        ledger = self.loaded(0.06)
        ledger.flip("i0", D, 9.5)
        ledger.flip("i0", P, 9.6)
        controls = self.ticks(ledger, 11)
        assert [bool(c.actions) for c in controls] == [False] * 10 + [True]

    def test_it_never_moves_a_decode_instance(self) -> None:
        """P->D only; D->P is Algorithm 1's."""
        ledger = fleet(P, D, D, D)
        queue(ledger, "i0", 100_000)
        assert all(not c.actions for c in self.ticks(ledger, 9))

    def test_it_keeps_the_last_prefill_instance(self) -> None:
        ledger = fleet(P, D)
        name = decode(ledger, "i1", 100)
        ledger.tokens(name, 1, 0.0)
        ledger.window_closed(5.0)
        assert all(not c.actions for c in self.ticks(ledger, 9))


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
