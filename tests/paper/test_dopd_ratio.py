"""DOPD (arXiv 2511.20982): the balance of its optimal ratio, our margins, and the planners beside it."""

from __future__ import annotations

from dataclasses import replace
from math import exp, factorial

import numpy as np
import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost
from tidegate.costs.library import packaged_profile
from tidegate.costs.profile import Profile
from tidegate.experiments.run import run_once
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.policies.dopd.plan import best_split, smallest_fleet
from tidegate.policies.dopd.planners import (
    IntervalLoad,
    PoolsSeen,
    dopd_code,
    dynamo_load,
    dynamo_sla,
    within_budget,
)
from tidegate.policies.dopd.queueing import Occupancy, Waits, erlang_c
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.service import ServingModel, Traffic
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

SLO = Slo(1.0, 0.025)
ROUND = Profile(
    "round",
    PrefillCost(0.0, 1e-4, 0.0),
    StepCost(0.010, 0.0, 1e-7),
    MixedCost(0.010, 1e-4, 0.0, 1e-7),
    TransferCost(0.0, 1e12),
)
"""0.1 s per 1,000 prompt tokens; a step of 10 ms plus 0.1 ms per 1,000 resident tokens."""


def sizing(
    rate_rps: float, inputs: list[float], outputs: list[float], model: ServingModel | None = None
) -> Sizing:
    traffic = Traffic.of(rate_rps, np.array(inputs), np.array(outputs))
    return Sizing(traffic, model or ServingModel(ROUND, 101_000, 1, block_tokens=1), SLO)


def h100(rate_rps: float, seed: int = 0) -> Sizing:
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    model = ServingModel(packaged.profile, packaged.kv_capacity_tokens, packaged.kv_bytes_per_token)
    rng = np.random.default_rng(seed)
    inputs = np.ceil(rng.lognormal(6.5, 1.2, 200)).clip(1, 30_000)
    outputs = np.ceil(rng.lognormal(5.0, 0.8, 200))
    return Sizing(Traffic.of(rate_rps, inputs, outputs), model, SLO)


class TestBalance:
    def test_concurrency_ratio_and_littles_law_by_hand(self) -> None:
        # KV 101,000 less the reserve of 1 % is 99,990: 90 decodes of 1,000 + 200 / 2 tokens. Their step is
        # 10 ms + 99,000 * 0.1 us = 19.9 ms, within the target; an answer stays for 199 of them.
        found = sizing(100.0, [1000], [200])
        assert (found.decode.kv_batch, found.decode.batch) == (90, 90)
        assert found.work_s == pytest.approx(0.1)
        assert found.decode_work_s == pytest.approx(199 * 0.0199 / 90)
        assert found.ratio == pytest.approx(90 * 0.1 / (199 * 0.0199))
        plan = smallest_fleet(found, mixed=False)
        assert plan.prefill_needed == pytest.approx(10.0)
        assert plan.decode_needed == pytest.approx(100 * 199 * 0.0199 / 90)
        assert plan.prefill_needed == pytest.approx(found.ratio * plan.decode_needed)

    def test_the_tpot_bounds_concurrency_where_it_is_tighter_than_the_kv(self) -> None:
        # 15 ms: 5 ms are 50,000 tokens, 45 decodes of 1,100. Of ten tokens the half step before the first is
        # 5 %: 14.2 ms, 4.2 ms of which are 42,000 tokens, 41 decodes of 1,005.
        for answer, batch in ((200, 45), (10, 41)):
            tight = replace(sizing(1.0, [1000], [answer]), slo=Slo(1.0, 0.015))
            assert tight.decode.batch == batch < tight.decode.kv_batch

    def test_corrections_scale_each_phase(self) -> None:
        model = ServingModel(ROUND, 101_000, 1, block_tokens=1, prefill_correction=1.5, step_correction=1.2)
        plain, corrected = sizing(1.0, [1000], [200]), sizing(1.0, [1000], [200], model)
        assert corrected.work_s == pytest.approx(1.5 * plain.work_s)
        assert corrected.decode_work_s == pytest.approx(1.2 * plain.decode_work_s)

    def test_lengths_that_differ_cost_more_prefill_than_their_mean(self) -> None:
        convex = ServingModel(
            replace(ROUND, prefill=PrefillCost(0.0, 1e-5, 1e-8)), 900_000, 1, max_batch_tokens=20_000
        )
        found = sizing(1.0, [1000, 9000], [10, 10], convex)
        # (0.01 + 0.005 + 0.09 + 0.405) / 2 against 0.05 + 0.125 at the mean of 5,000.
        assert found.work_s == pytest.approx(0.255)
        assert found.convexity == pytest.approx(0.255 / 0.175)

    def test_prompts_that_wait_together_share_the_fixed_cost_of_a_step(self) -> None:
        fixed = ServingModel(replace(ROUND, prefill=PrefillCost(0.1, 1e-5, 0.0)), 101_000, 1)
        found = sizing(1.0, [1024], [2], fixed)
        # Eight fill a step of 8,192 tokens, which takes 0.18 s: less than half of the TTFT target.
        assert found.work_s == pytest.approx(0.1 / 8 + 0.01024)


class TestQueues:
    def test_erlang_c_and_allen_cunneen_are_exact_where_they_should_be(self) -> None:
        assert erlang_c(0.7, 1) == pytest.approx(0.7)
        assert erlang_c(1.0, 2) == pytest.approx(1 / 3)
        # Pollaczek-Khinchine for M/D/1 at 0.8: 0.8 / (2 * 0.2) services.
        waits = Waits.of(8.0, 1, 0.1, 0.5)
        assert waits.waiting * waits.mean_s == pytest.approx(0.1 * 0.8 / 0.4)
        assert Waits.of(10.0, 1, 0.1, 0.5).within(np.array([9.0])) == 0.0
        assert waits.within(np.array([-1e-9]))[0] == 0.0

    def test_waiting_grows_before_saturation(self) -> None:
        found = sizing(0.0, [5000], [10])
        shares = [found.ttft_share(rate, 4) for rate in (4.0, 6.0, 7.5, 7.9)]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0.99 and shares[-1] < 0.3

    def test_decodes_that_do_not_slow_each_other_down_are_poisson(self) -> None:
        there = Occupancy.of(4.0, 10.0, lambda n: np.full_like(n, 0.05), 40.0)
        for count in (0, 1, 4):
            expected = sum(exp(-2.0) * 2.0**k / factorial(k) for k in range(count + 1))
            assert there.share[count] == pytest.approx(expected)

    def test_decodes_that_share_one_speed_are_geometric(self) -> None:
        there = Occupancy.of(4.0, 10.0, lambda n: 0.02 * n, 30.0)  # 0.8 of the capacity
        assert there.share[3] == pytest.approx(1 - 0.8**4)
        assert not Occupancy.of(6.0, 10.0, lambda n: 0.02 * n, 30.0).share.any()


class TestPlan:
    @pytest.mark.parametrize("rate_rps", [3.0, 40.0, 130.0, 400.0])
    def test_no_smaller_fleet_attains(self, rate_rps: float) -> None:
        found = h100(rate_rps)
        plan = smallest_fleet(found, mixed=False)
        assert plan.attained.both >= 0.9
        smaller = [(p, plan.total - 1 - p) for p in range(1, plan.total - 1)]
        assert all(found.split_attains(rate_rps, *pools).both < 0.9 for pools in smaller)
        mixed = smallest_fleet(found)
        if mixed.mixed:
            assert mixed.total < plan.total and mixed.attained.both >= 0.9
            assert found.mixed_attains(rate_rps, mixed.mixed - 1).both < 0.9 if mixed.mixed > 1 else True

    @pytest.mark.parametrize("instances", [2, 3, 8, 21])
    def test_the_best_split_is_the_best_of_all(self, instances: int) -> None:
        found = h100(1.0, seed=instances)
        plan = best_split(found, instances, mixed=False)
        goodputs = [found.split_goodput_rps(p, instances - p, 0.9) for p in range(1, instances)]
        assert plan.goodput_rps == max(goodputs)
        assert plan.total == instances

    def test_a_budget_holds_and_says_so(self) -> None:
        plan = smallest_fleet(h100(400.0), budget=6)
        assert plan.total == 6
        assert plan.reason.startswith("a budget of 6 holds, where ")

    def test_little_traffic_takes_one_mixed_instance(self) -> None:
        plan = smallest_fleet(h100(0.5))
        assert (plan.prefill, plan.decode, plan.mixed) == (0, 0, 1)
        assert "two would be 1 + 1" in plan.reason

    def test_the_reason_gives_the_arithmetic(self) -> None:
        plan = smallest_fleet(sizing(32.0, [1000], [200]), mixed=False)
        assert plan.reason.startswith(
            "needs 3.2 prefill instances because 32 requests/s take 100 ms each (1.00 times what their mean "
            "length takes), and 1.4 decode instances because 127 answers run at once and one decodes 90 in"
        )

    def test_nothing_comes_and_nothing_helps(self) -> None:
        assert smallest_fleet(h100(0.0), least=2).total == 4
        hopeless = replace(sizing(10.0, [1000], [200]), slo=Slo(0.05, 0.025))
        plan = smallest_fleet(hopeless)
        assert plan.total >= 2
        assert "at best 0 % can be in time" in plan.reason

    def test_errors_name_what_is_wrong(self) -> None:
        with pytest.raises(ConfigError, match="budget of 1 instances has no room"):
            smallest_fleet(h100(1.0), budget=1, mixed=False)
        with pytest.raises(ConfigError, match="a request holds 200100 tokens on average"):
            smallest_fleet(sizing(1.0, [200_000], [200]))
        with pytest.raises(ConfigError, match="weights sum to 1"):
            Traffic(1.0, np.array([10.0]), np.array([10.0]), np.array([0.5]))


def test_a_simulation_attains_below_the_predicted_goodput_and_not_above() -> None:
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    model = ServingModel(packaged.profile, packaged.kv_capacity_tokens, packaged.kv_bytes_per_token)
    plan = best_split(Sizing(Traffic.of(1.0, np.array([4096]), np.array([64])), model, SLO), 4, mixed=False)
    assert plan.goodput_rps is not None
    workload = WorkloadChoice(poisson=1.0, input_tokens="4096", output_tokens="64", limit=2500)
    setting = Setting(
        workload,
        SimulatedFleet(((packaged, 4),)),
        "minimal-load",
        (plan.prefill, plan.decode),
        SimSettings(slo=SLO),
    )
    below, above = (
        run_once(setting, rate_rps=share * plan.goodput_rps).summary()["attainment"] for share in (0.93, 1.12)
    )
    assert above < 0.9 <= below


class TestOtherPlanners:
    LOAD = IntervalLoad(requests=300, interval_s=10.0, input_tokens=1000, output_tokens=200)

    def test_the_released_formula(self) -> None:
        # ceil(1,100 / 128) = 9 blocks, 2,040 / 9 = 226 decodes; a step of 10 + 24.86 ms; 0.1 s a prompt:
        # 226 * 0.1 / (200 * 0.03486) = 3.24 prefill, not times the 300 / 226 = 1.3 decode.
        assert dopd_code(self.LOAD, ROUND) == (4, 2)
        assert dopd_code(self.LOAD, ROUND, step_correction=2.0) == (2, 2)
        assert dopd_code(replace(self.LOAD, requests=0), ROUND) == (1, 1)

    def test_dynamos_sla_planner(self) -> None:
        # 30,000 prompt tokens/s over 10,000; 6,000 answer tokens/s over 90 / 19.9 ms = 4,523.
        assert dynamo_sla(self.LOAD, ROUND, 0.025, 99_990) == (3, 2)
        # At 15 ms a batch of 45, of 14.95 ms: 3,010 tokens/s; corrections above 1 are no more prefill.
        assert dynamo_sla(self.LOAD, ROUND, 0.015, 99_990, prefill_correction=2.0) == (3, 2)
        assert dynamo_sla(self.LOAD, ROUND, 0.025, 99_990, prefill_correction=0.5, step_correction=2.0) == (
            2,
            4,
        )

    def test_dynamos_load_planner(self) -> None:
        calm = PoolsSeen(1.0, 1.0, 1.0, 0.7, 0.0)
        assert dynamo_load(calm, 2, 2, 0, budget=8) == (2, 2, 0)
        rising = replace(calm, first_queue=4.0, last_queue=7.0, mean_queue=5.5)
        assert dynamo_load(rising, 2, 2, 0, budget=8) == (3, 2, 0)
        falling = replace(rising, first_queue=7.0, last_queue=4.0)
        assert dynamo_load(falling, 2, 2, 0, budget=8) == (2, 2, 0)
        full = replace(calm, kv_share=0.85, waiting=3.0)
        assert dynamo_load(full, 2, 2, 0, budget=8) == (2, 3, 3)
        assert dynamo_load(full, 2, 2, 0, budget=4) == (2, 2, 0)
        empty = PoolsSeen(0.0, 0.0, 0.0, 0.1, 0.0)
        assert dynamo_load(empty, 2, 2, 2, budget=8) == (1, 2, 1)
        assert dynamo_load(empty, 1, 2, 0, budget=8) == (1, 1, 0)

    def test_the_released_budget_rule(self) -> None:
        assert within_budget(6, 2, 4) == (3, 1)
        assert within_budget(1, 9, 4) == (1, 3)
        with pytest.raises(ConfigError, match="no room for two pools"):
            within_budget(2, 2, 1)
