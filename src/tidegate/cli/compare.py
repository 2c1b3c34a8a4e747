"""``tidegate compare``: every system's goodput on every trace, and a report."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.options import Flag, OptionGroup, Rule
from tidegate.cli.report_folder import command_line, set_up, tell_where, titled, write_folder
from tidegate.cli.scoring import SCORING
from tidegate.cli.simulating import (
    BATCHING,
    CUT,
    DEFAULT_TRACE,
    JOBS,
    SIMULATED,
    WORKLOAD,
    FleetOptions,
    processes,
)
from tidegate.cli.tables import show_comparison
from tidegate.cli.terminal import note, progress_bar, warn
from tidegate.core.errors import ConfigError
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.compare import Plan, compare
from tidegate.experiments.findings import findings
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.setting import Setting
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


@dataclass(frozen=True, slots=True)
class Searched:
    """How closely goodput is searched."""

    levels: Annotated[
        tuple[float, ...],
        Flag("Attainments that count as met.", "X,..", panel=SCORING, shown=DEFAULT_LEVELS, read=_levels),
    ] = _levels(DEFAULT_LEVELS)
    seeds: Annotated[int, Flag("Draws of each trace.", "N", panel=SCORING, more={"min": 1})] = 3
    tolerance: Annotated[
        float,
        Flag(
            "Relative width at which a search ends.",
            "X",
            panel=SCORING,
            rule=Rule(lambda width: 0 < width < 1, "a share between 0 and 1, as in 0.02"),
        ),
    ] = 0.02


def run(
    *,
    traces: Annotated[str, Flag("Traces.", "FILE,..", panel=WORKLOAD, shown=DEFAULT_TRACE)] = DEFAULT_TRACE,
    systems: Annotated[str, Flag("Systems; see below.", "NAME,..")] = "",
    suite: Annotated[str, Flag(f"A named set of systems: {', '.join(SUITES)}.", "NAME")] = "",
    cut: Annotated[WorkloadChoice, OptionGroup(WorkloadChoice, CUT, WORKLOAD)],
    fleet: FleetOptions,
    settings: Annotated[SimSettings, SIMULATED],
    engine: Annotated[EngineSettings, BATCHING],
    out: Annotated[Path, Flag("Folder of the report and of all results.", "DIR", panel=SCORING)],
    search: Searched,
    jobs: Annotated[int | None, JOBS] = None,
    as_json: Annotated[bool, Flag("Print the report as JSON.", name="--json", panel=SCORING)] = False,
) -> None:
    """Find the goodput of every system on every trace, and write one report.

    Goodput is the highest rate, of the trace scaled in time, at which at least
    --levels of the offered requests attain their SLO. Each is also shown as a
    share of the fluid limit, which no schedule on these instances can exceed.
    """
    compared = fleet.make(engine)
    files = [name.strip() for name in (traces or DEFAULT_TRACE).split(",") if name.strip()]
    plan = Plan(
        setting=Setting(cut, compared, "", None, settings),
        workloads=titled(files, cut),
        contenders=contenders(_system_names(systems, suite), compared.size),
        levels=search.levels,
        seeds=search.seeds,
        tolerance=search.tolerance,
        command=command_line(),
        facts=set_up(compared),
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
        show_comparison(comparison, said)
    tell_where(out, missing)
