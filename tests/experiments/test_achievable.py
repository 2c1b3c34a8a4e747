"""The clairvoyant search: what it says is attained, never more than the fluid limit allows, nor less than
systems that are known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.achievable import Achieved, find_achievable
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import find_limit
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.experiments.systems import Candidate
from tidegate.sim import SimSettings, simulate
from tidegate.workloads.choice import WorkloadChoice, at_rate, requests_of

LEVEL = 0.9
CANDIDATES = (Candidate("colocated+edf", None, 2048), Candidate("static", (1, 1), 8192))


def setting(trace: str, instances: int = 2) -> Setting:
    fleet = SimulatedFleet(((packaged_profile("h100_sxm/llama-3.1-8b"), instances),))
    return Setting(
        WorkloadChoice(trace=trace, limit=500), fleet, "", settings=SimSettings(slo=Slo(0.5, 0.05))
    )


def search(
    asked: Setting,
    store: Path | None = None,
    *,
    seed: int = 0,
    known: Mapping[Candidate, float] | None = None,
    candidates: tuple[Candidate, ...] = CANDIDATES,
    simulations: int = 25,
) -> Achieved:
    kept = Store(store)

    async def found() -> Achieved:
        async with Workers(1, kept) as workers:
            return await find_achievable(
                asked, LEVEL, seed, workers, known=known, candidates=candidates, simulations=simulations
            )

    try:
        return asyncio.run(found())
    finally:
        kept.close()


@pytest.mark.parametrize(("trace", "seed"), [("sample:azure-conv", 0), ("like:short:500", 1)])
def test_what_is_achieved_is_attained_and_within_the_limit(trace: str, seed: int, tmp_path: Path) -> None:
    asked, store = setting(trace), tmp_path / "runs.jsonl"
    found = search(asked, store, seed=seed)
    assert found.candidate is not None and found.simulations <= 25
    requests = at_rate(requests_of(asked.workload), found.rate_rps, seed)
    served = found.candidate.applied(asked)
    kept = requests[np.flatnonzero(~found.given_up)]
    run = simulate(kept, served.make_system(), served.fleet.replicas(), served.settings)
    assert run.attained == found.attained >= LEVEL * len(requests)
    limit_rps = find_limit(asked, LEVEL, 8192, seed)["limit_rps"]
    assert limit_rps is None or found.rate_rps <= limit_rps
    # A search that is done again does nothing again.
    lines = store.read_text()
    again = search(asked, store, seed=seed)
    assert (again.rate_rps, again.candidate, again.attained) == (
        found.rate_rps,
        found.candidate,
        found.attained,
    )
    assert store.read_text() == lines


def test_it_is_not_below_a_system_that_is_known() -> None:
    asked = setting("sample:azure-conv")
    best = Candidate("colocated+sjf", None, 512)
    found = search(asked, known={best: 8.0}, candidates=CANDIDATES[1:], simulations=1)
    assert (found.rate_rps, found.candidate, found.given_up.any()) == (8.0, best, False)


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
    found = search(setting(str(trace), instances=1), candidates=(Candidate("colocated", None, 8192),))
    assert found.attainment == pytest.approx(0.9)
    assert found.given_up.reshape(5, 10).tolist() == [[True, *[False] * 9]] * 5


@pytest.mark.parametrize("given", ["closed loop", "numbers of requests"])
def test_where_rates_are_no_stretched_times_there_is_none(given: str) -> None:
    asked = setting("like:code:20")
    if given == "closed loop":
        asked = replace(asked, settings=SimSettings(closed_loop=True))
    else:
        asked = replace(asked, workload=replace(asked.workload, keep_times=True))
    with pytest.raises(ConfigError, match=given):
        search(asked)
