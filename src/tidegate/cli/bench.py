"""``tidegate bench``: offer load to an endpoint and score the answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.bench import BenchRun, BenchSettings, bench
from tidegate.cli import common_flags as common
from tidegate.cli.common_flags import SCORING, Scoring
from tidegate.cli.options import Flag, OptionGroup
from tidegate.cli.outputs import claim_file
from tidegate.cli.terminal import FAILURE, INTERRUPTED
from tidegate.core.slo import Slo
from tidegate.reports.bench_report import render_block
from tidegate.workloads.choice import WorkloadChoice, load_workload

EXAMPLES = """
Replay ten minutes of production chat traffic at twice its rate:

    tidegate bench --url U --trace sample:azure-conv --scale-rate 2

Poisson arrivals, scored as vllm bench does:

    tidegate bench --url U --poisson 4 --limit 99 --goodput ttft:500 tpot:50

Bursts of 20 requests/s for 10 s, then 2 requests/s for 30 s:

    tidegate bench --url U --bursts 20:10,2:30 --duration 120 --out run.jsonl

[bold]Exit codes[/bold]

0 all answered; 1 some failed, or --require-level was missed; 2 wrong usage;
130 interrupted (the report covers what finished).
"""

WORKLOAD = "What to send"
SERVER = "Where and how"
SENT = OptionGroup(
    WorkloadChoice,
    {
        "trace": Flag(f"Trace to replay: {common.FORMATS}.", "FILE"),
        **common.COLUMNS,
        **common.ARRIVALS,
        **common.LENGTHS,
        **common.TURN_GAP,
        **common.SCALE_RATE,
        **common.SCALE_TOKENS,
        **common.WINDOW,
        "seed": Flag("Of arrivals, lengths, prompts."),
    },
    WORKLOAD,
)
CLIENT = OptionGroup(
    BenchSettings,
    {
        "url": Flag("OpenAI-compatible endpoint."),
        "model": Flag("Model name; default: the one listed."),
        "api_key": Flag("Bearer token.", more={"envvar": "TIDEGATE_API_KEY"}),
        "chat": Flag("Use chat completions."),
        "prompt_form": Flag("Token ids, words, or ids where they are accepted."),
        "ignore_eos": Flag("Ask for exactly the answer length (vLLM).", name="--ignore-eos/--no-ignore-eos"),
        "temperature": Flag("Sampling temperature."),
        "timeout_s": Flag("Deadline of each request.", "S", "--timeout"),
        "slo_headers": Flag("Send the SLO with each request.", panel=SCORING),
    },
    SERVER,
)


CONTEXT = {"allow_extra_args": True}
"""Extra arguments are the second word of --goodput; ``_slo`` refuses any other."""


def run(
    context: typer.Context,
    choice: Annotated[WorkloadChoice, SENT],
    client: Annotated[BenchSettings, CLIENT],
    *,
    slo: Annotated[str, Flag("Targets to score by.", "ttft:MS,tpot:MS", panel=SCORING)] = "",
    goodput: Annotated[str, Flag("The same, vLLM's spelling.", "ttft:MS tpot:MS", panel=SCORING)] = "",
    scoring: Scoring,
    out: Annotated[Path | None, Flag("Result JSONL, written as it goes.", "FILE", panel=SCORING)] = None,
) -> None:
    """Offer load to an OpenAI-compatible endpoint and score every answer.

    The load is an open loop: requests leave on schedule and never wait for
    earlier answers. TTFT counts from the scheduled time. Attainment is over
    offered requests, so rejected and failed ones are misses.
    """
    if out is not None:
        claim_file(out, "bench")
    settings = replace(client, slo=_slo(slo, goodput, context.args), seed=choice.seed)
    records = load_workload(choice)
    try:
        done = bench(
            settings,
            records,
            workload=choice.describe(),
            level=scoring.level,
            out=out,
            console=Console(stderr=True),
        )
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    _show(done, scoring.as_json)
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    if done.report.failed or (scoring.require_level and not done.report.goodput.level_met):
        raise typer.Exit(FAILURE)


def _slo(slo: str, goodput: str, more: list[str]) -> Slo:
    """Read the targets from either spelling; ``more`` holds what follows ``--goodput ttft:500``."""
    if more and not goodput:
        raise typer.BadParameter(f"unexpected argument {more[0]!r}; every input is an option")
    if slo and goodput:
        raise typer.BadParameter("--slo and --goodput are two spellings of one thing; give one")
    text = slo or " ".join([goodput, *more])
    return Slo.parse(text) if text.strip() else Slo()


def _show(done: BenchRun, as_json: bool) -> None:
    if as_json:
        run_of = {"model": done.model, "prompt_form": done.prompt_form, "stopped_early": done.interrupted}
        typer.echo(json.dumps({**run_of, **done.report.to_json()}, indent=2))
        return
    typer.echo(render_block(done.report))
    if done.interrupted:
        typer.echo("Interrupted: the report covers the requests that ended before.", err=True)
