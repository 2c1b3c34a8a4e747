"""``tidegate report``: what a recorded run delivered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.cli.common_flags import SCORING, Scoring
from tidegate.cli.options import Flag
from tidegate.cli.terminal import FAILURE
from tidegate.core.errors import TraceError
from tidegate.core.slo import Slo
from tidegate.journal.reader import read_journal, recorded_kind
from tidegate.measure.percentiles import Summary
from tidegate.measure.results import read_results
from tidegate.reports.bench_report import BenchReport, build_bench_report, render_block
from tidegate.reports.journal_report import RunReport, build_report, render_report

EXAMPLES = """
    tidegate report journal.jsonl

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
    scoring: Scoring,
) -> None:
    """Report on a recorded run: outcomes, SLO attainment, times by stage, decisions.

    Attainment is over offered requests: rejected and failed ones are misses.
    Goodput of one run is the attained part of its offered rate; whether the
    run met --level tells if the highest rate at that level lies above or below.
    """
    report: RunReport | BenchReport
    kind = recorded_kind(recording)
    if kind == "bench":
        report = _bench_report(recording, slo, scoring.level)
    elif kind == "header":
        report = build_report(read_journal(recording), slo=slo, level=scoring.level)
    else:
        problem = "this is neither a journal (first line of type 'header') nor a bench result (type 'bench')"
        raise TraceError(problem, file=str(recording), line=1)
    if scoring.as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    elif isinstance(report, BenchReport):
        typer.echo(render_block(report))
    else:
        Console().print(render_report(report))
    if scoring.require_level and not report.goodput.level_met:
        raise typer.Exit(FAILURE)


def _bench_report(path: Path, targets: Slo | None, level: float) -> BenchReport:
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
    return build_bench_report(recorded.results, slo, level=level, itl_s=itl_s, notes=notes)
