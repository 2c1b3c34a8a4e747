"""``tidegate report``: what a recorded run delivered."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.cli.common_flags import SCORING, Scoring
from tidegate.cli.options import Flag
from tidegate.cli.outputs import claim_file
from tidegate.cli.terminal import FAILURE, note
from tidegate.core.errors import TraceError
from tidegate.core.slo import Slo
from tidegate.journal.reader import read_journal, recorded_kind
from tidegate.measure.percentiles import Summary
from tidegate.measure.results import RequestResult, read_results
from tidegate.reports.bench_report import BenchReport, build_bench_report, render_block
from tidegate.reports.bench_report import observations as bench_observations
from tidegate.reports.journal_report import RunReport, build_report, observations, render_report
from tidegate.reports.run_page import bench_page, journal_page

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
        Path, typer.Argument(metavar="RUN", help="A gateway or simulation journal, or a bench result.")
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
    report: RunReport | BenchReport
    page: Callable[[], str]
    kind = recorded_kind(recording)
    if out is not None:
        claim_file(out, "report")
    if kind == "bench":
        report, results = _bench_report(recording, slo, scoring.level)
        page = partial(bench_page, report, bench_observations(results, report.slo))
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
    elif isinstance(report, BenchReport):
        typer.echo(render_block(report))
    else:
        Console().print(render_report(report))
    if scoring.require_level and not report.goodput.level_met:
        raise typer.Exit(FAILURE)


def _bench_report(
    path: Path, targets: Slo | None, level: float
) -> tuple[BenchReport, Sequence[RequestResult]]:
    recorded = read_results(path)
    notes = []
    if recorded.truncated:
        notes.append("the last line is cut off: the client was stopped in the middle of it")
    if recorded.summary is None:
        notes.append("the file has no summary line: the client was killed before its end")
    own = recorded.header.get("slo")
    slo = targets or (Slo(own["ttft_s"], own["tpot_s"]) if isinstance(own, dict) else Slo())
    gaps = (recorded.summary or {}).get("itl_s")
    itl_s = Summary(**gaps) if isinstance(gaps, dict) else None
    report = build_bench_report(recorded.results, slo, level=level, itl_s=itl_s, notes=notes)
    return report, recorded.results
