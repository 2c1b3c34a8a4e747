"""What a pool makes of plans that differ from one to the next, and what it learns from a shrink too soon."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.policies.dopd.controller import DopdConstants
from tidegate.policies.dopd.hysteresis import BACKOFF, MOST_REGRETS, Pool

AGREEING = DopdConstants().agreeing


def played(plans: list[int], has: int, pool: Pool | None = None) -> tuple[list[int], Pool]:
    """Return a pool's sizes under ``plans``, and what it knows then."""
    pool, sizes = pool or Pool(), []
    for wanted in plans:
        pool = pool.planned(wanted, AGREEING)
        becomes = pool.held(has, AGREEING)
        pool, has = pool.became(has, becomes, AGREEING), becomes
        sizes.append(has)
    return sizes, pool


def changes(sizes: list[int]) -> int:
    return int(np.count_nonzero(np.diff(sizes)))


@pytest.mark.parametrize("often", [0.01, 0.05, 0.1, 0.2, 0.4, 0.6])
def test_plans_that_flutter_move_a_pool_at_most_once_an_hour(often: float) -> None:
    """Six hours of half minutes, each plan independent of the last, on average over ten draws."""
    counted = []
    for seed in range(10):
        more = np.random.default_rng(seed).random(720) < often
        counted.append(changes(played([2 + int(one) for one in more], 2)[0]))
    assert np.mean(counted) <= 6.0


def test_a_shrink_that_was_taken_back_is_waited_for_longer_but_only_by_one_instance() -> None:
    sizes, pool = played([1] * AGREEING + [2, 2], 2)
    assert sizes[AGREEING - 2 :] == [2, 1, 1, 2] and pool.regrets == 1
    sizes, _ = played([1] * 100, 2, pool)
    assert sizes.index(1) == AGREEING * BACKOFF - 2, "the plan that grew it counts, too"
    sizes, _ = played([4, 4] + [1] * 30, 2, pool)
    assert sizes[1] == 4 and sizes[AGREEING - 1] == 4 and sizes[AGREEING] == sizes[-1] == 2


def test_regrets_end_where_the_load_goes_on_falling() -> None:
    _, pool = played(([1] * 400 + [2, 2]) * 8, 2)
    assert pool.regrets <= MOST_REGRETS
    fallen, pool = played([3] * 30 + [1] * 900, 4, pool)
    assert fallen[-1] == 1 and pool.regrets < MOST_REGRETS
