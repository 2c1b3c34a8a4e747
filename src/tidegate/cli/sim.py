"""``tidegate sim``: what a cluster would do with a workload."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer

import tidegate
from tidegate.cli.comparison_output import command_line, set_up, tell_where, titled, write_folder
from tidegate.cli.process import FAILURE
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
from tidegate.experiments.jobs import Workers
from tidegate.experiments.limit import limit_job
from tidegate.experiments.run import Finished, run_once
from tidegate.experiments.search import find_goodput
from tidegate.experiments.setting import Setting, parse_split
from tidegate.experiments.store import Store
from tidegate.experiments.workload import own_rate_rps, requests_of
from tidegate.measure.attainment import DEFAULT_LEVEL
from tidegate.measure.comparison import Comparison, Entry, LevelGoodput, TraceComparison
from tidegate.measure.run_block import render_run
from tidegate.measure.run_view import view_of
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

DEFAULT_SYSTEM = "arrow"
SEARCH_SEEDS = 3
TOLERANCE = 0.02
"""Draws and relative width of a goodput search."""

EPILOG = """
[bold]Examples[/bold]

What four H100s would do with ten minutes of production chat traffic at 40 requests/s:

    tidegate sim --rate 40

The highest rate at which 90 % of requests attain, as a share of what is possible:

    tidegate sim --system arrow+feasible-first --slo ttft:500,tpot:50 --goodput --limit

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
    seed: Annotated[
        int,
        typer.Option(
            help="0 is the trace itself; another permutes requests within each minute.",
            rich_help_panel=WORKLOAD,
        ),
    ] = 0,
    system: Annotated[
        str, typer.Option(help="Who decides; with +ORDER, in which order prompts are served.")
    ] = DEFAULT_SYSTEM,
    split: Annotated[
        str, typer.Option(metavar="P:D", help="Prefill and decode instances at the start; default: even.")
    ] = "",
    slo: Annotated[str, typer.Option(metavar="ttft:MS,tpot:MS", help="Latency targets.")] = str(Slo()),
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
    targets = Slo.parse(slo)
    fleet = make_fleet(
        profile,
        instances,
        kv_tokens=kv_tokens,
        mixed_context_ratio=mixed_context_ratio,
        chunk_tokens=chunk_tokens,
        max_num_seqs=max_num_seqs,
        host_ms=host_ms,
    )
    choice = WorkloadChoice(
        trace=trace or DEFAULT_TRACE,
        scale_rate=scale_rate,
        limit=requests,
        start_s=start,
        duration_s=duration,
    )
    settings = SimSettings(
        slo=targets,
        front_s=front_s(front_ms),
        heartbeat_s=heartbeat_s(heartbeat_ms),
        closed_loop=closed_loop,
        leap=not step,
    )
    setting = Setting(choice, fleet, system, parse_split(split) if split else None, settings)
    setting.make_system()
    _check_rates(rate, scale_rate, goodput, seed)
    _tell_assumptions(setting, trace, profile, instances, rate)
    found = _search(setting, level, seed, processes(jobs), goodput=goodput, limit=limit)
    if found is not None and goodput:
        rate = found.goodput_rps or rate
    finished = _simulate(setting, rate, seed, journal)
    summary = finished.summary(
        goodput_rps=found.goodput_rps if found and goodput else None,
        limit_rps=found.limit_rps if found else None,
    )
    _show(finished, summary, setting, found, as_json)
    if out is not None:
        _write_report(out, finished, summary, setting, found)
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


def _tell_assumptions(
    setting: Setting, trace: str, profile: Sequence[str] | None, instances: int | None, rate_rps: float | None
) -> None:
    """Say what stands in for options that were not given, and load the workload."""
    records = requests_of(setting.workload)
    assumed = []
    if not trace:
        assumed.append(f"--trace {DEFAULT_TRACE}")
    if not profile:
        assumed.append(f"--profile {setting.fleet.title}")
    if instances is None:
        assumed.append(f"--instances {setting.fleet.size}")
    if rate_rps is None and len(records) > 1 and records[-1].arrival_s > records[0].arrival_s:
        assumed.append(f"the trace's rate of {own_rate_rps(records):.2f} requests/s")
    if assumed:
        note(f"assumed {', '.join(assumed)}")
    for packaged, _ in setting.fleet.groups:
        if packaged.note:
            note(f"profile {packaged.name}: {packaged.note}")


def _search(
    setting: Setting, level: float, seed: int, jobs: int, *, goodput: bool, limit: bool
) -> LevelGoodput | None:
    """Return the goodput, 0 and without probes where only the limit was asked for; None for neither."""
    if not goodput and not limit:
        return None

    async def search() -> LevelGoodput:
        with progress_bar("runs", None) as show:
            async with Workers(jobs, Store(None), show) as workers:
                bound: float | None = None
                if limit:
                    job = limit_job(setting, level, setting.fleet.engine.max_batch_tokens)
                    bound = (await workers.do(job))["limit_rps"]
                if not goodput:
                    return LevelGoodput(level, "", 0.0, 0.0, 0.0, bound, ())
                seeds = range(seed, seed + SEARCH_SEEDS)
                return await find_goodput(setting, level, seeds, TOLERANCE, bound, workers)

    return asyncio.run(search())


def _simulate(setting: Setting, rate_rps: float | None, seed: int, journal: Path | None) -> Finished:
    total = len(requests_of(setting.workload))
    with _writing(journal) as file, progress_bar("requests", total) as show:

        def watch(arrived: int) -> None:
            show(arrived, total, "")

        return run_once(setting, rate_rps=rate_rps, seed=seed, journal=file, watch=watch)


@contextmanager
def _writing(path: Path | None) -> Iterator[IO[bytes] | None]:
    """Open a journal that is not there yet. Raises ConfigError."""
    if path is None:
        yield None
        return
    try:
        file = path.open("xb")
    except FileExistsError:
        raise ConfigError(f"--journal {path} exists; a run is never written over another") from None
    except OSError as error:
        raise ConfigError(f"--journal {path}: cannot be written: {error.strerror or error}") from None
    with file:
        yield file


def _show(
    finished: Finished,
    summary: Mapping[str, Any],
    setting: Setting,
    found: LevelGoodput | None,
    as_json: bool,
) -> None:
    for text in finished.run.warnings:
        warn(text)
    if found is not None and found.reason:
        warn(found.reason)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, allow_nan=False))
    else:
        typer.echo(render_run(finished.run, summary, slo=str(setting.settings.slo)))


def _write_report(
    folder: Path,
    finished: Finished,
    summary: Mapping[str, Any],
    setting: Setting,
    found: LevelGoodput | None,
) -> None:
    title = next(iter(titled([setting.workload.trace], setting.workload)))
    searched = (found,) if found is not None and found.probes else ()
    entry = Entry(finished.facts.system, searched, {}, summary, summary, view_of(finished.run))
    shown = TraceComparison(
        setting.workload.trace,
        title,
        (entry,),
        summary["rate_rps"],
        "the rate of this run",
        "",
        tuple(finished.run.warnings),
    )
    comparison = Comparison(
        traces=(shown,),
        levels=tuple(each.level for each in searched),
        seeds=SEARCH_SEEDS if searched else 1,
        instances=setting.fleet.size,
        slo=str(setting.settings.slo),
        profile=setting.fleet.title,
        version=tidegate.__version__,
        command=command_line(),
        facts=set_up(setting.fleet),
    )
    tell_where(folder, write_folder(folder, comparison, []))
