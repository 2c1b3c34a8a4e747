"""No simulated system beats the fluid bound, and a plain one comes near it where nothing is in its way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.slow import examples
from tidegate.bound.limit import FluidLimit, fluid_limit
from tidegate.core.instance import Instance
from tidegate.core.slo import Slo
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost
from tidegate.costs.library import packaged_profile
from tidegate.costs.profile import Profile
from tidegate.dataplane.replica import EngineSettings, Replica, replicas_of
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord, Workload
from tidegate.workloads.transform import scale_rate

SYSTEMS = ("colocated", "minimal-load", "arrow", "arrow-lending", "static", "static:1")
QUICK = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
ORDERS = ("fifo", "sjf", "edf", "feasible-first")


@dataclass(frozen=True)
class Case:
    """A random fleet, workload and SLO, the latter some times what an idle instance needs."""

    seed: int
    system: str
    order: str
    instances: int
    equal: bool
    requests: int
    longest_prompt: int
    longest_answer: int
    bursts: bool
    shared: bool
    kv_tokens: int
    engine: EngineSettings
    load: float

    def profiles(self, rng: np.random.Generator) -> list[Profile]:
        first = random_profile(rng)
        return [first if self.equal or i == 0 else random_profile(rng) for i in range(self.instances)]

    def records(self, rng: np.random.Generator) -> list[TraceRecord]:
        gaps = rng.exponential(1.0, self.requests)
        if self.bursts:
            gaps *= 10.0 * (np.arange(self.requests) % 10 == 0)
        prompts = rng.integers(1, self.longest_prompt, self.requests, endpoint=True).tolist()
        answers = rng.integers(1, self.longest_answer, self.requests, endpoint=True).tolist()
        prefixes = rng.integers(5, size=self.requests).tolist()
        rows = zip(np.cumsum(gaps).tolist(), prompts, answers, prefixes, strict=True)
        return [
            TraceRecord(at_s, prompt, answer, ids(i, prefix, prompt) if self.shared else (), 64)
            for i, (at_s, prompt, answer, prefix) in enumerate(rows)
        ]


def ids(index: int, prefix: int, prompt: int) -> tuple[int, ...]:
    """One of a few shared blocks, then blocks of the request's own."""
    return (prefix, *(10 + 1000 * index + block for block in range((prompt - 1) // 64)))


def random_profile(rng: np.random.Generator) -> Profile:
    """Coefficients around those of real engines; a mixed step may be cheaper than a pure one, or dearer."""
    a, b, c = 10 ** rng.uniform(-3, -1.7), 10 ** rng.uniform(-5.5, -4), 10 ** rng.uniform(-10, -8)
    n0, more = float(rng.choice([0, 64, 320])), rng.uniform(0.8, 1.2, 3)
    context = 10 ** rng.uniform(-9, -6.5)
    experts = a * rng.uniform(0.001, 0.01) * (rng.random() < 0.3)
    return Profile(
        "random",
        PrefillCost(a, b, c, n0),
        StepCost(a * rng.uniform(0.5, 1.2), 10 ** rng.uniform(-6, -4), context, experts, 64.0, 8.0),
        MixedCost(a * more[0], b * more[1], c * more[2], context * rng.uniform(1, 3), n0),
        TransferCost(1e-4, 1e12),
    )


def share_attained(
    records: Iterable[TraceRecord], replicas: list[Replica], system: str, slo: Slo, order: str = "fifo"
) -> float:
    name, _, prefill = system.partition(":")
    split = (int(prefill), len(replicas) - int(prefill)) if prefill else None
    made = make_system(f"{name}+{order}", split=split, slo=slo)
    run = simulate(records, made, replicas, SimSettings(slo=slo))
    return float(np.mean(run.requests.attained))


def limit_of(records: list[TraceRecord], replicas: list[Replica], slo: Slo, level: float) -> FluidLimit:
    engine = replicas[0].engine
    return fluid_limit(
        records,
        [replica.profile for replica in replicas],
        [replica.instance for replica in replicas],
        slo,
        level=level,
        max_batch_tokens=engine.max_batch_tokens,
        max_num_seqs=engine.max_num_seqs,
        host_s=engine.host_s,
    )


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    system=st.sampled_from(SYSTEMS),
    order=st.sampled_from(ORDERS),
    instances=st.integers(2, 4),
    equal=st.booleans(),
    requests=st.sampled_from([60, 600]),
    longest_prompt=st.sampled_from([1, 40, 300, 1000]),
    longest_answer=st.sampled_from([1, 2, 10, 40]),
    bursts=st.booleans(),
    shared=st.booleans(),
    kv_tokens=st.sampled_from([4000, 20_000, 200_000]),
    engine=st.builds(
        EngineSettings,
        max_batch_tokens=st.sampled_from([64, 512, 8192]),
        max_num_seqs=st.sampled_from([4, 32, 1024]),
        host_s=st.sampled_from([0.0, 1e-3]),
    ),
    load=st.floats(0.3, 1.2),
)


ANSWERS_WORTH_LESS_THAN_THEIR_TIME = Case(
    seed=0,
    system="colocated",
    order="fifo",
    instances=2,
    equal=True,
    requests=60,
    longest_prompt=300,
    longest_answer=40,
    bursts=False,
    shared=True,
    kv_tokens=4000,
    engine=EngineSettings(max_batch_tokens=512),
    load=1.0,
)


@QUICK
@example(ANSWERS_WORTH_LESS_THAN_THEIR_TIME)
@given(case=CASES)
def test_no_system_exceeds_the_bound(case: Case) -> None:
    bound_holds(case)


@pytest.mark.slow
@settings(QUICK, max_examples=examples(200))
@given(case=CASES)
def test_no_system_exceeds_the_bound_many_times(case: Case) -> None:
    bound_holds(case)


def bound_holds(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    profiles, records = case.profiles(rng), case.records(rng)
    replicas = [
        Replica(Instance(f"i{i}", case.kv_tokens, case.kv_tokens // 16 * 16), profile, case.engine)
        for i, profile in enumerate(profiles)
    ]
    step_s = max(float(p.step.seconds(4.0, 4.0 * case.longest_prompt)) for p in profiles) + case.engine.host_s
    prefill_s = max(p.prefill_s(case.longest_prompt) for p in profiles)
    slo = Slo(prefill_s * rng.uniform(2, 12), step_s * rng.uniform(1.2, 4))
    guess = limit_of(records, replicas, slo, 0.9).scale
    scale = case.load * (guess or 10 ** rng.uniform(0, 4))
    played = scale_rate(Workload.of(records), scale)
    attained = share_attained(played, replicas, case.system, slo, case.order)
    if attained > 0:
        # What a system attained at this rate, the bound at that very level must allow.
        bound = limit_of(records, replicas, slo, attained)
        assert bound.scale is None or bound.scale >= scale * (1 - 1e-9), (attained, scale, bound)


def test_a_plain_system_comes_within_a_tenth() -> None:
    engine = EngineSettings(max_batch_tokens=8000)
    replicas = replicas_of(packaged_profile("h100_sxm/llama-3.1-8b"), 2, engine=engine)
    records = [TraceRecord(float(i), 1000, 1) for i in range(6000)]
    slo = Slo(0.5, 0.05)
    found = limit_of(records, replicas, slo, 0.99)
    assert found.scale is not None
    assert (
        share_attained(scale_rate(Workload.of(records), 0.9 * found.scale), replicas, "colocated", slo)
        >= 0.99
    )
    assert (
        share_attained(scale_rate(Workload.of(records), 1.01 * found.scale), replicas, "colocated", slo)
        < 0.99
    )
