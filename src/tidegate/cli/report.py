"""``tidegate report``: what a recorded run delivered."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.cli.common_flags import SCORING, Scoring
from tidegate.cli.options import Flag
from tidegate.cli.outputs import claim_file
from tidegate.cli.terminal import FAILURE, note
from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.slo import Slo
from tidegate.journal.reader import read_journal, recorded_kind
from tidegate.measure.results import PART, Targets, read_results
from tidegate.reports.bench_report import BenchReport, recorded_report, render_block
from tidegate.reports.bench_report import observations as bench_observations
from tidegate.reports.journal_report import RunReport, build_report, observations, render_report
from tidegate.reports.run_page import bench_page, journal_page
from tidegate.reports.sweep_report import Sweep, render_sweep, sweep_page

EXAMPLES = """
    tidegate report journal.jsonl

    tidegate report journal.jsonl --out run.html

    tidegate report run.jsonl --json | jq .attainment.share

Score the same run by tighter targets, and fail a script below 99 %:

    tidegate report j.jsonl --slo ttft:300,tpot:30 --level .99 --require-level

[bold]Exit codes[/bold]

0 reported; 1 --require-level was missed; 2 wrong usage or unreadable file.
"""


def run(
    recording: Annotated[
        Path, typer.Argument(metavar="RUN", help="A journal, a bench result, or the folder of a sweep.")
    ],
    slo: Annotated[
        Slo | None,
        Flag(
            "Score by these targets instead of the recorded ones.",
            "ttft:MS,tpot:MS",
            panel=SCORING,
            read=Slo.parse,
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None, Flag("Write the report as a page that needs nothing else.", "FILE.html", panel=SCORING)
    ] = None,
    scoring: Scoring,
) -> None:
    """Report on a recorded run: outcomes, SLO attainment, times by stage, decisions.

    Attainment is over offered requests: rejected and failed ones are misses.
    Goodput of one run is the attained part of its offered rate; whether the
    run met --level tells if the highest rate at that level lies above or below.
    """
    report: RunReport | BenchReport | Sweep
    page: Callable[[], str]
    kind = "sweep" if recording.is_dir() else recorded_kind(recording)
    if out is not None:
        claim_file(out, "report")
    if kind == "sweep":
        report = Sweep.of(_bench_reports(recording, slo, scoring.level))
        page = partial(sweep_page, report)
    elif kind == "bench":
        recorded = read_results(recording)
        targets = Targets.recorded(recorded.header) if slo is None else Targets(slo)
        report = recorded_report(recorded, targets, scoring.level)
        page = partial(bench_page, report, bench_observations(recorded.results, targets))
    elif kind == "header":
        journal = read_journal(recording)
        report = build_report(journal, slo=slo, level=scoring.level)
        page = partial(journal_page, report, journal, observations(journal, slo))
    else:
        problem = "this is neither a journal (first line of type 'header') nor a bench result (type 'bench')"
        raise TraceError(problem, file=str(recording), line=1)
    if out is not None:
        out.write_text(page(), encoding="utf-8")
        note(f"report: {out}")
    if scoring.as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    elif isinstance(report, Sweep):
        typer.echo(render_sweep(report))
    elif isinstance(report, BenchReport):
        typer.echo(render_block(report))
    else:
        Console().print(render_report(report))
    scored = report.reports if isinstance(report, Sweep) else (report,)
    if scoring.require_level and not all(each.goodput.level_met for each in scored):
        raise typer.Exit(FAILURE)


def _bench_reports(folder: Path, slo: Slo | None, level: float) -> list[BenchReport]:
    """Score every bench result in a folder. Raises TraceError where there is none."""
    files = [path for path in sorted(folder.glob("*.jsonl")) if recorded_kind(path) == "bench"]
    if not files:
        raise TraceError("this folder has no bench result (*.jsonl)", file=str(folder))
    for path in folder.glob(f"*{PART}"):
        note(f"{path} is of a load that was not over; it is left out")
    reports = [
        recorded_report(read_results(path), None if slo is None else Targets(slo), level) for path in files
    ]
    if len({report.concurrency is None for report in reports}) > 1:
        raise ConfigError(f"{folder} has open and closed loops; give each kind a folder of its own")
    return reports
