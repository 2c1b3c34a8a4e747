"""The clairvoyant search: what it says is attained, and never more than the fluid limit allows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.achievable import find_achievable
from tidegate.experiments.run import find_limit
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.experiments.systems import Candidate
from tidegate.sim import SimSettings, simulate
from tidegate.workloads.choice import WorkloadChoice, at_rate, requests_of

LEVEL = 0.9
CANDIDATES = (Candidate("colocated+sjf", None, 2048), Candidate("static", (1, 1), 8192))


def setting(trace: str, instances: int = 2) -> Setting:
    fleet = SimulatedFleet(((packaged_profile("h100_sxm/llama-3.1-8b"), instances),))
    return Setting(
        WorkloadChoice(trace=trace, limit=800), fleet, "", settings=SimSettings(slo=Slo(0.5, 0.05))
    )


@pytest.mark.parametrize("trace", ["sample:azure-conv", "like:short:800"])
def test_what_is_achieved_is_attained_and_within_the_limit(trace: str) -> None:
    asked = setting(trace)
    told: list[float] = []
    found = find_achievable(
        asked, LEVEL, 0, candidates=CANDIDATES, simulations=30, tell=lambda share, rate: told.append(share)
    )
    assert found.candidate is not None and found.simulations <= 30 and told == sorted(told)
    requests = at_rate(requests_of(asked.workload), found.rate_rps, 0)
    served = found.candidate.applied(asked)
    run = simulate(
        requests[np.flatnonzero(~found.given_up)],
        served.make_system(),
        served.fleet.replicas(),
        served.settings,
    )
    assert run.attained / len(requests) == pytest.approx(found.attainment) and found.attainment >= LEVEL
    limit_rps = find_limit(asked, LEVEL, 8192, 0)["limit_rps"]
    assert limit_rps is None or found.rate_rps <= limit_rps
    again = find_achievable(asked, LEVEL, 0, candidates=CANDIDATES, simulations=30)
    assert (again.rate_rps, again.candidate) == (found.rate_rps, found.candidate)
    assert np.array_equal(again.given_up, found.given_up)


def test_the_request_that_makes_the_others_miss_is_given_up(tmp_path: Path) -> None:
    """Every 10 s a long prompt, with nine short ones right behind it, in order of arrival on one instance."""
    rows = [
        {
            "timestamp": 10_000 * burst + (20 if n else 0),
            "input_length": 20 if n else 30_000,
            "output_length": 5,
        }
        for burst in range(5)
        for n in range(10)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({**row, "hash_ids": []}) + "\n" for row in rows))
    found = find_achievable(
        setting(str(trace), instances=1), LEVEL, 0, candidates=[Candidate("colocated", None, 8192)]
    )
    assert found.attainment == pytest.approx(0.9)
    assert found.given_up.reshape(5, 10).tolist() == [[True, *[False] * 9]] * 5


def test_a_closed_loop_has_none() -> None:
    asked = setting("like:code:20")
    with pytest.raises(ConfigError, match="closed loop"):
        find_achievable(replace(asked, settings=SimSettings(closed_loop=True)), LEVEL, 0)
