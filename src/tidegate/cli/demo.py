"""``tidegate demo``: what adapting to traffic is worth, simulated on this machine in under a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tidegate.cli.common_flags import AS_JSON, JOBS, SCORING
from tidegate.cli.compare import compare_and_show
from tidegate.cli.options import Flag
from tidegate.cli.simulating import FleetOptions, command_line, make_folder, set_up
from tidegate.cli.terminal import note
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.compare import Plan
from tidegate.experiments.setting import Setting
from tidegate.experiments.systems import contenders, suite
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice
from tidegate.workloads.readers import read_trace
from tidegate.workloads.reshape import Spike, drift_mix, sine_drift, spikes
from tidegate.workloads.writers import write_trace

SOURCE = "sample:azure-conv"
DRIFT = sine_drift(3.0, 300.0)
SPIKE = Spike(2.0, 390.0, 60.0)
"""The sample's ten minutes, with the input:output ratio swinging by 3 either way twice, and one minute of
twice the requests."""
INSTANCES = 4
SLO = Slo(0.5, 0.05)
LEVEL = 0.9
TOLERANCE = 0.04

EXAMPLES = """
    tidegate demo

    tidegate demo --out /tmp/demo --json | jq '.goodputs\\[] | {system, goodput_rps}'

[bold]Exit codes[/bold]

0 compared; 1 failed; 2 wrong usage; 130 interrupted (the same command goes on).
"""


def run(
    out: Annotated[Path, Flag("Folder of the report.", "DIR", panel=SCORING)] = Path("tidegate-demo"),
    jobs: Annotated[int | None, JOBS] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Compare scheduling systems on moving traffic, simulated, in under a minute.

    Ten minutes of production chat traffic, with the ratio of prompt to answer
    tokens swinging and a spike of requests, on four simulated H100s. No GPU and
    no network; the traffic and all results go to --out.
    """
    traffic = out / "moving.jsonl"
    make_folder(out, "demo")
    if not traffic.exists():
        write_trace(traffic, spikes(drift_mix(read_trace(SOURCE), DRIFT), SPIKE, seed=0))
    fleet = FleetOptions(instances=(INSTANCES, INSTANCES)).make(EngineSettings())
    plan = Plan(
        setting=Setting(WorkloadChoice(), fleet, "", None, SimSettings(slo=SLO)),
        workloads={"moving": WorkloadChoice(trace=str(traffic))},
        contenders=contenders(suite("default"), INSTANCES),
        levels=(LEVEL,),
        seeds=1,
        tolerance=TOLERANCE,
        command=command_line(),
        facts=set_up(fleet),
    )
    note(f"simulating {INSTANCES} instances of {fleet.title}; traffic: {traffic}")
    compare_and_show(plan, "demo", out, jobs, as_json)
