"""``tidegate bench``: offer load to an endpoint and score the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.bench import BenchRun, BenchSettings, PromptForm, bench
from tidegate.cli.process import FAILURE, INTERRUPTED
from tidegate.cli.scoring import SCORING, Json, Level, RequireLevel
from tidegate.core.slo import Slo
from tidegate.measure.attainment import DEFAULT_LEVEL
from tidegate.reports.bench_report import render_block
from tidegate.workloads.choice import WorkloadChoice, load_workload

EPILOG = """
[bold]Examples[/bold]

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


def register(app: typer.Typer) -> None:
    """Add the ``bench`` command."""
    # Extra arguments are the second word of --goodput; _slo refuses any other.
    extra = {"allow_extra_args": True}
    app.command("bench", epilog=EPILOG, rich_help_panel="Measure", context_settings=extra)(run)


def run(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint.", rich_help_panel=SERVER)],
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Trace to replay: Mooncake JSONL, Azure, BurstGPT or tidegate CSV, a journal, a bench "
            "result, plain or gzipped; or sample:azure-conv.",
            rich_help_panel=WORKLOAD,
        ),
    ] = "",
    poisson: Annotated[
        float | None, typer.Option(metavar="RPS", help="Poisson arrivals.", rich_help_panel=WORKLOAD)
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(metavar="RPS", help="Gamma-distributed gaps; see --cv.", rich_help_panel=WORKLOAD),
    ] = None,
    cv: Annotated[
        float | None,
        typer.Option(metavar="X", help="Coefficient of variation of --gamma (1).", rich_help_panel=WORKLOAD),
    ] = None,
    bursts: Annotated[
        str,
        typer.Option(
            metavar="RPS:S,..", help="Phases of Poisson traffic in a cycle.", rich_help_panel=WORKLOAD
        ),
    ] = "",
    input_tokens: Annotated[
        str,
        typer.Option(
            metavar="N|DIST",
            help="Prompt length: N, uniform:LOW:HIGH or lognormal:MEAN:CV (512).",
            rich_help_panel=WORKLOAD,
        ),
    ] = "",
    output_tokens: Annotated[
        str,
        typer.Option(metavar="N|DIST", help="Answer length, likewise (128).", rich_help_panel=WORKLOAD),
    ] = "",
    lengths_from: Annotated[
        str,
        typer.Option(metavar="FILE", help="Draw lengths from this trace instead.", rich_help_panel=WORKLOAD),
    ] = "",
    turn_gap: Annotated[
        float | None,
        typer.Option(metavar="S", help="Seconds between turns of a session.", rich_help_panel=WORKLOAD),
    ] = None,
    scale_rate: Annotated[
        float, typer.Option(metavar="X", help="Divide times by X.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    scale_tokens: Annotated[
        float, typer.Option(metavar="X", help="Multiply lengths by X.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    start: Annotated[
        float, typer.Option(metavar="S", help="Skip the first S seconds.", rich_help_panel=WORKLOAD)
    ] = 0.0,
    duration: Annotated[
        float | None, typer.Option(metavar="S", help="Send for S seconds.", rich_help_panel=WORKLOAD)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Send at most N requests.", rich_help_panel=WORKLOAD)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths, prompts.", rich_help_panel=WORKLOAD)] = 0,
    model: Annotated[
        str, typer.Option(help="Model name; default: the one listed.", rich_help_panel=SERVER)
    ] = "",
    api_key: Annotated[
        str, typer.Option(envvar="TIDEGATE_API_KEY", help="Bearer token.", rich_help_panel=SERVER)
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Use chat completions.", rich_help_panel=SERVER)
    ] = False,
    prompt_form: Annotated[
        PromptForm,
        typer.Option(help="Token ids, words, or ids where they are accepted.", rich_help_panel=SERVER),
    ] = PromptForm.AUTO,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for exactly the answer length (vLLM).", rich_help_panel=SERVER)
    ] = True,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.", rich_help_panel=SERVER)] = 0.0,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Deadline of each request.", rich_help_panel=SERVER)
    ] = 600.0,
    slo: Annotated[
        str, typer.Option(metavar="ttft:MS,tpot:MS", help="Targets to score by.", rich_help_panel=SCORING)
    ] = "",
    goodput: Annotated[
        str,
        typer.Option(metavar="ttft:MS tpot:MS", help="The same, vLLM's spelling.", rich_help_panel=SCORING),
    ] = "",
    slo_headers: Annotated[
        bool, typer.Option("--slo-headers", help="Send the SLO with each request.", rich_help_panel=SCORING)
    ] = False,
    level: Level = DEFAULT_LEVEL,
    require_level: RequireLevel = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Result JSONL, written as it goes.", rich_help_panel=SCORING),
    ] = None,
    as_json: Json = False,
) -> None:
    """Offer load to an OpenAI-compatible endpoint and score every answer.

    The load is an open loop: requests leave on schedule and never wait for
    earlier answers. TTFT counts from the scheduled time. Attainment is over
    offered requests, so rejected and failed ones are misses.
    """
    choice = WorkloadChoice(
        trace=trace,
        poisson=poisson,
        gamma=gamma,
        cv=cv,
        bursts=bursts,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        lengths_from=lengths_from,
        scale_rate=scale_rate,
        scale_tokens=scale_tokens,
        start_s=start,
        duration_s=duration,
        limit=limit,
        turn_gap_s=turn_gap,
        seed=seed,
    )
    settings = BenchSettings(
        url=url,
        model=model,
        api_key=api_key,
        chat=chat,
        prompt_form=prompt_form,
        ignore_eos=ignore_eos,
        temperature=temperature,
        timeout_s=timeout,
        slo=_slo(slo, goodput, context.args),
        slo_headers=slo_headers,
        seed=seed,
    )
    records = load_workload(choice)
    try:
        done = bench(
            settings,
            records,
            workload=choice.describe(),
            level=level,
            out=out,
            console=Console(stderr=True),
        )
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    _show(done, as_json)
    raise typer.Exit(_exit_code(done, require_level))


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


def _exit_code(done: BenchRun, require_level: bool) -> int:
    if done.interrupted:
        return INTERRUPTED
    missed = require_level and not done.report.goodput.level_met
    return FAILURE if done.report.failed or missed else 0
