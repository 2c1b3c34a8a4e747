"""The fluid model of a fleet, the lengths that it goes by, and the load that it is held against."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import e, inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.slo import Slo
from tidegate.costs.forms import TransferCost
from tidegate.costs.profile import ProfileTable
from tidegate.policies.protocols import AnswerLengths
from tidegate.policies.tidegate.offered import OFFERED_S, Offered
from tidegate.policies.tidegate.shape import FluidFleet, MeanRequest, RecentLengths
from tidegate_testing import FAST

SLO = Slo(2.0, 0.05)
LONG = MeanRequest(15_000.0, 1.85e8, 150.0, 15_075.0)
"""Long prompts, whose context makes a resident token beside a chunk dear."""
SHORT = MeanRequest(290.0, 1.0e5, 36.0, 310.0)


class TestFluidFleet:
    def fleet(self, demand: MeanRequest) -> FluidFleet:
        return FluidFleet(ProfileTable.of([FAST]), 400_000.0, 131_072.0, demand, SLO)

    def test_long_contexts_ask_for_instances_that_only_prefill(self) -> None:
        (best_rps, best), *_ = self.fleet(LONG).ranked(np.ones(8))
        (both_rps,) = self.fleet(LONG).rates_rps(np.array([0.0]), np.array([8.0]))
        assert best.prefill > 0 and best_rps > 1.08 * both_rps

    def test_some_instance_always_decodes(self) -> None:
        assert all(shape.mixed for _, shape in self.fleet(LONG).ranked(np.ones(8)))

    def test_histories_in_place_speak_against_a_split(self) -> None:
        """An instance that only prefills has none of them, and reads them where links are fast."""
        lengths = RecentLengths([AnswerLengths(60_000, 45_000, 150)] * 10)
        demand = lengths.demand(0.0)
        assert demand is not None
        counts = np.ones(8)
        slow = ProfileTable.of([replace(FAST, transfer=TransferCost(5e-4, 2e10))])
        for fleet in replace(self.fleet(demand), costs=slow), replace(self.fleet(demand), reads=False):
            assert fleet.ranked(counts)[0][1].prefill == 0
        fast = ProfileTable.of([replace(FAST, transfer=TransferCost(5e-4, 1.44e12))])
        assert replace(self.fleet(demand), costs=fast).ranked(counts)[0][1].prefill > 0

    def test_short_prompts_gain_little_by_a_split(self) -> None:
        (best_rps, _), *_ = self.fleet(SHORT).ranked(np.ones(8))
        (both_rps,) = self.fleet(SHORT).rates_rps(np.array([0.0]), np.array([8.0]))
        assert best_rps < 1.05 * both_rps

    def test_brief_answers_speak_against_a_split_and_change_nothing_without_one(self) -> None:
        prefill = np.array([0.0, 6.0])
        (both_rps, split_rps) = self.fleet(LONG).rates_rps(prefill, 8.0 - prefill)
        brief = self.fleet(LONG._replace(brief=(0.2,) * 6)).rates_rps(prefill, 8.0 - prefill)
        assert brief[0] == both_rps
        assert 0.8 * split_rps <= brief[1] < 0.85 * split_rps, "nearly all are prefilled by the six"

    def test_the_share_of_brief_answers_is_that_of_all_that_have_begun(self) -> None:
        """The first answers to end are the brief ones."""
        lengths = RecentLengths(
            [AnswerLengths(100, 0, 3), AnswerLengths(100, 0, 9), AnswerLengths(100, 0, 1)]
        )
        ended, begun = lengths.demand(0.0), lengths.demand(3 * 13.0)
        assert ended is not None and ended.brief == pytest.approx([0.0, *[1 / 3] * 5])
        assert begun is not None and begun.brief == pytest.approx([0.0, *[1 / 3 / 4] * 5])

    def test_what_a_move_costs_is_won_back_later_where_steps_leave_little_time(self) -> None:
        """Of answers of five steps all are late only where a step alone takes most of the target."""
        demand = SHORT._replace(brief=(0.0, 0.0, 0.0, 0.0, 0.3, 0.3))
        prefill = np.array([2.0, 6.0])
        rates = self.fleet(demand._replace(brief=())).rates_rps(prefill, 8.0 - prefill)
        late = self.fleet(demand).rates_rps(prefill, 8.0 - prefill)
        assert late[0] == pytest.approx(rates[0]) and late[1] < 0.9 * rates[1]

    @given(
        st.builds(
            lambda new, steps: MeanRequest(new, new * new, steps, new + 0.5 * steps),
            st.floats(1, 30_000),
            st.floats(0, 3_000),
        )
    )
    def test_more_instances_never_serve_less(self, demand: MeanRequest) -> None:
        fleet, counts = self.fleet(demand), np.arange(1.0, 9.0)
        for growing, still in ((counts, 2 * np.ones(8)), (2 * np.ones(8), counts)):
            rates = fleet.rates_rps(growing, still)
            assert np.isfinite(rates).all()
            assert all(one <= other * (1 + 1e-4) for one, other in pairwise(rates))


class TestOffered:
    @given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=20), st.floats(-1e6, 1e6))
    def test_a_constant_load_is_known_at_once_whenever_the_clock_starts(
        self, gaps_s: list[float], start_s: float
    ) -> None:
        offered, at_s = Offered().after(7, start_s), start_s
        assert offered.rps(0.0) == inf
        for gap_s in gaps_s:
            at_s += gap_s
            offered = offered.after(7 + round(1000 * (at_s - start_s)), at_s)
        assert offered.rps(0.0) == pytest.approx(1000.0, rel=0.02)
        assert offered.rps(3 * OFFERED_S) == pytest.approx(offered.rps(0.0) + 3.0)

    def test_newer_requests_weigh_more(self) -> None:
        calm = Offered().after(0, 0.0).after(0, 10.0 * OFFERED_S)
        busy = calm.after(round(50 * OFFERED_S), 11.0 * OFFERED_S)
        assert busy.rps(0.0) == pytest.approx(50.0 * (1.0 - 1.0 / e), rel=0.01)
