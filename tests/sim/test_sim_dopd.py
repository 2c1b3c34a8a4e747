"""DOPD, `tidegate` and the planners beside them in the simulator: a fleet follows its load, or rests."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.sim import SimRun, SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice, requests_of
from tidegate.workloads.reshape import concatenate
from tidegate.workloads.trace import Workload

SLO = Slo(1.0, 0.05)
LEAST, MOST = 2, 6


def poisson(rate_rps: float, duration_s: float, seed: int = 0) -> Workload:
    choice = WorkloadChoice(poisson=rate_rps, duration_s=duration_s, seed=seed)
    return requests_of(replace(choice, input_tokens="lognormal:1000:1", output_tokens="100"))


def run(
    name: str, workload: Workload, *, fixed: bool = False, slo: Slo = SLO, lines: io.BytesIO | None = None
) -> SimRun:
    system = make_system(name, slo=slo, fleet=None if fixed else (LEAST, MOST))
    settings = SimSettings(slo=slo, spares=0 if fixed else MOST - LEAST)
    replicas = replicas_of(packaged_profile("l40s/llama-3.1-8b"), 4 if fixed else MOST)
    return simulate(workload, system, replicas, settings, journal=lines)


@pytest.mark.parametrize("name", ["dopd", "tidegate"])
def test_a_fleet_follows_its_load_and_says_why(name: str) -> None:
    growing = [poisson(rate_rps, 90.0, seed) for seed, rate_rps in enumerate((2.0, 4.0, 6.0, 9.0, 12.0))]
    workload = concatenate(*growing, poisson(2.0, 800.0, 9))
    journal = io.BytesIO()
    found = run(name, workload, lines=journal)
    assert found.outcomes == {"ok": len(workload)}
    assert found.attained > 0.98 * len(workload)
    assert found.adds >= 1 and found.drains >= 1 and found.reversals <= 3
    up = np.isfinite(found.timeline.roles).sum(axis=1)
    assert (up[0], up[-1]) == (LEAST, LEAST) and up.max() > LEAST
    said = [line for line in journal.getvalue().decode().splitlines() if '"type":"control"' in line]
    assert any(why in line for line in said for why in ("prefill instances because", "that do both keep"))
    assert any("holding" in line and "plans want less" in line for line in said)
    again = run(name, workload)
    assert (again.adds, again.drains, again.instance_hours) == (
        found.adds,
        found.drains,
        found.instance_hours,
    )


@pytest.mark.parametrize("name", ["dopd-code", "dynamo-load", "dynamo-sla", "reactive"])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_planners_beside_it_serve_all(name: str, fixed: bool) -> None:
    found = run(name, poisson(6.0, 240.0), fixed=fixed)
    assert found.outcomes == {"ok": len(found.requests)}
    if fixed:
        assert not (found.adds or found.drains)


def test_a_fixed_fleet_rests_at_constant_load() -> None:
    found = run("dopd", poisson(6.0, 1200.0), fixed=True)
    assert found.flips <= 1 and not (found.adds or found.drains)


CONSTANT = {
    0.3: ("lognormal:4000:1", "lognormal:400:1"),
    0.75: ("lognormal:4000:1", "lognormal:400:1"),
    1.2: ("lognormal:4000:1", "lognormal:400:1"),
    3.0: ("lognormal:1000:1", "lognormal:200:1"),
    6.0: ("lognormal:1000:1", "lognormal:200:1"),
    10.0: ("lognormal:1000:1", "lognormal:200:1"),
}
"""Prompts and answers by rate: loads between whole numbers of instances, and at one."""


def actions(rate_rps: float, hours: float, name: str) -> int:
    """Return what was done at constant load to a fleet that is of about a size for it."""
    prompt, answer = CONSTANT[rate_rps]
    choice = WorkloadChoice(poisson=rate_rps, duration_s=3600.0 * hours)
    workload = requests_of(replace(choice, input_tokens=prompt, output_tokens=answer))
    slo, first = Slo(4.0, 0.05), (1, 2)
    replicas = replicas_of(packaged_profile("l40s/llama-3.1-8b"), 8)
    system = make_system(name, slo=slo, split=first if name == "dopd" else None, fleet=(2, 8))
    found = simulate(workload, system, replicas, SimSettings(slo=slo, spares=8 - sum(first)))
    assert found.attained > 0.99 * len(workload)
    return found.flips + found.adds + found.drains


@pytest.mark.parametrize("name", ["dopd", "tidegate"])
@pytest.mark.parametrize("rate_rps", [0.3, 0.75, 3.0])
def test_a_fleet_rests_at_constant_load(rate_rps: float, name: str) -> None:
    """One action to the size that the load takes, and one an hour."""
    assert actions(rate_rps, 1.0, name) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dopd", "tidegate"])
@pytest.mark.parametrize("rate_rps", CONSTANT)
def test_six_hours_of_constant_load_take_at_most_one_action_an_hour(rate_rps: float, name: str) -> None:
    assert actions(rate_rps, 6.0, name) <= 6
