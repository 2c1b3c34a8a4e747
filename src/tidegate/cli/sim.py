"""``tidegate sim``: what a cluster would do with a workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.comparison_output import make_folder
from tidegate.cli.process import FAILURE
from tidegate.cli.replaying import replay as replay_file
from tidegate.cli.scoring import Json, Level, RequireLevel
from tidegate.cli.simulating import (
    DEFAULT_TRACE,
    SCORING,
    WORKLOAD,
    ChunkTokens,
    ClosedLoop,
    Duration,
    FrontMs,
    HeartbeatMs,
    HostMs,
    Instances,
    Jobs,
    KvTokens,
    MaxNumSeqs,
    MixedContextRatio,
    MostRequests,
    Profiles,
    Start,
    TurnGap,
    front_s,
    heartbeat_s,
    make_fleet,
    note,
    processes,
)
from tidegate.cli.single_run import Wanted, simulate_and_show
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.experiments.setting import Fleet, Setting, parse_split
from tidegate.experiments.workload import own_rate_rps, requests_of, starts_sessions
from tidegate.measure.attainment import DEFAULT_LEVEL
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

DEFAULT_SYSTEM = "arrow-lending"

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


def register(app: typer.Typer) -> None:
    """Add the ``sim`` command."""
    app.command("sim", epilog=EPILOG, rich_help_panel="Simulate")(run)


def run(
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help=f"Trace of any format that `tidegate trace info` reads ({DEFAULT_TRACE}).",
            rich_help_panel=WORKLOAD,
            show_default=False,
        ),
    ] = "",
    rate: Annotated[
        float | None,
        typer.Option(metavar="RPS", help="Scale the trace's time to this rate.", rich_help_panel=WORKLOAD),
    ] = None,
    scale_rate: Annotated[
        float, typer.Option(metavar="X", help="Divide the trace's times by X.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    requests: MostRequests = None,
    start: Start = 0.0,
    duration: Duration = None,
    closed_loop: ClosedLoop = False,
    turn_gap: TurnGap = None,
    seed: Annotated[
        int,
        typer.Option(
            help="0 is the trace itself; another permutes requests within each minute.",
            rich_help_panel=WORKLOAD,
        ),
    ] = 0,
    system: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"Who decides; with +ORDER, in which order prompts are served ({DEFAULT_SYSTEM}).",
            show_default=False,
        ),
    ] = "",
    split: Annotated[
        str, typer.Option(metavar="P:D", help="Prefill and decode instances at the start; default: even.")
    ] = "",
    slo: Annotated[
        str, typer.Option(metavar="ttft:MS,tpot:MS", help=f"Latency targets ({Slo()}).", show_default=False)
    ] = "",
    profile: Profiles = None,
    instances: Instances = None,
    kv_tokens: KvTokens = None,
    mixed_context_ratio: MixedContextRatio = None,
    chunk_tokens: ChunkTokens = None,
    max_num_seqs: MaxNumSeqs = None,
    host_ms: HostMs = 0.0,
    front_ms: FrontMs = 0.0,
    heartbeat_ms: HeartbeatMs = 0.0,
    step: Annotated[
        bool, typer.Option("--step", help="Simulate every step instead of jumping over them; slow.")
    ] = False,
    goodput: Annotated[
        bool,
        typer.Option(
            "--goodput", help="Search the highest rate that meets --level.", rich_help_panel=SCORING
        ),
    ] = False,
    limit: Annotated[
        bool,
        typer.Option("--limit", help="Compute the fluid limit of this hardware.", rich_help_panel=SCORING),
    ] = False,
    level: Level = DEFAULT_LEVEL,
    require_level: RequireLevel = False,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every decision and outcome.", rich_help_panel=SCORING),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="JOURNAL", help="Compare a journal with its simulation.", rich_help_panel=SCORING
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write report.html, CSV and PNG files.", rich_help_panel=SCORING),
    ] = None,
    jobs: Jobs = None,
    as_json: Json = False,
) -> None:
    """Simulate a cluster under a workload, with the policies that the gateway runs.

    Without options: the packaged sample of production chat traffic, at its own
    rate, on four simulated H100s. Times are virtual; hours take seconds.
    """
    _check_rates(rate, scale_rate, goodput, seed)

    def fleet_of(count: int | None) -> Fleet:
        return make_fleet(
            profile,
            count,
            kv_tokens=kv_tokens,
            mixed_context_ratio=mixed_context_ratio,
            chunk_tokens=chunk_tokens,
            max_num_seqs=max_num_seqs,
            host_ms=host_ms,
        )

    workload = WorkloadChoice(
        trace=trace,
        scale_rate=scale_rate,
        limit=requests,
        start_s=start,
        duration_s=duration,
        turn_gap_s=turn_gap,
    )
    settings = SimSettings(
        slo=Slo.parse(slo) if slo else Slo(),
        front_s=front_s(front_ms),
        heartbeat_s=heartbeat_s(heartbeat_ms),
        closed_loop=closed_loop,
        leap=not step,
    )
    if replay is not None:
        if rate is not None or split or goodput or limit or out or journal:
            raise ConfigError("--replay goes with the options of fleet and engine, --system and --json only")
        replay_file(
            replay, workload, lambda size: fleet_of(instances or size), system, settings, as_json=as_json
        )
        return
    setting = Setting(
        replace(workload, trace=trace or DEFAULT_TRACE),
        fleet_of(instances),
        system or DEFAULT_SYSTEM,
        parse_split(split) if split else None,
        settings,
    )
    setting.make_system()
    given = {
        "--trace": trace,
        "--system": system,
        "--profile": profile,
        "--instances": instances,
        "--slo": slo,
    }
    _tell_assumptions(setting, [name for name, value in given.items() if not value], rate)
    if out is not None:
        make_folder(out)
    wanted = Wanted(level, seed, rate, goodput, limit, journal, out, processes(jobs))
    summary = simulate_and_show(setting, wanted, as_json=as_json)
    if require_level and summary["attainment"] < level:
        raise typer.Exit(FAILURE)


def _check_rates(rate: float | None, scale_rate: float, goodput: bool, seed: int) -> None:
    problems = []
    if rate is not None and scale_rate != 1.0:
        problems.append("--rate and --scale-rate both set the rate; give one")
    if rate is not None and not 0 < rate < float("inf"):
        problems.append(f"--rate is a positive number of requests per second, got {rate}")
    if rate is not None and goodput:
        problems.append("--goodput searches the rate; drop --rate")
    if seed < 0:
        problems.append(f"--seed is 0 or more, got {seed}")
    if problems:
        raise ConfigError(problems)


def _tell_assumptions(setting: Setting, missing: Sequence[str], rate_rps: float | None) -> None:
    """Say what stands in for options that were not given, and load the workload."""
    records = requests_of(setting.workload)
    values = {
        "--trace": DEFAULT_TRACE,
        "--system": DEFAULT_SYSTEM,
        "--profile": setting.fleet.title,
        "--instances": str(setting.fleet.size),
        "--slo": str(setting.settings.slo),
    }
    assumed = [f"{name} {values[name]}" for name in missing]
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
