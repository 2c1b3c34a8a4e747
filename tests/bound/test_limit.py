"""The fluid bound where the optimum is known by hand, and what it says where there is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from tidegate.bound.demand import Batching, demand_of, kinds_of
from tidegate.bound.intervals import Interval, Spans
from tidegate.bound.limit import FluidLimit, fluid_limit
from tidegate.bound.search import Market
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Instance
from tidegate.core.slo import Slo
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost
from tidegate.costs.library import packaged_profile
from tidegate.costs.profile import Profile
from tidegate.workloads.trace import TraceRecord

H100 = packaged_profile("h100_sxm/llama-3.1-8b").profile
L40S = packaged_profile("l40s/llama-3.1-8b").profile
LINEAR = replace(
    H100,
    prefill=PrefillCost(0.0, 2e-5, 8e-10),
    step=StepCost(0.0, 5e-5, 4e-8),
    mixed=MixedCost(0.0, 5e-5, 8e-10, 8e-8),
)
"""Steps that cost nothing of their own: how work is batched does not matter."""
DEAR_MIXED = replace(H100, mixed=replace(H100.mixed, n0=0.0))
"""A mixed step never beats a pure one, so that the best decode steps are known."""
ROOM = 400_000


def even(count: int, prompt: int, answer: int) -> list[TraceRecord]:
    return [TraceRecord(float(i), prompt, answer) for i in range(count)]


def limit(
    records: list[TraceRecord],
    profiles: list[Profile],
    slo: Slo,
    *,
    level: float = 0.9,
    kv_tokens: int = ROOM,
    max_batch_tokens: int = 8000,
    max_num_seqs: int = 1024,
) -> FluidLimit:
    fleet = [Instance(f"i{i}", kv_tokens, kv_tokens) for i in range(len(profiles))]
    return fluid_limit(
        records,
        profiles,
        fleet,
        slo,
        level=level,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
    )


def tight(found: FluidLimit, best_rps: float) -> None:
    """The fleet serves ``best_rps``; what is offered beyond may miss, down to the level."""
    assert found.limit_rps is not None
    assert 0.995 * best_rps <= found.limit_rps * found.level <= 1.1 * best_rps, found


def full_prefill_rps(profile: Profile) -> float:
    return 8 / float(profile.prefill.seconds(8000, 8 * 1000**2 / 2))


@pytest.mark.parametrize("level", [0.9, 0.99])
def test_prefill_alone_runs_full_chunks(level: float) -> None:
    found = limit(even(4000, 1000, 1), [H100, H100], Slo(0.5, 0.05), level=level)
    tight(found, 2 * full_prefill_rps(H100))
    assert found.binding.startswith("prefill compute")


def test_unequal_instances_add_up() -> None:
    found = limit(even(4000, 1000, 1), [H100, L40S, L40S], Slo(1.5, 0.05))
    tight(found, full_prefill_rps(H100) + 2 * full_prefill_rps(L40S))


def test_decodes_run_in_the_largest_batch() -> None:
    found = limit(even(12_000, 1, 101), [H100, H100], Slo(0.5, 0.015), max_num_seqs=64)
    tight(found, 2 * 64 / float(H100.step.seconds(64.0, 64 * 51.5)) / 100)
    assert found.binding == "decode compute, held back by max_num_seqs"


def test_memory_bounds_the_batch() -> None:
    found = limit(even(6000, 16, 401), [H100, H100], Slo(0.5, 0.012), kv_tokens=16_384)
    batch = 16_384 / (16 + 200.5)
    tight(found, 2 * batch / float(H100.step.seconds(batch, 16_384.0)) / 400)
    assert found.binding == "decode compute, held back by KV memory"


def test_a_tight_tpot_bounds_the_batch() -> None:
    found = limit(even(12_000, 1, 101), [DEAR_MIXED], Slo(0.5, 0.008))
    batch = (0.008 - H100.step.a_s) / (H100.step.b_s + H100.step.c_s * 51.5)
    tight(found, float(batch) / 0.008 / 100)
    assert found.binding == "decode compute, held back by the TPOT target"


def test_both_phases_share_the_time_of_equal_instances() -> None:
    found = limit(even(12_000, 1000, 201), [LINEAR] * 4, Slo(0.5, 0.02))
    prefill_s = float(LINEAR.prefill.seconds(1000, 1000**2 / 2))
    answer_s = 200 * (5e-5 + 4e-8 * (1000 + 100.5))
    tight(found, 4 / (prefill_s + answer_s))


def test_a_burst_binds_where_most_of_the_requests_are() -> None:
    quiet = [TraceRecord(float(i), 1000, 1) for i in range(0, 1000, 2)]
    burst = [TraceRecord(400.01 + i / 20, 1000, 1) for i in range(4000)]
    found = limit(sorted(quiet + burst, key=lambda r: r.arrival_s), [H100], Slo(0.5, 0.05), level=0.99)
    assert found.scale is not None and 20.0 * found.scale < 1.1 * full_prefill_rps(H100)
    assert "in bursts between" in found.binding


@pytest.mark.parametrize("level", [0.9, 0.5])
def test_bursts_of_a_moment_bind_whatever_the_mean_rate(level: float) -> None:
    bursts = [TraceRecord(1000.0 * i + 0.05 * j, 1000, 1) for i in range(30) for j in range(30)]
    found = limit(bursts, [LINEAR], Slo(0.1, 0.05), level=level)
    # The bursts shrink until the work of those that attain fits into one, and its TTFT.
    work_s = 30 * level * float(LINEAR.prefill.seconds(1000, 1000**2 / 2))
    assert found.scale == pytest.approx(29 * 0.05 / (work_s - 0.1), rel=0.02)
    assert "in bursts between" in found.binding


@pytest.mark.parametrize("seed", range(6))
def test_no_subset_beyond_the_level_can_be_served(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(500, 4000, 9)
    arrivals = np.cumsum(rng.exponential(1.0, 9) * (rng.random(9) < 0.5))
    records = [TraceRecord(float(t), int(n), 1) for t, n in zip(arrivals, prompts, strict=True)]
    slo, level = Slo(0.15, 0.05), float(rng.choice([5, 6, 7])) / 9
    found = limit(records, [LINEAR], slo, level=level)
    if found.scale is None:
        return
    served = [float(LINEAR.prefill.seconds(n, n**2 / 2)) for n in prompts.tolist()]
    for faster in (1.0, 1.3, 3.0):
        at_s = arrivals / (found.scale * faster)
        most = max(
            n for n in range(10) for some in combinations(range(9), n) if in_time(some, at_s, served, slo)
        )
        assert most / 9 < level


def test_what_comes_at_one_moment_misses_at_any_rate() -> None:
    heaps = [TraceRecord(1000.0 * i, 1000, 1) for i in range(10) for _ in range(100)]
    found = limit(heaps, [LINEAR], Slo(0.5, 0.05))
    assert found.scale == 0.0 and found.binding.startswith(
        "requests that come at one moment: prefill compute"
    )


def in_time(some: tuple[int, ...], at_s: np.ndarray, served: list[float], slo: Slo) -> bool:
    """One machine serves first come first served, which is best where all have the same TTFT target."""
    free_s = 0.0
    for each in some:
        free_s = max(free_s, float(at_s[each])) + served[each]
        if free_s > at_s[each] + slo.ttft_s:
            return False
    return True


def test_a_tighter_slo_allows_no_more() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.gamma(0.1, 10.0, 400)
    prompts, answers = rng.lognormal(6.0, 1.0, 400), rng.lognormal(4.0, 1.0, 400)
    records = [
        TraceRecord(float(t), int(n) + 1, int(m) + 1)
        for t, n, m in zip(np.cumsum(gaps), prompts, answers, strict=True)
    ]
    for slos in (
        [Slo(0.5, tpot_s) for tpot_s in (0.1, 0.025, 0.012)],
        [Slo(ttft_s, 0.03) for ttft_s in (2.0, 0.5, 0.25)],
    ):
        limits = [limit(records, [H100, H100], slo).scale or float("inf") for slo in slos]
        assert all(tight <= 1.005 * loose for loose, tight in pairwise(limits)), limits


def test_shared_prefixes_cost_their_prefill_once() -> None:
    alone = limit(even(2500, 1024, 1), [H100], Slo(0.5, 0.05))
    shared = [r._replace(hash_ids=(7, 10 + i)) for i, r in enumerate(even(2500, 1024, 1))]
    found = limit(shared, [H100], Slo(0.5, 0.05))
    assert found.limit_rps is not None and alone.limit_rps is not None
    assert 1.8 * alone.limit_rps < found.limit_rps < 2.2 * alone.limit_rps


def test_requests_that_miss_even_alone_leave_no_limit() -> None:
    records = even(100, 500, 10)
    records[::5] = [r._replace(input_tokens=60_000) for r in records[::5]]
    found = limit(records, [H100], Slo(0.5, 0.05))
    assert (found.limit_rps, found.hopeless) == (0.0, 20)
    assert "20.0% of the requests miss the SLO ttft:500,tpot:50 even alone" in found.binding
    assert limit(records, [H100], Slo(0.5, 0.05), level=0.8).limit_rps != 0.0


def test_a_trace_too_short_to_miss_has_no_limit() -> None:
    assert limit(even(5, 100, 10), [H100], Slo(0.5, 0.05)).limit_rps is None
    assert limit([TraceRecord(0.0, 100, 10)], [H100], Slo(0.5, 0.05)).limit_rps is None


def test_refuses_what_it_cannot_bound() -> None:
    for records, fleet, level in (([], [H100], 0.9), (even(5, 1, 1), [], 0.9), (even(5, 1, 1), [H100], 0.0)):
        with pytest.raises(ConfigError):
            limit(records, fleet, Slo(0.5, 0.05), level=level)


def test_a_prefill_that_sticks_out_of_an_interval_counts_as_far_as_one_instance_needs_it() -> None:
    """Long prompts arrive a moment before a heap of short ones; their deadlines are the same moment apart."""
    long_s = float(LINEAR.prefill.seconds(6000, 6000**2 / 2))
    slo = Slo(1.1 * long_s, 0.05)
    heaps = [
        TraceRecord(1000.0 * i + 1e-3 * j, 6000 if j == 0 else 800, 1) for i in range(20) for j in range(12)
    ]
    demand = demand_of(heaps)
    market = Market.of(demand, kinds_of([LINEAR], [Instance("i0", ROOM, ROOM)]), Batching(8000, 1024), slo)
    prices = market.prices(demand)
    assert prices is not None
    worth, spans = market.worth([prices]), Spans.of(demand, 1.0, slo)
    inside = spans.inside(Interval(1, 11, False, 0), worth)[0]
    # It may be computed for the millisecond before the others come, and not beyond.
    assert inside[0] == pytest.approx(worth.prefill[0, 0] - 1e-3, rel=1e-6)
    assert inside[1:12] == pytest.approx(worth.prefill[1:12, 0]) and not inside[12:].any()
    earlier = spans.inside(Interval(0, 5, False, 0), worth)[0]
    short_s = float(worth.prefill[6, 0])
    assert earlier[6:9] == pytest.approx([max(0.0, short_s - 1e-3 * n) for n in (1, 2, 3)], rel=1e-5)
