"""``tidegate bench``: offer load to an endpoint and score the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

import typer

from tidegate.bench import BenchRun, BenchSettings, Load, Watch, bench, run_sweep
from tidegate.cli import common_flags as common
from tidegate.cli.common_flags import SCORING, Scoring
from tidegate.cli.options import Flag, OptionGroup
from tidegate.cli.outputs import claim_file
from tidegate.cli.terminal import FAILURE, INTERRUPTED, note, note_classes, share_bar
from tidegate.core.slo import Slo
from tidegate.reports.bench_report import BenchReport, render_block
from tidegate.reports.sweep_report import Sweep, render_sweep
from tidegate.workloads.choice import WorkloadChoice
from tidegate.workloads.slo_classes import targets_by_class

T = TypeVar("T", int, float)

EXAMPLES = """
Replay ten minutes of production chat traffic at twice its rate:

    tidegate bench --url U --trace sample:azure-conv --scale-rate 2

Poisson arrivals, scored as vllm bench does:

    tidegate bench --url U --poisson 4 --limit 99 --goodput ttft:500 tpot:50

Which rate, and how many users at a time, meet the targets; the same command goes on:

    tidegate bench --url U --rate 1,2,4,8 --limit 200 --out rates

    tidegate bench --url U --concurrency 1,4,16 --limit 200 --out users

    tidegate report rates --out rates.html

Agents' sessions, two starts a second, their turns as the answers allow:

    tidegate bench --url U --trace like:agent --poisson 2 --sessions

Bursts of 20 requests/s for 10 s, then 2 requests/s for 30 s:

    tidegate bench --url U --bursts 20:10,2:30 --duration 120 --out run.jsonl

[bold]Exit codes[/bold]

0 all answered; 1 some failed, or --require-level was missed; 2 wrong usage;
130 interrupted (the report covers what finished; a sweep keeps its finished loads).
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
        "sessions": Flag(
            "Play sessions: a turn waits for the answer before it, repeats it, and comes after the client's "
            "pause.",
            panel=WORKLOAD,
        ),
        "slo_headers": Flag("Send the SLO with each request.", panel=SCORING),
    },
    SERVER,
)


def _numbers(kind: type[T], text: str) -> tuple[T, ...]:
    try:
        return tuple(kind(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"expected {'whole ' if kind is int else ''}numbers with commas between") from None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How densely requests are sent: None as the workload says, several values as a sweep."""

    panel: ClassVar[str] = WORKLOAD

    rates_rps: Annotated[
        tuple[float, ...],
        Flag(
            "Scale the trace's time to this rate, or send as a Poisson process of it; several: one after the "
            "other.",
            "RPS,..",
            "--rate",
            shown=False,
            read=partial(_numbers, float),
        ),
    ] = ()
    concurrency: Annotated[
        tuple[int, ...],
        Flag(
            "A closed loop of N users; several: one after the other.",
            "N,..",
            shown=False,
            read=partial(_numbers, int),
        ),
    ] = ()

    def of(self, choice: WorkloadChoice, settings: BenchSettings) -> list[Load]:
        """Return the loads to offer. Raises ConfigError for what does not go together."""
        if not self.rates_rps and not self.concurrency:
            return [Load(choice, settings)]
        rates: Sequence[float | None] = self.rates_rps or (None,)
        users: Sequence[int | None] = self.concurrency or (None,)
        return [Load(choice, replace(settings, concurrency=n), rate) for rate in rates for n in users]


CONTEXT = {"allow_extra_args": True}
"""Extra arguments are the second word of --goodput; ``_slo`` refuses any other."""


def run(
    context: typer.Context,
    choice: Annotated[WorkloadChoice, SENT],
    client: Annotated[BenchSettings, CLIENT],
    *,
    slo: Annotated[str, Flag("Targets to score by.", "ttft:MS,tpot:MS", panel=SCORING)] = "",
    goodput: Annotated[str, Flag("The same, vLLM's spelling.", "ttft:MS tpot:MS", panel=SCORING)] = "",
    slo_class: Annotated[dict[str, Slo] | None, replace(common.SLO_CLASS, panel=SCORING)] = None,
    load: LoadOptions,
    scoring: Scoring,
    out: Annotated[
        Path | None,
        Flag("Result JSONL, written as it goes; of several loads, a folder.", "FILE|DIR", panel=SCORING),
    ] = None,
) -> None:
    """Offer load to an OpenAI-compatible endpoint and score every answer.

    The load is an open loop: requests leave on schedule and never wait for
    earlier answers. TTFT counts from the scheduled time. With --concurrency it
    is a closed loop: a user's next request leaves when the last one has ended.
    With --sessions the turns of a session wait for their answers, as clients do.
    Attainment is over offered requests, so rejected and failed ones are misses.
    """
    settings = replace(client, slo=_slo(slo, goodput, context.args), seed=choice.seed)
    loads = load.of(choice, settings)
    records = loads[0].records()
    classes = targets_by_class([records], slo_class or {}, settings.slo)
    note_classes(classes, slo_class or {}, settings.slo)
    loads = [replace(one, settings=replace(one.settings, slo_classes=classes)) for one in loads]
    if len(loads) > 1:
        _sweep(loads, scoring, out)
        return
    (one,) = loads
    if out is not None:
        claim_file(out, "bench")
    try:
        with _watched("requests", len(records)) as watch:
            done = bench(one.settings, records, facts=one.facts, level=scoring.level, out=out, watch=watch)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    _show(done, scoring.as_json)
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    if done.report.failed or (scoring.require_level and not done.report.goodput.level_met):
        raise typer.Exit(FAILURE)


@contextmanager
def _watched(what: str, total: int) -> Iterator[Watch]:
    """Show how many requests have ended, while they are offered."""
    with share_bar() as advance:

        def watch(done: int, more: str) -> None:
            advance(done / total if total else 1.0, f"{done:,} of {total:,} {what}, {more}")

        yield watch


def _sweep(loads: Sequence[Load], scoring: Scoring, out: Path | None) -> None:
    """Offer several loads, and show a row of each that ended."""
    reports: list[BenchReport] = []
    interrupted = False
    if out is not None and any(known := [load for load in loads if (out / load.file).exists()]):
        note(f"{out} has {', '.join(load.name for load in known)}; what is there is not offered again")
    try:
        for report in run_sweep(loads, level=scoring.level, folder=out, watching=_watched):
            reports.append(report)
    except KeyboardInterrupt:
        interrupted = True
        kept = "nothing is kept without --out" if out is None else f"{out} keeps what is finished"
        note(f"interrupted; {kept}" + ("" if out is None else ", and the same command goes on from there"))
    if reports:
        sweep = Sweep.of(reports)
        typer.echo(json.dumps(sweep.to_json(), indent=2) if scoring.as_json else render_sweep(sweep))
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    missed = scoring.require_level and not all(report.goodput.level_met for report in reports)
    if missed or any(report.failed for report in reports):
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
