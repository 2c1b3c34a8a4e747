"""More time, more instances and a lower level never lower the limit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.slow import examples
from tidegate.bound.limit import fluid_limit
from tidegate.core.instance import Instance
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.workloads.trace import TraceRecord

H100 = packaged_profile("h100_sxm/llama-3.1-8b").profile
ROOM = 200_000
WITHIN = 1.01
"""Twice the precision of a search: price lists are proposals, and every search has its own."""


@dataclass(frozen=True)
class Asked:
    slo: Slo = field(default_factory=lambda: Slo(0.5, 0.03))
    instances: int = 2
    level: float = 0.9

    def scale(self, records: list[TraceRecord]) -> float:
        """Return the limit as a factor of the trace's speed, infinite where there is none."""
        fleet = [Instance(f"i{i}", ROOM, ROOM) for i in range(self.instances)]
        found = fluid_limit(
            records,
            [H100] * self.instances,
            fleet,
            self.slo,
            level=self.level,
            max_batch_tokens=8192,
            max_num_seqs=1024,
        )
        return float("inf") if found.scale is None else found.scale


HARDER = [
    (Asked(), Asked(slo=Slo(0.5, 0.012))),
    (Asked(), Asked(slo=Slo(0.2, 0.03))),
    (Asked(instances=3), Asked()),
    (Asked(), Asked(level=0.97)),
]


@settings(max_examples=examples(4), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    burstiness=st.sampled_from([0.1, 1.0]),
    answer=st.sampled_from([1.0, 4.0, 6.0]),
    pair=st.sampled_from(HARDER),
)
def test_what_is_harder_has_no_higher_limit(
    seed: int, burstiness: float, answer: float, pair: tuple[Asked, Asked]
) -> None:
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.gamma(burstiness, 1.0 / burstiness, 150))
    prompts, answers = rng.lognormal(6.0, 1.0, 150), rng.lognormal(answer, 1.0, 150)
    records = [
        TraceRecord(float(t), int(n) + 1, int(m) + 1) for t, n, m in zip(at_s, prompts, answers, strict=True)
    ]
    easier, harder = pair
    assert harder.scale(records) <= WITHIN * easier.scale(records)
