"""ARES' incremental round against a plain reading of it, and what no round may do."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.paper.ares_fleet import PROFILE, KnownAnswers
from tidegate.core.decision import Migrate
from tidegate.policies.ares.avoiding import AvoidingRescheduler
from tidegate.policies.ares.damage import Damage, Endings, Terms
from tidegate.policies.ares.loads import DecodeLoads, Horizon, LoadBoard
from tidegate.policies.ares.published import AresConstants, AresRescheduler

KV = 30_000
CONSTANTS = AresConstants(Horizon(1000, 5, 0.9))
NOW_S = 100.0

Pools = list[list[tuple[int, float]]]
pools = st.lists(
    st.lists(
        st.tuples(st.sampled_from([60, 700, 2500, 9000]), st.sampled_from([1.0, 300.0, 900.0, 20_000.0])),
        max_size=5,
    ),
    min_size=2,
    max_size=5,
)


def naive_round(given: Pools, made: list[tuple[int, int, int]]) -> list[tuple[float, float]]:
    """Return the gain of each move made (decode, from, to) and the best there was, by loops."""
    at, weights = CONSTANTS.horizon.at, CONSTANTS.horizon.weights
    count = len(given)
    decodes = {(i, n): each for i, pool in enumerate(given) for n, each in enumerate(pool)}
    where = {key: key[0] for key in decodes}
    step_s = [float(PROFILE.step.seconds(len(pool), sum(k for k, _ in pool))) for pool in given]
    original, links, gone = dict(where), set(), set()
    over_first: set[int] | None = None

    def load(places: dict[tuple[int, int], int], i: int) -> list[float]:
        return [sum(k + t for key, (k, left) in decodes.items() if places[key] == i and t < left) for t in at]

    def variance(places: dict[tuple[int, int], int]) -> float:
        curves = np.array([load(places, i) for i in range(count)])
        return float(sum(w * np.var(curves[:, g]) for g, w in enumerate(weights)))

    found = []
    for decode, source, target in made:
        curves = [load(where, i) for i in range(count)]
        weighted = [float(np.dot(curve, weights)) for curve in curves]
        mean = sum(weighted) / count
        full = [max(curve) > CONSTANTS.safety * KV for curve in curves]
        over = {i for i in range(count) if weighted[i] > (1 + CONSTANTS.theta) * mean or full[i]}
        under = {i for i in range(count) if weighted[i] < (1 - CONSTANTS.theta) * mean and not full[i]}
        if over_first is None:
            over_first, under_first = over, under
        before, gains = variance(where), {}
        for key, (k, left) in decodes.items():
            s = where[key]
            if key in gone or s != original[key] or s not in over & over_first:
                continue
            for d in under & under_first - {s}:
                if (s, d) in links or left * step_s[s] < CONSTANTS.kappa * k * 1000 / 1e9:
                    continue
                if max(c + (k + t) * (t < left) for c, t in zip(curves[d], at, strict=True) if t < left) > (
                    CONSTANTS.safety * KV
                ):
                    continue
                gains[key, d] = before - variance(where | {key: d})
        found.append((gains[(source, decode), target], max(gains.values())))
        where[source, decode] = target
        gone.add((source, decode))
        links.add((source, target))
    return found


def decided(given: Pools, controller: AresRescheduler | AvoidingRescheduler) -> list[tuple[int, int, int]]:
    """Return the moves as (number, from, to)."""
    ledger = KnownAnswers(*given, kv=KV).ledger
    actions = controller.decide(ledger.snapshot(NOW_S), None).actions
    return [
        (int(move.request.split("-")[1]), int(move.src[1:]), int(move.dst[1:]))
        for move in actions
        if isinstance(move, Migrate)
    ]


@given(pools)
def test_every_move_is_the_best_there_is(given: Pools) -> None:
    board = LoadBoard(partial(DecodeLoads, horizon=CONSTANTS.horizon), 1.0)
    made = decided(given, AresRescheduler(board, CONSTANTS))
    for gain, best in naive_round(given, made):
        assert gain == pytest.approx(best, rel=1e-9)
        assert gain > 0


@given(pools, st.sampled_from([1.0, 2.0]))
def test_moves_that_avoid_damage_avoid_it(given: Pools, spread: float) -> None:
    """Each round leaves less damage than it found, by what it says at least; nobody moves twice."""
    terms = Terms(Horizon(1000, 5, 0.9))
    fleet = KnownAnswers(*given, kv=KV, spread=spread)
    snapshot = fleet.ledger.snapshot(NOW_S)
    board = LoadBoard(partial(Damage, terms=terms), 1.0)
    actions = AvoidingRescheduler(board).decide(snapshot, None).actions
    moves = [action for action in actions if isinstance(action, Migrate)]
    assert len({move.request for move in moves}) == len(moves) <= 4
    before_s = Damage(snapshot, snapshot.requests, terms).seconds.sum()
    for move in moves:
        rows = snapshot.requests
        context = int(rows.context_tokens[rows.ids.index(move.request)])
        fleet.ledger.decode_dispatched(move.request, move.dst, context, NOW_S)
        fleet.ledger.transfer_ended(move.request, NOW_S)
    after = fleet.ledger.snapshot(NOW_S)
    after_s = Damage(after, after.requests, terms).seconds.sum()
    assert after_s <= before_s - len(moves) + 1e-6


@given(
    st.lists(st.tuples(*[st.floats(1.0, 5000.0)] * 3).map(sorted), min_size=1, max_size=8),
)
def test_chances_fall_from_one_and_keep_to_the_quantiles(quantiles: list[list[float]]) -> None:
    low, mean, high = np.array(quantiles).T
    at = np.linspace(0.0, 12_000.0, 200)
    found = Endings(low[:, None], mean[:, None], high[:, None]).chances(at)
    assert (found[:, 0] == 1.0).all() and (np.diff(found, axis=1) <= 1e-12).all()
    assert (found >= -1e-12).all() and np.allclose(found[:, -1], 0.0, atol=1e-9)
    assert (np.where(at < low[:, None], found, 1.0) >= 0.9 - 1e-9).all()
    assert (np.where(at > high[:, None], found, 0.0) <= 0.1 + 1e-9).all()
