"""The suite ``stress``: traffic and clusters that turn against whoever has settled.

Rates here are numbers of requests on one clock: a spike of 5 s stays one of 5 s at every rate.
"""

from __future__ import annotations

from dataclasses import replace

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.suites.rows import HOST, Experiment
from tidegate.experiments.suites.traces import SYSTEMS
from tidegate.workloads.choice import WorkloadChoice

PROFILE = "h100_sxm/llama-3.1-70b/tp4"
INSTANCES = 8
SLO = Slo(1.0, 0.05)
CHAT_S = 180.0
"""How much of the recorded chat comes where it is the cluster that changes."""
DEATHS = ((60.0, "i0"), (60.0, "i7"), (120.0, "i3"))
RETURNS = ((120.0, "i0"), (150.0, "i7"))
HALF_SPEED = {"i1": 2.0}
TENTH = 0.1


def rows(*, quick: bool) -> list[Experiment]:
    """Return the suite's rows; where time is short, with two thirds of their cycles."""
    cut = 120.0 if quick else None
    base = Experiment("", WorkloadChoice(), packaged_profile(PROFILE), INSTANCES, SLO, SYSTEMS)
    chat = WorkloadChoice(trace="sample:azure-conv", duration_s=cut or CHAT_S, keep_times=True)
    made = {
        name: WorkloadChoice(trace=f"like:{name}", duration_s=cut, keep_times=True)
        for name in ("spikes", "inversion", "tails")
    }
    found = [replace(base, workload=name, choice=choice, quick=True) for name, choice in made.items()]
    changed = replace(base, choice=chat)
    found += [
        replace(changed, workload="half-speed", slowed=HALF_SPEED, quick=True),
        replace(changed, workload="links-tenth", link_share=TENTH),
        replace(changed, workload="deaths", deaths=DEATHS, returns=RETURNS, quick=True),
    ]
    return [each for row in found for each in (row, replace(row, world=HOST, quick=False))]
