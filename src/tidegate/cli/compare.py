"""``tidegate compare``: every system's goodput on every trace, and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tidegate.cli.common_flags import AS_JSON, JOBS, SCORING
from tidegate.cli.compare_suite import Closeness, SuiteOptions, plan_of, run_and_show
from tidegate.cli.durations import latency
from tidegate.cli.options import Flag, OptionGroup, Rule, given
from tidegate.cli.scaling import POSITIVE
from tidegate.cli.simulating import (
    BATCHING,
    CHUNKS,
    CUT,
    DEFAULT_TRACE,
    SIMULATED,
    WORKLOAD,
    FleetOptions,
    command_line,
    make_folder,
    processes,
    set_up,
    tell_achievable,
    titled,
    with_classes,
    write_folder,
)
from tidegate.cli.terminal import note, plain_table, run_until_interrupted, share_bar, warn
from tidegate.core.errors import ConfigError
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.compare import Plan, compare
from tidegate.experiments.findings import findings
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.setting import Setting
from tidegate.experiments.systems import contenders
from tidegate.experiments.systems import suite as suite_of
from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison, class_rows
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

DEFAULT_LEVELS = "0.9,0.99"
PROBES = "probes.jsonl"
LEVEL_WIDTH, INTERVAL_WIDTH, ACHIEVABLE_WIDTH = 20, 13, 12
"""Characters that a level takes in the table, and that its interval and its share of the achievable take."""
FLIPS_WIDTH, MISSES_WIDTH, USED_WIDTH = 30, 60, 20
"""Characters that a terminal has beside the levels where flips are shown, and where misses are, too; and what
is taken by what a fleet that grows, or has a price, used."""


EXAMPLES = """
    tidegate compare --instances 4 --slo ttft:500,tpot:50 --out chat

Every static split beside the adaptive system, on two traces:

    tidegate compare --traces a.jsonl,b.csv.gz --systems tidegate,static:all --out cmp

Every system under stress, judged together; first only what it takes:

    tidegate compare --suite stress --quick --out stress --plan-only

Results are kept as they come: the same command goes on where it was stopped.

[bold]Systems[/bold]

NAME, with +ORDER at the end if wanted; NAME:P:D a split; NAME:even; NAME:best the best
split in hindsight; NAME:all every split; NAME:CHUNK a step's token budget; NAME:tuned the
best of several budgets; NAME:slack a budget by the decodes' slack.

[bold]Exit codes[/bold]

0 compared; 1 failed; 2 wrong usage or input; 130 interrupted.
"""


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
    """How closely goodput is searched, and what is told of it."""

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
    achievable: Annotated[
        bool, Flag("Search what a clairvoyant schedule attains; takes CPU.", panel=SCORING)
    ] = False
    price: Annotated[
        float | None, Flag("What an instance costs per hour.", "$", panel=SCORING, rule=POSITIVE)
    ] = None


def run(
    context: typer.Context,
    *,
    traces: Annotated[str, Flag("Traces.", "FILE,..", panel=WORKLOAD, shown=DEFAULT_TRACE)] = DEFAULT_TRACE,
    suited: SuiteOptions,
    cut: Annotated[WorkloadChoice, OptionGroup(WorkloadChoice, CUT, WORKLOAD)],
    fleet: FleetOptions,
    settings: Annotated[SimSettings, OptionGroup(SimSettings, SIMULATED)],
    engine: Annotated[EngineSettings, BATCHING],
    chunks: Annotated[str | None, CHUNKS] = None,
    out: Annotated[Path, Flag("Folder of the report and of all results.", "DIR", panel=SCORING)],
    search: Searched,
    jobs: Annotated[int | None, JOBS] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Find the goodput of every system on every trace, and write one report.

    Goodput is the highest rate, of the trace scaled in time, at which at least
    --levels of the offered requests attain their SLO. Each is also shown as a
    share of the fluid limit, which no schedule on these instances can exceed.
    """
    if suited.of_rows:
        closeness = Closeness(search.levels, search.seeds, search.tolerance)
        plan = plan_of(suited, closeness, cut.limit, given(context))
        run_and_show(plan, out, PROBES, jobs, as_json=as_json, plan_only=suited.plan_only)
        return
    compared = fleet.make(engine)
    bounds = fleet.instances if fleet.grows else None
    files = [name.strip() for name in (traces or DEFAULT_TRACE).split(",") if name.strip()]
    workloads = titled(files, cut)
    names = [name for name in suited.systems.split(",") if name.strip()]
    if suited.suite or not names:
        names += suite_of(suited.suite or "default")
    varied = with_classes(settings, workloads.values())
    setting = Setting(cut, compared, "", None, varied, bounds, chunks=chunks)
    compared_plan = Plan(
        setting=setting,
        workloads=workloads,
        contenders=contenders(names, compared.size, None if bounds is None else bounds[0]),
        levels=search.levels,
        seeds=search.seeds,
        tolerance=search.tolerance,
        command=command_line(),
        facts=set_up(compared),
        price_per_h=search.price,
        achievable=search.achievable,
    )
    if search.achievable:
        tell_achievable(
            [replace(setting, workload=each) for each in workloads.values()],
            len(search.levels) * search.seeds,
        )
    compare_and_show(compared_plan, "compare", out, jobs, as_json)


def compare_and_show(plan: Plan, command: str, out: Path, jobs: int | None, as_json: bool) -> None:
    """Compare, print tables or JSON, and write the report. Results are kept in ``out``."""
    make_folder(out, command)
    store = Store(out / PROBES)
    if len(store):
        note(f"{out / PROBES} has {len(store)} results of earlier runs; what they answer is not run again")

    async def everything() -> Comparison:
        with share_bar() as advance:
            async with Workers(processes(jobs), store, advance) as workers:
                return await compare(plan, workers)

    try:
        kept = f"{out / PROBES} keeps what is finished, and the same command goes on from there"
        comparison = run_until_interrupted(everything(), kept)
    finally:
        store.close()
    for trace in comparison.traces:
        for text in trace.warnings:
            warn(f"{trace.title}: {text}")
        if trace.achieved_by:
            note(f"{trace.title}: {trace.achieved_by}")
    sentences = findings(comparison)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=2, allow_nan=False))
    else:
        _show_comparison(comparison, sentences)
    write_folder(out, command, comparison, sentences)


def _show_comparison(comparison: Comparison, findings: Sequence[str]) -> None:
    """Print a table per trace, then the findings. What is no terminal has lines of any length."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for trace in comparison.traces:
        console.print(_goodputs(comparison, trace, console.width))
        if by_class := class_rows(trace):
            console.print(_attained_by_class(by_class))
        notes = {f.reason for entry in trace.entries for f in entry.levels if f.reason}
        for text in sorted(notes):
            console.print(f"* {escape(text)}", style="dim")
        console.print()
    for sentence in findings:
        console.print(escape(sentence), highlight=False, soft_wrap=not console.is_terminal)


def _attained_by_class(rows: Sequence[Sequence[str]]) -> Table:
    head, *shares = rows
    table = plain_table(title="Attained, by SLO class", title_justify="left", title_style="bold")
    for title in head:
        table.add_column(escape(title), justify="left" if title == head[0] else "right")
    for row in shares:
        table.add_row(*map(escape, row))
    return table


def _goodputs(comparison: Comparison, trace: TraceComparison, width: int) -> Table:
    """Return the table of a trace, of the columns that ``width`` has room for; the report has all."""
    beside = width - LEVEL_WIDTH * len(comparison.levels)
    used = comparison.least is not None or comparison.price_per_h is not None
    achieved = any(found.achievable_rps for entry in trace.entries for found in entry.levels)
    beside -= USED_WIDTH * used + ACHIEVABLE_WIDTH * achieved * len(comparison.levels)
    flips, misses = beside >= FLIPS_WIDTH, beside >= MISSES_WIDTH
    intervals = comparison.seeds > 1 and beside >= MISSES_WIDTH + INTERVAL_WIDTH * len(comparison.levels)
    table = plain_table(
        title=f"{escape(trace.title)}: goodput (requests/s) at {escape(comparison.slo)}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("system", overflow="fold", min_width=16)
    for level in comparison.levels:
        table.add_column(f"at {100 * level:g} %", justify="right", no_wrap=True)
        if intervals:
            table.add_column("interval", justify="right", style="dim", no_wrap=True)
        table.add_column("of limit", justify="right")
        if achieved:
            table.add_column("of achievable", justify="right", max_width=10)
    rate = "" if trace.common_rate_rps is None else f" at {_rate(trace.common_rate_rps)}"
    late = ["instance-hours", *["cost"] * (comparison.price_per_h is not None)] * used
    late += [f"flips{rate}"] * flips + ["p99 TTFT of misses", "p99 TPOT of misses"] * misses
    for title in late:
        table.add_column(title, justify="right", max_width=9)
    for entry in trace.entries:
        cells = _goodput_cells(
            entry, intervals, achieved, list(comparison.used(entry).values()) if used else []
        )
        table.add_row(*cells[: len(table.columns)])
    return table


def _goodput_cells(
    entry: ComparedSystem, interval: bool, achieved: bool, used: Sequence[float | None]
) -> list[str]:
    cells = [escape(entry.title)]
    for found in entry.levels:
        share = found.share_of_limit
        cells.append(f"[bold]{_rate(found.goodput_rps)}[/]{'*' if found.reason else ''}")
        if interval:
            cells.append(f"{_rate(found.low_rps)}-{_rate(found.high_rps)}")
        shares = [share, *[found.share_of_achievable] * achieved]
        cells += ["-" if each is None else f"{100 * each:.0f} %" for each in shares]
    cells += ["-" if each is None else f"{each:,.2f}" for each in used]
    flips, view = (entry.at_common or {}).get("flips"), entry.view
    cells.append("-" if flips is None else str(flips))
    misses = (None, None) if view is None else (view.missed_ttft_p99_s, view.missed_tpot_p99_s)
    return cells + [latency(each) for each in misses]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"
