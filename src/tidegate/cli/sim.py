"""``tidegate sim``: what a cluster would do with a workload.

What only a search needs is imported there: it takes longer than a short simulation.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any

import typer

import tidegate
from tidegate.cli.common_flags import JOBS, SCALE_RATE, SCORING, Scoring
from tidegate.cli.options import Flag, OptionGroup, Rule, at_least, given
from tidegate.cli.scaling import Scaling
from tidegate.cli.simulating import (
    A_RATE,
    BATCHING,
    CHUNKS,
    CUT,
    DEFAULT_TRACE,
    ENGINE,
    FLEET,
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
from tidegate.cli.terminal import FAILURE, note, note_cold_start, run_until_interrupted, share_bar, warn
from tidegate.core.defaults import DEFAULT_SYSTEM
from tidegate.core.errors import ConfigError
from tidegate.core.notation import FleetRange, parse_split
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.run import CLOSED_LOOP, Finished, run_once
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.journal.reader import is_yet_to_come
from tidegate.measure.run_view import view_of
from tidegate.reports.comparison import ComparedSystem, Comparison, LevelGoodput, TraceComparison
from tidegate.reports.run_block import render_run
from tidegate.signals.answered import answered_in
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice, own_rate_rps, requests_of, starts_sessions

SEARCH_SEEDS = 3
TOLERANCE = 0.02
"""Draws and relative width of a goodput search."""

EXAMPLES = """
What four H100s would do with ten minutes of production chat traffic at 40 requests/s:

    tidegate sim --rate 40

The highest rate at which 90 % of requests attain, as a share of what is possible:

    tidegate sim --system tidegate+edf --slo ttft:500,tpot:50 --goodput --limit

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
STEP = Flag(
    "Simulate every step instead of jumping over them; slow.",
    name="--step",
    given=bool,
    read=lambda step: not step,
)
WARM_START = Flag(
    "Begin with the lengths of the newest answers in this journal, or of a trace: tidegate labels the "
    "fleet for them at once.",
    "FILE",
    panel=ENGINE,
    shown=False,
)
SPARES = {
    "spares": Flag(
        "Instances, the last ones, that come up only when a controller adds one.",
        "N",
        panel=FLEET,
        rule=at_least(0),
    ),
    "start_delay_s": Flag("How long a spare takes to come up.", "S", "--start-delay", FLEET),
    "decode_start_delay_s": Flag(
        "How long one for decode takes.", "S", "--decode-start-delay", FLEET, "1.5 times --start-delay"
    ),
}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What to do with a setting. ``rate_rps`` None is the trace's own; a goodput search replaces it."""

    rate_rps: Annotated[
        float | None,
        Flag(
            "Scale the trace's time to this rate.",
            "RPS",
            "--rate",
            WORKLOAD,
            rule=A_RATE,
        ),
    ] = None
    seed: Annotated[
        int,
        Flag(
            "0 is the trace itself; another permutes requests within each minute.",
            panel=WORKLOAD,
            rule=Rule(lambda seed: seed >= 0, "0 or more"),
        ),
    ] = 0
    goodput: Annotated[bool, Flag("Search the highest rate that meets --level.", panel=SCORING)] = False
    limit: Annotated[bool, Flag("Compute the fluid limit of this hardware.", panel=SCORING)] = False
    achievable: Annotated[
        bool, Flag("Search what a clairvoyant schedule attains; takes CPU.", panel=SCORING)
    ] = False
    warm_start: Annotated[str, WARM_START] = ""
    journal: Annotated[Path | None, Flag("Write every decision and outcome.", "FILE", panel=SCORING)] = None
    out: Annotated[Path | None, Flag("Write report.html, CSV and PNG files.", "DIR", panel=SCORING)] = None
    jobs: Annotated[int | None, JOBS] = None


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
        Flag("Prefill and decode instances at the start (the system's own).", "P:D", read=parse_split),
    ] = None,
    fleet: FleetOptions,
    scaling: Scaling,
    settings: Annotated[SimSettings, OptionGroup(SimSettings, {**SIMULATED, **SPARES, "leap": STEP})],
    engine: Annotated[EngineSettings, BATCHING],
    chunks: Annotated[str | None, CHUNKS] = None,
    options: RunOptions,
    scoring: Scoring,
    replay: Annotated[
        Path | None, Flag("Compare a journal with its simulation.", "JOURNAL", panel=SCORING)
    ] = None,
) -> None:
    """Simulate a cluster under a workload, with the policies that the gateway runs.

    Without options: the packaged sample of production chat traffic, at its own
    rate, on four simulated H100s. Times are virtual; hours take seconds.
    """
    _check_rates(options, workload)
    if replay is not None:
        from tidegate.cli.replaying import replay as replay_file

        if (
            split
            or settings.slo_classes
            or any((options.rate_rps, options.journal, options.out, options.warm_start))
            or any((options.goodput, options.limit, options.achievable))
        ):
            raise ConfigError("--replay goes with the options of fleet and engine, --system and --json only")

        def fleet_of(size: int | None) -> SimulatedFleet:
            sizes = (size, size) if size else None
            return replace(fleet, instances=fleet.instances or sizes).make(engine)

        replay_file(replay, workload, fleet_of, system, settings, chunks, as_json=scoring.as_json)
        return
    made = fleet.make(engine)
    if fleet.grows:
        settings = replace(settings, spares=_spares(fleet, split, settings))
    bounds = None
    if settings.spares or scaling.budget or scaling.budget_per_hour:
        least = fleet.instances[0] if fleet.grows and fleet.instances else made.size - settings.spares
        bounds = scaling.bounds(least, made.size)
    setting = Setting(
        replace(workload, trace=workload.trace or DEFAULT_TRACE),
        made,
        system or DEFAULT_SYSTEM,
        split,
        settings,
        bounds,
        scaling.advise,
        chunks,
        options.warm_start,
    )
    if is_yet_to_come(Path(options.warm_start), options.journal):
        setting = replace(setting, warm_start="")
    setting.make_system()
    if options.warm_start and not (setting.warm_start and answered_in(setting.warm_start)):
        note_cold_start(options.warm_start)
    setting = replace(setting, settings=with_classes(settings, [setting.workload]))
    _note_assumptions(setting, given(context), options.rate_rps)
    if options.out is not None:
        make_folder(options.out, "sim")
    summary = _simulate_and_show(setting, options, scoring)
    if scoring.require_level and summary["attainment"] < scoring.level:
        raise typer.Exit(FAILURE)


def _spares(fleet: FleetOptions, split: tuple[int, int] | None, settings: SimSettings) -> int:
    """Return how many instances of a range are not up at the start."""
    assert fleet.instances is not None
    if settings.spares:
        raise ConfigError("--instances A..B says how many spares there are; drop --spares")
    return FleetRange(*fleet.instances).spares(split)


def _check_rates(options: RunOptions, workload: WorkloadChoice) -> None:
    rivals = {
        "--rate and --scale-rate both set the rate; give one": workload.scale_rate != 1.0,
        "--goodput searches the rate; drop --rate": options.goodput,
    }
    problems = [text for text, given in rivals.items() if given]
    if options.rate_rps is not None and problems:
        raise ConfigError(problems)


def _note_assumptions(setting: Setting, given: Container[str], rate_rps: float | None) -> None:
    """Print what stands in for options that were not ``given``, and load the workload."""
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
        untimed = starts_sessions(setting.workload)
        whose = "one session a second, for the trace has no times" if untimed else "the trace's own"
        assumed.append(f"--rate {own_rate_rps(records):.2f} ({whose})")
    if assumed:
        note(f"assumed {', '.join(assumed)}")
    for packaged, _ in setting.fleet.groups:
        if packaged.note:
            note(f"profile {packaged.name}: {packaged.note}")


def _simulate_and_show(setting: Setting, options: RunOptions, scoring: Scoring) -> dict[str, Any]:
    """Do what ``options`` ask, print it, and return the run's object of the ``--json`` contract."""
    found = LevelGoodput(scoring.level, "", 0.0, 0.0, 0.0, None, ())
    if options.goodput or options.limit or options.achievable:
        found = _search(setting, options, scoring.level)
    rate_rps = found.shown_rps or options.rate_rps
    finished = _simulate(setting, rate_rps, options.seed, options.journal)
    summary = finished.summary(
        goodput_rps=found.goodput_rps if options.goodput else None,
        limit_rps=found.limit_rps,
        achievable_rps=found.achievable_rps,
    )
    for text in finished.run.warnings:
        warn(text)
    if setting.settings.closed_loop and summary["rate_rps"] is not None:
        nominal_rps = own_rate_rps(requests_of(setting.workload)) if rate_rps is None else rate_rps
        note(
            f"closed loop: turns wait for answers, so {summary['rate_rps']:.2f} requests/s came where the "
            f"workload's times say {nominal_rps:.2f}"
        )
    if options.limit and found.limit_rps is None:
        why = "the workload is too short, or comes at once"
        note(f"no rate is the fluid limit here: {CLOSED_LOOP if setting.settings.closed_loop else why}")
    if found.reason:
        warn(found.reason)
    if scoring.as_json:
        typer.echo(json.dumps(summary, indent=2, allow_nan=False))
    else:
        typer.echo(render_run(finished.run, summary, slo=str(setting.settings.slo), searched=found))
    if options.out is not None:
        _write_report(options.out, finished, summary, setting, found)
    return summary


def _search(setting: Setting, options: RunOptions, level: float) -> LevelGoodput:
    """Return the goodput, 0 and without probes where only the limit or what is achievable was asked for."""
    from tidegate.experiments.achievable import SIMULATIONS
    from tidegate.experiments.jobs import Store, Workers
    from tidegate.experiments.reference import as_sentence, find_reference
    from tidegate.experiments.run import largest_limit, unlimited
    from tidegate.experiments.search import EXPECTED_PROBES, find_goodput
    from tidegate.experiments.systems import Candidate

    seeds = range(options.seed, options.seed + (SEARCH_SEEDS if options.goodput else 1))
    if options.achievable:
        tell_achievable([setting], len(seeds))
        if unlimited(setting):
            options = replace(options, achievable=False)

    async def search() -> LevelGoodput:
        with share_bar() as advance:
            async with Workers(processes(options.jobs), Store(None), advance) as workers:
                probes = options.goodput * EXPECTED_PROBES + options.achievable * SIMULATIONS
                workers.expect(len(seeds) * (options.limit + probes))
                bound: float | None = None
                if options.limit:
                    most = setting.fleet.engine.max_batch_tokens
                    bound = (await largest_limit(setting, level, most, seeds, workers))["limit_rps"]
                    workers.credit(len(seeds))
                found = LevelGoodput(level, "", 0.0, 0.0, 0.0, bound, ())
                if options.goodput:
                    found = await find_goodput(setting, level, seeds, TOLERANCE, bound, workers)
                if not options.achievable:
                    return found
                served = Candidate(setting.system, setting.split, None, setting.chunks)
                rates = found.by_seed or (0.0,) * len(seeds)
                known = {seed: {served: rate} for seed, rate in zip(seeds, rates, strict=True)}
                rate_rps, how = await find_reference(setting, level, known, bound, workers)
                note(as_sentence([how]))
                return replace(found, achievable_rps=rate_rps)

    return run_until_interrupted(search(), "nothing is kept; `tidegate compare` keeps what it has")


def _simulate(setting: Setting, rate_rps: float | None, seed: int, journal: Path | None) -> Finished:
    total = len(requests_of(setting.workload))
    with _writing(journal) as file, share_bar() as advance:

        def watch(arrived: int) -> None:
            advance(arrived / total, f"{arrived:,} of {total:,} requests")

        return run_once(setting, rate_rps=rate_rps, seed=seed, journal=file, watch=watch)


@contextmanager
def _writing(path: Path | None) -> Iterator[IO[bytes] | None]:
    """Open a journal that is not there yet; it has its name once it is whole. Raises ConfigError."""
    if path is None:
        yield None
        return
    if path.exists():
        raise ConfigError(f"--journal {path} exists; a run is never written over another")
    part = path.with_name(f"{path.name}.part")
    try:
        file = part.open("wb")
    except OSError as error:
        raise ConfigError(f"--journal {path}: cannot be written: {error.strerror or error}") from None
    try:
        with file:
            yield file
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _write_report(
    folder: Path,
    finished: Finished,
    summary: dict[str, Any],
    setting: Setting,
    found: LevelGoodput,
) -> None:
    trace = setting.workload.trace
    title = next(iter(titled([trace], setting.workload)))
    searched = (found,) if found.probes else ()
    entry = ComparedSystem(finished.facts.system, searched, {}, summary, summary, view_of(finished.run))
    warnings = tuple(finished.run.warnings)
    shown = TraceComparison(trace, title, (entry,), summary["rate_rps"], "the rate of this run", "", warnings)
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
    write_folder(folder, "sim", comparison, [])
