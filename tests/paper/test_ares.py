"""ARES (arXiv 2510.13668), clause by clause as far as the paper is known: its round and first placement."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from tests.paper.ares_fleet import PROFILE, KnownAnswers, asking
from tidegate.core.decision import Migrate, Place
from tidegate.core.instance import Role
from tidegate.policies.ares.loads import DecodeLoads, Horizon, LoadBoard
from tidegate.policies.ares.published import AresConstants, AresPlacement, AresRescheduler, classify
from tidegate_testing import instance, request

CONSTANTS = AresConstants(Horizon(1000, 11, 1.0))
LONG = 50_000.0
"""Tokens to come of an answer that outlasts every horizon."""


def board(constants: AresConstants = CONSTANTS) -> LoadBoard[DecodeLoads]:
    return LoadBoard(partial(DecodeLoads, horizon=constants.horizon), 1.0)


def moves(fleet: KnownAnswers, constants: AresConstants = CONSTANTS, now: float = 100.0) -> list[Migrate]:
    controller = AresRescheduler(board(constants), constants)
    actions = controller.decide(fleet.ledger.snapshot(now), None).actions
    return [action for action in actions if isinstance(action, Migrate)]


def moved(fleet: KnownAnswers, constants: AresConstants = CONSTANTS) -> list[tuple[str, str, str]]:
    return [(move.request, move.src, move.dst) for move in moves(fleet, constants)]


def placed(fleet: KnownAnswers, context: int, left: float, most: float | None = None) -> str:
    placement = AresPlacement(board(), CONSTANTS)
    decision = placement.place_decode(asking(context, left, most), fleet.ledger.snapshot(0.0), "p0").decision
    assert isinstance(decision, Place) and decision.decode_on is not None
    return decision.decode_on


def loads(fleet: KnownAnswers) -> DecodeLoads:
    snapshot = fleet.ledger.snapshot(0.0)
    return DecodeLoads(snapshot, snapshot.requests, CONSTANTS.horizon)


class TestLoads:
    """Section 2.5 of our notes: load_i(t) = sum of (k + t) over who is left at t."""

    def test_a_decode_grows_by_a_token_a_step_and_leaves_when_it_is_done(self) -> None:
        found = loads(KnownAnswers([(500, 250.0), (1000, LONG)], []))
        assert found.loads[0, :4].tolist() == [1500.0, 1700.0, 1900.0, 1300.0]
        assert not found.loads[1].any()

    def test_who_is_on_the_way_counts_where_it_goes(self) -> None:
        fleet = KnownAnswers([(500, LONG)], [])
        fleet.ledger.moves("d0-0", "d1", 1.0)
        assert loads(fleet).loads[:, 0].tolist() == [0.0, 500.0]


class TestClassify:
    def test_by_current_load(self) -> None:
        over, under = classify(loads(KnownAnswers([(3000, LONG)], [(1000, LONG)], [(2000, LONG)])), CONSTANTS)
        assert over.tolist() == [True, False, False]
        assert under.tolist() == [False, True, False]

    def test_by_predicted_load(self) -> None:
        """The same tokens now, but those of one instance will be gone soon."""
        over, under = classify(loads(KnownAnswers([(2000, LONG)], [(2000, 100.0)])), CONSTANTS)
        assert (over.tolist(), under.tolist()) == ([True, False], [False, True])

    def test_predicted_kv_overflow_is_overload(self) -> None:
        """Evenly loaded, yet 95 % of the KV is passed within the horizon on both."""
        over, under = classify(loads(KnownAnswers([(9000, LONG)], [(9000, LONG)], kv=10_000)), CONSTANTS)
        assert over.all() and not under.any()


class TestRound:
    def test_moves_from_over_to_underloaded(self) -> None:
        fleet = KnownAnswers([(2000, LONG), (2000, LONG)], [(2000, LONG)], [])
        assert moved(fleet) == [("d0-0", "d0", "d2")]

    def test_a_balanced_fleet_stays(self) -> None:
        assert moved(KnownAnswers([(2000, LONG)], [(2100, LONG)])) == []

    def test_no_move_of_who_is_nearly_done(self) -> None:
        """A move has to be worth ``kappa`` times its transfer: here 2 ms, and a step takes 60 ms."""
        almost = KnownAnswers([(2500, 1.0), (2500, 1.0)], [], kv=10**6)
        assert moved(almost, replace(CONSTANTS, kappa=100.0)) == []
        assert moved(almost, replace(CONSTANTS, kappa=20.0)) != []

    def test_the_longer_of_two_equal_decodes_moves(self) -> None:
        """Prediction tells them apart: the short one will be gone anyway."""
        fleet = KnownAnswers([(2000, 150.0), (2000, LONG), (2000, LONG)], [])
        assert moved(fleet)[0][0] in ("d0-1", "d0-2")

    def test_no_destination_runs_out_of_kv(self) -> None:
        """9,600 tokens would fit now, but not with what both will have generated."""
        pools = [(4000, LONG), (4000, LONG), (4000, LONG)], [(4800, LONG)]
        tight = replace(CONSTANTS, safety=0.99, theta=0.01)
        assert moved(KnownAnswers(*pools, kv=10_000), tight) == []
        assert moved(KnownAnswers(*pools, kv=20_000), tight) != []

    def test_the_destination_is_tested_with_the_high_quantile(self) -> None:
        """It fits if it ends when it is expected to, not if it takes ten times as long."""
        pools = [(4000, 400.0)] * 4, [(4800, LONG)]
        tight = replace(CONSTANTS, safety=0.99, theta=0.01)
        assert moved(KnownAnswers(*pools, kv=10_000), tight) != []
        assert moved(KnownAnswers(*pools, kv=10_000, spread=10.0), tight) == []

    def test_at_most_k_moves_and_one_per_link(self) -> None:
        many = [(500, LONG)] * 20
        assert len(moves(KnownAnswers(many, [], [], [], [], [], []))) == CONSTANTS.most_moves
        links = [(move.src, move.dst) for move in moves(KnownAnswers(many, many, [], []))]
        assert len(links) == len(set(links)) == 4

    def test_a_link_with_a_migration_under_way_is_left_alone(self) -> None:
        fleet = KnownAnswers([(500, LONG)] * 20, [])
        fleet.ledger.moves("d0-3", "d1", 0.0)
        assert moves(fleet) == []

    def test_who_moved_lately_rests(self) -> None:
        fleet = KnownAnswers([(2000, LONG), (2000, LONG)], [])
        for name in ("d0-0", "d0-1"):
            fleet.ledger.moves(name, "", 95.0)
        assert moves(fleet, now=100.0) == []
        assert len(moves(fleet, now=95.0 + CONSTANTS.cooldown_s)) == 1

    def test_who_waits_for_its_kv_is_not_moved(self) -> None:
        fleet = KnownAnswers([], [])
        fleet.ledger.instance_up(instance("p0"), PROFILE, Role.PREFILL, 0.0)
        for name in ("a", "b"):
            fleet.left[name] = LONG
            fleet.ledger.prefill_dispatched(request(name, 2000), "p0", 0.0)
            fleet.ledger.prefill_ended(name, 0.0)
            fleet.ledger.decode_dispatched(name, "d0", 2000, 0.0)
        assert moves(fleet) == []

    def test_nobody_else_is_there(self) -> None:
        assert moved(KnownAnswers([(2000, LONG)])) == []
        assert moved(KnownAnswers()) == []


class TestVarianceFalls:
    @pytest.mark.parametrize("seed", range(10))
    def test_at_every_committed_move(self, seed: int) -> None:
        """With perfect lengths; every move is made, and the loads worked out anew."""
        rng = np.random.default_rng(seed)
        fleet = KnownAnswers(
            *[
                [
                    (int(rng.integers(100, 8000)), float(rng.integers(50, 5000)))
                    for _ in range(rng.integers(9))
                ]
                for _ in range(6)
            ],
            kv=60_000,
        )
        variance = [loads(fleet).variance()]
        for move in moves(fleet):
            row = fleet.ledger.snapshot(0.0).requests
            context = int(row.context_tokens[row.ids.index(move.request)])
            fleet.ledger.decode_dispatched(move.request, move.dst, context, 100.0)
            fleet.ledger.transfer_ended(move.request, 100.0)
            variance.append(loads(fleet).variance())
            assert (loads(fleet).peaks() <= CONSTANTS.safety * 60_000).all()
        assert all(after < before for before, after in pairwise(variance))


class TestPlacement:
    def test_least_variance(self) -> None:
        assert placed(KnownAnswers([(3000, LONG)], [(1000, LONG)], [(2000, LONG)]), 500, LONG) == "d1"

    def test_by_what_will_be_there(self) -> None:
        """d0 holds more now, and will be empty soon."""
        assert placed(KnownAnswers([(3000, 50.0)], [(2500, LONG)]), 500, LONG) == "d0"
        assert placed(KnownAnswers([(3000, 50.0)], [(2500, LONG)]), 500, 20.0) == "d1"

    def test_only_where_it_will_have_room(self) -> None:
        """d1 is emptier on average, but cannot hold both to the end."""
        fleet = KnownAnswers([(5000, LONG)], [(8500, 450.0)], kv=10_000)
        assert placed(fleet, 1000, LONG) == "d0"

    def test_nobody_has_room(self) -> None:
        assert placed(KnownAnswers([(9000, LONG)], [(8500, LONG)], kv=10_000), 5000, LONG) == "d1"

    def test_who_was_placed_since_the_last_round_counts(self) -> None:
        placement = AresPlacement(board(), CONSTANTS)
        snapshot = KnownAnswers([(1000, LONG)], [(1200, LONG)]).ledger.snapshot(0.0)
        chosen = [placement.place_decode(asking(500, LONG), snapshot, "p0").decision for _ in range(3)]
        assert [each.decode_on for each in chosen if isinstance(each, Place)] == ["d0", "d1", "d0"]
