"""``tidegate compare``: every system's goodput on every trace, and a report."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.comparison_output import (
    command_line,
    print_tables,
    set_up,
    tell_where,
    titled,
    write_folder,
)
from tidegate.cli.scoring import Json
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
    progress_bar,
    warn,
)
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.experiments.compare import Plan, compare
from tidegate.experiments.findings import findings
from tidegate.experiments.jobs import Workers
from tidegate.experiments.setting import Setting
from tidegate.experiments.store import Store
from tidegate.experiments.systems import SUITES, contenders
from tidegate.experiments.systems import suite as suite_of
from tidegate.reports.comparison import Comparison
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

DEFAULT_LEVELS = "0.9,0.99"
PROBES = "probes.jsonl"

EPILOG = """
[bold]Examples[/bold]

    tidegate compare --instances 4 --slo ttft:500,tpot:50 --out chat

Every static split beside the adaptive system, on two traces:

    tidegate compare --traces a.jsonl,b.csv.gz --systems arrow-lending,static:all --out cmp

Results are kept as they come: the same command goes on where it was stopped.

[bold]Systems[/bold]

NAME, with +ORDER at the end if wanted; NAME:P:D a split; NAME:even; NAME:best the best
split in hindsight; NAME:all every split; NAME:CHUNK a step's token budget; NAME:tuned the
best of several budgets.

[bold]Exit codes[/bold]

0 compared; 1 failed; 2 wrong usage or input; 130 interrupted.
"""


def register(app: typer.Typer) -> None:
    """Add the ``compare`` command."""
    app.command("compare", epilog=EPILOG, rich_help_panel="Simulate")(run)


def run(
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the report and of all results.", rich_help_panel=SCORING),
    ],
    traces: Annotated[
        str,
        typer.Option(
            metavar="FILE,..", help=f"Traces ({DEFAULT_TRACE}).", rich_help_panel=WORKLOAD, show_default=False
        ),
    ] = "",
    systems: Annotated[str, typer.Option(metavar="NAME,..", help="Systems; see below.")] = "",
    suite: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"A named set of systems: {', '.join(SUITES)}.", show_default=False
        ),
    ] = "",
    slo: Annotated[str, typer.Option(metavar="ttft:MS,tpot:MS", help="Latency targets.")] = str(Slo()),
    levels: Annotated[
        str, typer.Option(metavar="X,..", help="Attainments that count as met.", rich_help_panel=SCORING)
    ] = DEFAULT_LEVELS,
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Draws of each trace.", rich_help_panel=SCORING, min=1)
    ] = 3,
    tolerance: Annotated[
        float,
        typer.Option(metavar="X", help="Relative width at which a search ends.", rich_help_panel=SCORING),
    ] = 0.02,
    requests: MostRequests = None,
    start: Start = 0.0,
    duration: Duration = None,
    closed_loop: ClosedLoop = False,
    turn_gap: TurnGap = None,
    profile: Profiles = None,
    instances: Instances = None,
    kv_tokens: KvTokens = None,
    mixed_context_ratio: MixedContextRatio = None,
    chunk_tokens: ChunkTokens = None,
    max_num_seqs: MaxNumSeqs = None,
    host_ms: HostMs = 0.0,
    front_ms: FrontMs = 0.0,
    heartbeat_ms: HeartbeatMs = 0.0,
    jobs: Jobs = None,
    as_json: Json = False,
) -> None:
    """Find the goodput of every system on every trace, and write one report.

    Goodput is the highest rate, of the trace scaled in time, at which at least
    --levels of the offered requests attain their SLO. Each is also shown as a
    share of the fluid limit, which no schedule on these instances can exceed.
    """
    fleet = make_fleet(
        profile,
        instances,
        kv_tokens=kv_tokens,
        mixed_context_ratio=mixed_context_ratio,
        chunk_tokens=chunk_tokens,
        max_num_seqs=max_num_seqs,
        host_ms=host_ms,
    )
    settings = SimSettings(
        slo=Slo.parse(slo),
        front_s=front_s(front_ms),
        heartbeat_s=heartbeat_s(heartbeat_ms),
        closed_loop=closed_loop,
    )
    if not 0 < tolerance < 1:
        raise ConfigError(f"--tolerance is a share between 0 and 1, as in 0.02; got {tolerance}")
    files = [name.strip() for name in (traces or DEFAULT_TRACE).split(",") if name.strip()]
    cut = WorkloadChoice(limit=requests, start_s=start, duration_s=duration, turn_gap_s=turn_gap)
    plan = Plan(
        setting=Setting(cut, fleet, "", None, settings),
        workloads=titled(files, cut),
        contenders=contenders(_system_names(systems, suite), fleet.size),
        levels=_levels(levels),
        seeds=seeds,
        tolerance=tolerance,
        command=command_line(),
        facts=set_up(fleet),
    )
    show(carry_out(plan, out, processes(jobs)), out, as_json)


def carry_out(plan: Plan, out: Path, jobs: int) -> Comparison:
    """Compare with results kept in ``out``, a progress bar on a terminal."""
    store = Store(out / PROBES)
    if len(store):
        note(f"{out / PROBES} has {len(store)} results of earlier runs; what they answer is not run again")

    async def everything() -> Comparison:
        with progress_bar("runs", None) as show:
            async with Workers(jobs, store, show) as workers:
                return await compare(plan, workers)

    try:
        return asyncio.run(everything())
    finally:
        store.close()


def show(comparison: Comparison, out: Path, as_json: bool) -> None:
    """Write the folder, and print tables or JSON."""
    said = findings(comparison)
    missing = write_folder(out, comparison, said)
    for trace in comparison.traces:
        for text in trace.warnings:
            warn(f"{trace.title}: {text}")
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=2, allow_nan=False))
    else:
        print_tables(comparison, said)
    tell_where(out, missing)


def _system_names(systems: str, suite: str) -> list[str]:
    names = [name for name in systems.split(",") if name.strip()]
    if suite or not names:
        names += suite_of(suite or "default")
    return names


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        levels = ()
    if not levels or not all(0 < level <= 1 for level in levels) or len(set(levels)) < len(levels):
        raise ConfigError(f"--levels are different shares between 0 and 1, as in 0.9,0.99; got {text!r}")
    return levels
