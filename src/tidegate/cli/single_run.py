"""One simulation as the command runs it: search, run, journal, block, report.

What only a search or a report needs is imported there: it takes longer than a short simulation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

import tidegate
from tidegate.cli.options import Flag, Rule
from tidegate.cli.scoring import SCORING, Scoring
from tidegate.cli.simulating import JOBS, WORKLOAD, processes
from tidegate.cli.terminal import note, progress_bar, warn
from tidegate.core.errors import ConfigError
from tidegate.experiments.run import Finished, run_once
from tidegate.experiments.setting import Setting
from tidegate.measure.run_view import view_of
from tidegate.reports.run_block import render_run
from tidegate.workloads.choice import own_rate_rps, requests_of

if TYPE_CHECKING:
    from tidegate.reports.comparison import LevelGoodput

SEARCH_SEEDS = 3
TOLERANCE = 0.02
"""Draws and relative width of a goodput search."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to do with a setting. ``rate_rps`` None is the trace's own; a goodput search replaces it."""

    rate_rps: Annotated[
        float | None,
        Flag(
            "Scale the trace's time to this rate.",
            "RPS",
            "--rate",
            WORKLOAD,
            rule=Rule(lambda rps: 0 < rps < float("inf"), "a positive number of requests per second"),
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
    journal: Annotated[Path | None, Flag("Write every decision and outcome.", "FILE", panel=SCORING)] = None
    out: Annotated[Path | None, Flag("Write report.html, CSV and PNG files.", "DIR", panel=SCORING)] = None
    jobs: Annotated[int | None, JOBS] = None

    @property
    def goes_beyond_a_run(self) -> bool:
        """Whether anything is asked for that a replay of a journal has no use for."""
        return self.rate_rps is not None or bool(self.goodput or self.limit or self.journal or self.out)


def simulate_and_show(setting: Setting, wanted: Wanted, scoring: Scoring) -> dict[str, Any]:
    """Do what is wanted, print it, and return the run's object of the ``--json`` contract."""
    found = _search(setting, wanted, scoring.level) if wanted.goodput or wanted.limit else None
    rate_rps = wanted.rate_rps
    if found is not None and wanted.goodput:
        rate_rps = found.goodput_rps or rate_rps
    finished = _simulate(setting, rate_rps, wanted.seed, wanted.journal)
    summary = finished.summary(
        goodput_rps=found.goodput_rps if found and wanted.goodput else None,
        limit_rps=found.limit_rps if found else None,
    )
    for text in finished.run.warnings:
        warn(text)
    if setting.settings.closed_loop and summary["rate_rps"] is not None:
        nominal_rps = own_rate_rps(requests_of(setting.workload)) if rate_rps is None else rate_rps
        note(
            f"closed loop: turns wait for answers, so {summary['rate_rps']:.2f} requests/s came where the "
            f"workload's times say {nominal_rps:.2f}"
        )
    if found is not None and wanted.limit and found.limit_rps is None:
        note("no rate is the fluid limit here: the workload is too short, or comes at once")
    if found is not None and found.reason:
        warn(found.reason)
    if scoring.as_json:
        typer.echo(json.dumps(summary, indent=2, allow_nan=False))
    else:
        typer.echo(render_run(finished.run, summary, slo=str(setting.settings.slo)))
    if wanted.out is not None:
        _write_report(wanted.out, finished, summary, setting, found)
    return summary


def _search(setting: Setting, wanted: Wanted, level: float) -> LevelGoodput:
    """Return the goodput, 0 and without probes where only the limit was asked for."""
    import asyncio

    from tidegate.experiments.jobs import Store, Workers
    from tidegate.experiments.run import limit_job
    from tidegate.experiments.search import find_goodput
    from tidegate.reports.comparison import LevelGoodput

    async def search() -> LevelGoodput:
        with progress_bar("runs", None) as show:
            async with Workers(processes(wanted.jobs), Store(None), show) as workers:
                bound: float | None = None
                if wanted.limit:
                    job = limit_job(setting, level, setting.fleet.engine.max_batch_tokens)
                    bound = (await workers.do(job))["limit_rps"]
                if not wanted.goodput:
                    return LevelGoodput(level, "", 0.0, 0.0, 0.0, bound, ())
                seeds = range(wanted.seed, wanted.seed + SEARCH_SEEDS)
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
    summary: Mapping[str, Any],
    setting: Setting,
    found: LevelGoodput | None,
) -> None:
    from tidegate.cli.report_folder import command_line, set_up, tell_where, titled, write_folder
    from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison

    title = next(iter(titled([setting.workload.trace], setting.workload)))
    searched = (found,) if found is not None and found.probes else ()
    entry = ComparedSystem(finished.facts.system, searched, {}, summary, summary, view_of(finished.run))
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
