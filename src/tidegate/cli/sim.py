"""``tidegate sim``: what a cluster would do with a workload."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tidegate.api import DEFAULT_SYSTEM
from tidegate.cli.options import Flag, OptionGroup, given
from tidegate.cli.process import FAILURE
from tidegate.cli.scoring import SCORING, Scoring
from tidegate.cli.simulating import (
    BATCHING,
    CUT,
    DEFAULT_TRACE,
    STEPPED,
    WORKLOAD,
    FleetOptions,
)
from tidegate.cli.single_run import Wanted, simulate_and_show
from tidegate.cli.terminal import note
from tidegate.cli.workload_flags import SCALE_RATE
from tidegate.core.errors import ConfigError
from tidegate.core.notation import parse_split
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice, own_rate_rps, requests_of, starts_sessions

EPILOG = """
[bold]Examples[/bold]

What four H100s would do with ten minutes of production chat traffic at 40 requests/s:

    tidegate sim --rate 40

The highest rate at which 90 % of requests attain, as a share of what is possible:

    tidegate sim --system arrow-lending+feasible-first --slo ttft:500,tpot:50 --goodput --limit

A trace of your own on eight instances, as one JSON object:

    tidegate sim --trace t.jsonl --instances 8 --split 3:5 --system static --json

What a gateway's journal would have been, and how far the simulation is off:

    tidegate sim --replay journal.jsonl

[bold]Exit codes[/bold]

0 simulated; 1 --require-level was missed; 2 wrong usage or input; 130 interrupted.
"""


SIMULATED_TRACE = OptionGroup(
    WorkloadChoice,
    {
        "trace": Flag(f"Trace of any format that `tidegate trace info` reads ({DEFAULT_TRACE}).", "FILE"),
        **SCALE_RATE,
        **CUT,
    },
    WORKLOAD,
)


def run(
    context: typer.Context,
    workload: Annotated[WorkloadChoice, SIMULATED_TRACE],
    *,
    system: Annotated[
        str,
        Flag(f"Who decides; with +ORDER, in which order prompts are served ({DEFAULT_SYSTEM}).", "NAME"),
    ] = "",
    split: Annotated[
        tuple[int, int] | None,
        Flag("Prefill and decode instances at the start; default: even.", "P:D", read=parse_split),
    ] = None,
    fleet: FleetOptions,
    settings: Annotated[SimSettings, STEPPED],
    engine: Annotated[EngineSettings, BATCHING],
    wanted: Wanted,
    scoring: Scoring,
    replay: Annotated[
        Path | None, Flag("Compare a journal with its simulation.", "JOURNAL", panel=SCORING)
    ] = None,
) -> None:
    """Simulate a cluster under a workload, with the policies that the gateway runs.

    Without options: the packaged sample of production chat traffic, at its own
    rate, on four simulated H100s. Times are virtual; hours take seconds.
    """
    _check_rates(wanted, workload)
    if replay is not None:
        from tidegate.cli.replaying import replay as replay_file

        if wanted.goes_beyond_a_run or split:
            raise ConfigError("--replay goes with the options of fleet and engine, --system and --json only")

        def fleet_of(size: int | None) -> SimulatedFleet:
            return replace(fleet, instances=fleet.instances or size).make(engine)

        replay_file(replay, workload, fleet_of, system, settings, as_json=scoring.as_json)
        return
    setting = Setting(
        replace(workload, trace=workload.trace or DEFAULT_TRACE),
        fleet.make(engine),
        system or DEFAULT_SYSTEM,
        split,
        settings,
    )
    setting.make_system()
    _tell_assumptions(setting, given(context), wanted.rate_rps)
    if wanted.out is not None:
        from tidegate.cli.report_folder import make_folder

        make_folder(wanted.out)
    summary = simulate_and_show(setting, wanted, scoring)
    if scoring.require_level and summary["attainment"] < scoring.level:
        raise typer.Exit(FAILURE)


def _check_rates(wanted: Wanted, workload: WorkloadChoice) -> None:
    problems = []
    if wanted.rate_rps is not None and workload.scale_rate != 1.0:
        problems.append("--rate and --scale-rate both set the rate; give one")
    if wanted.rate_rps is not None and wanted.goodput:
        problems.append("--goodput searches the rate; drop --rate")
    if problems:
        raise ConfigError(problems)


def _tell_assumptions(setting: Setting, given: Container[str], rate_rps: float | None) -> None:
    """Say what stands in for options that were not ``given``, and load the workload."""
    records = requests_of(setting.workload)
    values = {
        "trace": DEFAULT_TRACE,
        "system": DEFAULT_SYSTEM,
        "profile": setting.fleet.title,
        "instances": str(setting.fleet.size),
        "slo": str(setting.settings.slo),
    }
    assumed = [f"--{name} {value}" for name, value in values.items() if name not in given]
    if rate_rps is None and len(records) > 1 and records[-1].arrival_s > records[0].arrival_s:
        whose = (
            "one session a second, for the trace has no times"
            if starts_sessions(setting.workload)
            else ("the trace's own")
        )
        assumed.append(f"--rate {own_rate_rps(records):.2f} ({whose})")
    if assumed:
        note(f"assumed {', '.join(assumed)}")
    for packaged, _ in setting.fleet.groups:
        if packaged.note:
            note(f"profile {packaged.name}: {packaged.note}")
