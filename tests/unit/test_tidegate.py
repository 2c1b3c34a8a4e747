"""The system ``tidegate``: one cost for every place, and labels by what the fleet serves."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replace_struct

from tidegate.core.decision import ControlDecision, Flip, Path, Place, Verdict
from tidegate.core.errors import ConfigError, NoInstance
from tidegate.core.instance import Role
from tidegate.core.session import History
from tidegate.core.slo import Slo
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.ledger import Ledger
from tidegate.policies.protocols import AnswerLengths, Signal
from tidegate.policies.tidegate.cost import CostConstants, displaced_seconds
from tidegate.policies.tidegate.labels import (
    FleetShape,
    Rest,
    ShapeConstants,
    ShapeState,
    flips_to,
    prefill_order,
)
from tidegate.policies.tidegate.offered import OFFERED_S, Offered
from tidegate.policies.tidegate.placement import OneCost
from tidegate.policies.tidegate.shape import FluidFleet, RecentLengths
from tidegate.systems import make_system
from tidegate_testing import FAST, REFERENCE, cluster, instance, request

START = ShapeState()
P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
SLO = Slo(2.0, 0.05)


def queue(ledger: Ledger, on: str, tokens: int) -> str:
    name = f"p-{on}-{tokens}"
    ledger.prefill_dispatched(request(name, tokens), on, 0.0)
    return name


def decode(ledger: Ledger, on: str, tokens: int) -> None:
    ledger.decode_dispatched(queue(ledger, on, tokens), on, tokens, 0.0)


def place(verdict: Verdict) -> Place:
    assert isinstance(verdict.decision, Place)
    return verdict.decision


class TestOneCost:
    def test_both_phases_run_where_the_prefill_costs_least(self) -> None:
        ledger = cluster(3, roles=(M, M, M))
        queue(ledger, "i0", 8000)
        decode(ledger, "i1", 100_000)
        assert place(OneCost().place_prefill(request("new", 1000), ledger.snapshot(0.0))) == Place(
            "i2", "i2", Path.COLOCATED
        )

    def test_decodes_stretch_a_prefill_beside_them(self) -> None:
        ledger = cluster(2, roles=(M, M))
        decode(ledger, "i0", 300_000)
        verdict = OneCost().place_prefill(request("new", 8000), ledger.snapshot(0.0))
        assert place(verdict).prefill_on == "i1"
        assert verdict.alternatives is not None
        beside_s = verdict.alternatives.terms()["beside_s"]
        assert beside_s[0] > 0.1 and beside_s[1] == 0.0

    def test_a_step_of_a_fixed_budget_that_breaks_decodes_goes_where_fewer_are(self) -> None:
        def damage_s(*steps: int, prompt: int = 8000) -> list[float]:
            ledger = Ledger()
            for column, tokens in enumerate(steps):
                known = replace(instance(f"i{column}"), step_tokens=tokens)
                ledger.instance_up(known, FAST, M, 0.0)
                for number in range(2 + column):
                    decode(ledger, known.id, 1000 + number)
            verdict = OneCost().place_prefill(request("new", prompt), ledger.snapshot(0.0))
            assert verdict.alternatives is not None
            found: list[float] = verdict.alternatives.terms()["damage_s"].tolist()
            return found

        assert damage_s(0, 0) == [0.0, 0.0], "engines that choose by what decodes bear"
        fewer, more = damage_s(8192, 8192)
        assert 0.0 < fewer < more
        assert damage_s(512, 8192)[0] == 0.0 < damage_s(512, 8192)[1], "a small step breaks nobody"
        assert damage_s(2048, 8192, prompt=100) == [0.0, 0.0], "nor does a short prompt"
        two, four = damage_s(8192, 8192, prompt=12_000)[0], damage_s(8192, 8192)[0]
        assert two > four, "two such steps are worse than one"

    def test_an_answer_that_goes_on_is_not_charged_for_a_first_token_that_is_out(self) -> None:
        """A request replayed long after its arrival goes where its prompt is computed soonest."""
        ledger = cluster(2, roles=(M, M))
        queue(ledger, "i0", 8000)
        snapshot = ledger.snapshot(0.0)
        late_s = {}
        for generated in (0, 5):
            asked = replace_struct(request("again", 3000), arrival_s=-10.0, slo=SLO, generated=generated)
            verdict = OneCost().place_prefill(asked, snapshot)
            assert place(verdict).prefill_on == "i1" and verdict.alternatives is not None
            late_s[generated] = verdict.alternatives.terms()["late_s"].min()
        assert late_s[0] > 80.0 and late_s[5] == 0.0

    def test_prompts_that_will_be_late_anyway_keep_nobody_waiting_for_long(self) -> None:
        ledger = cluster(2, roles=(M, M))
        for number in range(20):
            asked = replace_struct(request(f"late{number}", 8000), slo=SLO)
            ledger.prefill_dispatched(asked, "i0", 0.0)
        waits_s = {}
        for at_s in (0.0, 10.0):
            asked = replace_struct(request("new", 1000), arrival_s=at_s, slo=SLO)
            verdict = OneCost().place_prefill(asked, ledger.snapshot(at_s))
            assert verdict.alternatives is not None
            waits_s[at_s] = verdict.alternatives.terms()["wait_s"][0]
        assert waits_s[0.0] > 1.5 * SLO.ttft_s
        assert waits_s[10.0] == pytest.approx(0.5 * SLO.ttft_s)
        for number in range(20):
            ledger.prefill_ended(f"late{number}", 11.0)
        ledger.check_integrity()
        assert ledger.snapshot(11.0).hopeless_s[0] == 0.0

    def test_a_session_leaves_home_only_for_more_than_its_own_wait(self) -> None:
        """Computing the history again costs less than the queue at home, for this prompt alone."""
        wheres = {}
        for queued in (8000, 400_000):
            ledger = cluster(2, roles=(M, M))
            queue(ledger, "i0", queued)
            asked = replace_struct(
                request("new", 2500), cached={"i0": 2000}, history=History("i0", 2000), slo=SLO
            )
            for constants in (CostConstants(), CostConstants(away=0.0)):
                verdict = OneCost(constants).place_prefill(asked, ledger.snapshot(0.0))
                wheres[queued, constants.away] = place(verdict).prefill_on
        assert wheres[8000, 0.0] == "i1" and wheres[8000, CostConstants().away] == "i0"
        assert wheres[400_000, CostConstants().away] == "i1"

    def test_kv_that_histories_of_others_have_is_priced_once_there_is_no_other_room(self) -> None:
        """An idle session has 20,000 of 50,000 tokens of i0: what is beyond the other 30,000 displaces it.
        One turn of two went on with a session, so that half of it is worth something."""
        ledger = cluster(2, roles=(M, M), kv_capacity_tokens=50_000)
        asked, constants = request("new", 1000), CostConstants()
        for turn in ("earlier", "next"):
            ledger.prefill_dispatched(replace_struct(request(turn, 19_999), session="s"), "i0", 0.0)
            ledger.decode_dispatched(turn, "i0", 19_999, 0.0)
            ledger.tokens(turn, 1, 1.0)
            assert not displaced_seconds(asked, ledger.snapshot(1.0), 50_000.0, constants).any()
            ledger.finished(turn, 1.0)
        idle = ledger.snapshot(1.0)
        held = float(idle.idle_tokens_of_others(asked)[0])
        assert held == pytest.approx(20_000, abs=1) and idle.session_goes_on == 0.5
        own = replace_struct(asked, session="s")
        assert not displaced_seconds(own, idle, 60_000.0, constants).any(), "a session displaces no other"

        def priced(tokens: float) -> list[float]:
            return list(map(float, displaced_seconds(asked, idle, tokens, constants)))

        assert priced(50_000.0 - held) == [0.0, 0.0]
        part, whole = priced(50_000.0 - held / 2)[0], priced(60_000.0)[0]
        assert whole == pytest.approx(2 * part) and part > 0
        fresh_s = REFERENCE.prefill_s(1000, 0)
        assert whole == pytest.approx(0.5 * constants.away * held * fresh_s / 1000)

    def test_a_decode_leaves_an_instance_that_only_prefills(self) -> None:
        ledger = cluster(3, roles=(P, M, M))
        decode(ledger, "i1", 200_000)
        queue(ledger, "i2", 6000)
        snapshot = ledger.snapshot(0.0)
        assert place(OneCost().place_prefill(request("new", 3000), snapshot)) == Place(
            "i0", None, Path.DISAGGREGATED
        )
        assert place(OneCost().place_decode(request("new", 3000), snapshot, "i0")).decode_on == "i2"

    def test_a_decode_stays_where_its_prompt_ran_if_that_decodes(self) -> None:
        ledger = cluster(2, roles=(M, M), kv_capacity_tokens=210_000)
        decode(ledger, "i0", 200_000)
        stays = place(OneCost().place_decode(request("new", 3000), ledger.snapshot(0.0), "i0"))
        assert (stays.decode_on, stays.path) == ("i0", Path.COLOCATED)
        gone = place(OneCost().place_decode(request("new", 3000), ledger.snapshot(0.0), "i7"))
        assert gone.decode_on == "i1"

    def test_a_decode_is_not_sent_where_its_kv_finds_no_room(self) -> None:
        ledger = cluster(2, roles=(M, M), kv_capacity_tokens=10_000)
        decode(ledger, "i0", 9_000)
        queue(ledger, "i1", 2000)
        assert place(OneCost().place_prefill(request("new", 4000), ledger.snapshot(0.0))).prefill_on == "i1"

    def test_no_more_kv_is_reserved_than_decodes_can_grow_into(self) -> None:
        """One decode that answers briefly leaves room for a prompt; many with long answers do not."""

        def at_risk(decodes: int, generated: int) -> bool:
            ledger = cluster(1, roles=(M,), kv_capacity_tokens=40_000)
            for number in range(decodes):
                name = f"d{number}"
                ledger.prefill_dispatched(request(name, 20_000 // decodes), "i0", 0.0)
                ledger.decode_dispatched(name, "i0", 20_000 // decodes, 0.0)
                ledger.tokens(name, generated, 1.0)
            priced = []
            for reserve in (0.1, 0.0):
                placing = OneCost(CostConstants(kv_reserve=reserve))
                verdict = placing.place_prefill(request("new", 17_000), ledger.snapshot(1.0))
                assert verdict.alternatives is not None
                priced.append(float(verdict.alternatives.terms()["decode_s"][0]))
            return priced[0] > priced[1]

        assert not at_risk(decodes=1, generated=100)
        assert at_risk(decodes=20, generated=100)

    def test_an_empty_fleet_is_an_error(self) -> None:
        with pytest.raises(NoInstance):
            OneCost().place_prefill(request(), Ledger().snapshot(0.0))

    @given(
        st.lists(
            st.tuples(st.sampled_from([P, D, M]), st.integers(0, 20_000), st.integers(0, 300_000)),
            min_size=1,
            max_size=6,
        ),
        st.integers(1, 20_000),
    )
    def test_the_named_terms_add_up_and_the_least_sum_is_taken(
        self, loads: list[tuple[Role, int, int]], tokens: int
    ) -> None:
        ledger = cluster(len(loads), roles=[role for role, _, _ in loads])
        for at, (_, waiting, resident) in enumerate(loads):
            if waiting:
                queue(ledger, f"i{at}", waiting)
            if resident:
                decode(ledger, f"i{at}", resident)
        verdict = OneCost().place_prefill(request("new", tokens), ledger.snapshot(0.0))
        assert verdict.alternatives is not None
        terms = dict(verdict.alternatives.terms())
        cost_s = terms.pop("cost_s")
        compared = np.array(verdict.alternatives.candidates)
        assert np.allclose(cost_s, sum(terms.values()))
        assert cost_s[int(place(verdict).prefill_on[1:])] == cost_s[compared].min()


def both_rps(shape: FleetShape) -> float:
    """Return what eight instances serve that do both."""
    demand = shape.lengths.demand(0.0)
    assert demand is not None
    model = FluidFleet(ProfileTable.of([FAST]), 400_000.0, 131_072.0, demand, SLO)
    return float(model.rates_rps(np.zeros(1), np.full(1, 8.0))[0])


class TestFleetShape:
    def shape(self, answers: int = 100, prompt: int = 15_000, generated: int = 150) -> FleetShape:
        lengths = RecentLengths()
        for _ in range(answers):
            lengths.answered(AnswerLengths(prompt, 0, generated), 1.0)
        return FleetShape(lengths, SLO)

    def tick(
        self, shape: FleetShape, ledger: Ledger, state: ShapeState = START
    ) -> ControlDecision[ShapeState]:
        return shape.decide(ledger.snapshot(10.0), state)

    def test_nothing_changes_while_little_is_known(self) -> None:
        ledger = cluster(8, roles=(M,) * 8)
        assert not self.tick(self.shape(answers=10), ledger, ShapeState(5)).actions

    def test_labels_change_at_once_as_agreeing_plans_have_it(self) -> None:
        ledger, shape = cluster(8, roles=(M,) * 8, profile=FAST), self.shape()
        decode(ledger, "i0", 20_000)
        first = self.tick(shape, ledger)
        assert not first.actions and first.state.plans == 1
        assert self.tick(shape, ledger, first.state).state == first.state, "a plan does not confirm itself"
        shape.lengths.answered(AnswerLengths(15_000, 0, 150), 11.0)
        second = self.tick(shape, ledger, first.state)
        flips = [flip for flip in second.actions if isinstance(flip, Flip)]
        assert len(flips) == first.state.wanted > 1
        assert all(flip.to is P and flip.instance != "i0" for flip in flips)
        assert second.state.plans == 0, "further plans have to agree anew"

    def test_of_agreeing_plans_that_which_changes_least_is_carried_out(self) -> None:
        ledger, shape = cluster(8, roles=(M,) * 8, profile=FAST), self.shape()
        (flip,) = self.tick(shape, ledger, ShapeState(1, wanted=1)).actions
        assert isinstance(flip, Flip) and flip.to is P
        all_prefill = cluster(8, roles=(P,) * 7 + (M,), profile=FAST)
        fewer = self.shape(prompt=290, generated=370)
        (flip,) = self.tick(fewer, all_prefill, ShapeState(-1, wanted=6)).actions
        assert isinstance(flip, Flip) and flip.to is M
        anew = self.tick(shape, ledger, ShapeState(-1, wanted=0))
        assert not anew.actions and (anew.state.plans, anew.state.wanted > 1) == (1, True)

    def test_traffic_that_is_known_beforehand_labels_the_fleet_at_once_and_then_as_ever(self) -> None:
        ledger = cluster(8, roles=(M,) * 8, profile=FAST)
        cold = self.shape()
        warm = replace(cold, lengths=RecentLengths([AnswerLengths(15_000, 0, 150)] * 100))
        first = self.tick(warm, ledger, warm.initial())
        assert len(first.actions) > 1 and not first.state.warm
        warm.lengths.answered(AnswerLengths(15_000, 0, 150), 11.0)
        assert not self.tick(warm, ledger, first.state).actions, "later plans have to agree"
        few = replace(cold, lengths=RecentLengths([AnswerLengths(15_000, 0, 150)] * 10))
        assert not few.initial().warm

    def test_a_fleet_that_gains_nothing_goes_back_to_both(self) -> None:
        ledger = cluster(8, roles=(P, P, M, M, M, M, M, M))
        shape = self.shape(prompt=290, generated=370)
        flips = self.tick(shape, ledger, ShapeState(-1)).actions
        assert {(flip.instance, flip.to) for flip in flips if isinstance(flip, Flip)} == {
            ("i0", M),
            ("i1", M),
        }

    @pytest.mark.parametrize(
        ("share", "prefill", "splits"),
        [(0.45, 0, False), (0.55, 0, True), (0.3, 6, True), (0.2, 6, False)],
    )
    def test_an_easy_load_needs_no_split(self, share: float, prefill: int, splits: bool) -> None:
        shape = self.shape()
        ledger = cluster(8, roles=(P,) * prefill + (M,) * (8 - prefill), profile=FAST)
        offered = Offered(10.0, 0, share * both_rps(shape), 1.0)
        wanted = ShapeState(-1, wanted=0) if prefill else ShapeState(1, wanted=6)
        decision = self.tick(shape, ledger, wanted._replace(offered=offered))
        roles = {f"i{at}": P if at < prefill else M for at in range(8)}
        roles |= {flip.instance: flip.to for flip in decision.actions if isinstance(flip, Flip)}
        assert (P in roles.values()) == splits, decision.reason

    def test_what_waits_is_load(self) -> None:
        shape = self.shape()
        ledger = cluster(8, roles=(M,) * 8, profile=FAST)
        idle = Offered(10.0, 0, 0.1 * both_rps(shape), 1.0)
        assert not self.tick(shape, ledger, ShapeState(offered=idle)).state.plans
        for number in range(int(OFFERED_S * both_rps(shape))):
            queue(ledger, "i0", 15_000 + number)
        idle = idle._replace(requests=ledger.snapshot(10.0).placed_prefills)
        assert self.tick(shape, ledger, ShapeState(offered=idle)).state.plans == 1

    def test_crowded_decodes_take_back_a_prefill_instance_for_a_while(self) -> None:
        roomy, ledger = (cluster(4, roles=(P, P, M, M), kv_capacity_tokens=100_000) for _ in range(2))
        for on in ("i2", "i3"):
            decode(roomy, on, 99_000)
            decode(ledger, on, 99_999)
        assert not self.tick(self.shape(), roomy).actions, "two answers can grow into a hundredth of the KV"
        crowded = self.tick(self.shape(), ledger)
        assert [flip.to for flip in crowded.actions if isinstance(flip, Flip)] == [M]
        assert crowded.state.rest.most == 1 and crowded.state.rest.until_s > 10.0
        relieved = cluster(4, roles=(P, M, M, M), profile=FAST)
        assert not self.tick(self.shape(), relieved, crowded.state._replace(plans=5)).actions

    def test_what_was_given_up_is_tried_again_where_less_is_to_decode_or_after_a_day(self) -> None:
        constants = ShapeConstants()
        rest = Rest().after(1, 0.0, 0.5, constants)  # Of five instances three decoded, busy for half of it.
        rested_s, day_s = rest.until_s, rest.until_s + 86_400.0
        times_s = (0.0, rested_s, rested_s + constants.rest_s, day_s - 1.0, day_s)
        bounds = [[rest.bound(5, at_s, busy, constants) for at_s in times_s] for busy in (1.5, 0.9)]
        assert bounds == [[1, 1, 1, 1, 5], [1, 2, 2, 2, 5]], "one by one"
        assert rest.after(1, day_s - 1.0, 0.6, constants).share == 0.5
        assert rest.after(1, day_s, 0.6, constants).share == 0.6
        assert rest.after(1, rested_s, inf, constants).share == 0.5
        assert Rest().after(1, 0.0, inf, constants).bound(5, rested_s, inf, constants) == 2

    def test_a_fleet_that_can_grow_does_both_everywhere(self) -> None:
        ledger = cluster(8, roles=(P, M, M, M, M, M, M, M), profile=FAST)
        grows, full = (replace(self.shape(), most=most) for most in (9, 8))
        (flip,) = self.tick(grows, ledger, ShapeState(5, wanted=8)).actions
        assert isinstance(flip, Flip) and (flip.instance, flip.to) == ("i0", M)
        assert any(
            isinstance(flip, Flip) and flip.to is P
            for flip in self.tick(full, ledger, ShapeState(5, wanted=8)).actions
        )

    def test_answers_that_still_run_count_while_all_that_ended_are_remembered(self) -> None:
        lengths = self.shape(answers=10, generated=101).lengths
        known, more = lengths.demand(0.0), lengths.demand(1010.0)
        assert known is not None and more is not None
        assert known.steps == 100.0 and more.steps == pytest.approx(201.0)

    def test_slow_instances_prefill_first_and_count_less(self) -> None:
        ledger, shape = cluster(8, roles=(M,) * 8, profile=FAST), self.shape()
        decode(ledger, "i5", 20_000)
        equal = self.tick(shape, ledger).reason
        ledger.profile_scaled("i5", 2.0, 2.0)
        slow = self.tick(shape, ledger)
        shape.lengths.answered(AnswerLengths(15_000, 0, 150), 11.0)
        (flip,) = self.tick(shape, ledger, slow.state._replace(wanted=1)).actions
        assert isinstance(flip, Flip) and (flip.instance, flip.to) == ("i5", P)
        assert slow.reason != equal

    def test_who_cannot_be_flipped_counts_as_it_is_labelled(self) -> None:
        ledger = Ledger()
        for at, (role, flippable) in enumerate([(M, False), (P, False), (M, True), (M, True), (M, True)]):
            fixed = replace(instance(f"i{at}"), flippable=flippable)
            ledger.instance_up(fixed, FAST, role, 0.0)
        flips = flips_to(ledger.snapshot(1.0), 2, "")
        assert [(flip.instance, flip.to) for flip in flips] == [("i2", P)]

    def test_a_slow_instance_takes_the_place_of_one_that_prefills(self) -> None:
        ledger, shape = cluster(8, roles=(P,) * 4 + (M,) * 4, profile=FAST), self.shape()
        assert not self.tick(shape, ledger).actions
        ledger.profile_scaled("i6", 1.5, 1.5)
        flips = [flip for flip in self.tick(shape, ledger).actions if isinstance(flip, Flip)]
        assert {flip.instance: flip.to for flip in flips}["i6"] is P
        assert sum(1 if flip.to is P else -1 for flip in flips) == 0

    def test_who_is_slow_at_prompts_and_less_so_at_steps_goes_on_to_decode(self) -> None:
        ledger = cluster(4, roles=(M, M, M, M), profile=FAST)
        for name in ("i0", "i1"):
            ledger.profile_scaled(name, 3.0, 1.5)
        first = prefill_order(ledger.snapshot(0.0)).tolist()[:2]
        assert sorted(first) == [2, 3]


def test_the_system_serves_with_all_instances_doing_both() -> None:
    system = make_system("tidegate")
    assert set(system.roles(4)) == {M}
    assert system.order.name == "feasible-sjf" and system.chunks is not None
    assert [each.name for each in system.controllers] == ["speed", "shape"]


def test_with_a_range_one_says_how_many_and_the_other_how_they_are_labelled() -> None:
    system = make_system("tidegate", fleet=(1, 8))
    assert [each.name for each in system.controllers] == ["speed", "size", "shape"]
    assert Signal.FORECAST in system.needs and Signal.FORECAST not in make_system("tidegate").needs
    with pytest.raises(ConfigError, match=r"5\.\.4 instances"):
        make_system("tidegate", fleet=(5, 4))
    assert make_system("tidegate", split=(1, 2)).roles(3) == (P, D, D)
