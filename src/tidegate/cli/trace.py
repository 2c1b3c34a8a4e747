"""``tidegate trace``: look at traces, forecast them, make them from others, change their format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from tidegate.bound.phase_load import phase_load
from tidegate.cli import common_flags as common
from tidegate.cli.options import Flag, OptionGroup, epilog, expanded
from tidegate.cli.trace_files import Described, Saved, load, load_timed, show_traces, shown
from tidegate.cli.trace_forecast import FORECAST_EXAMPLES, forecast
from tidegate.cli.trace_plot import check_plot, plot_traces
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.named_profile import load_profile
from tidegate.workloads.choice import WorkloadChoice, load_workload, starts_sessions
from tidegate.workloads.generate import preset, preset_names
from tidegate.workloads.likes import LIKE_PREFIX, LIKES
from tidegate.workloads.reshape import (
    DEFAULT_JITTER_S,
    Spike,
    concatenate,
    drift_mix,
    parse_drift,
    replicate,
    reseeded,
    spikes,
    superpose,
)
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_statistics import WINDOW_S, statistics

EXAMPLES = """
    tidegate trace info sample:azure-conv

    tidegate trace make hard.jsonl --base sample:azure-conv --spike 4:300:60

    tidegate trace convert azure.csv azure.jsonl.gz
"""
INFO_EXAMPLES = """
    tidegate trace info sample:azure-conv

    tidegate trace info day.csv.gz --profile h100_sxm/llama-3.1-8b --plot day.png

    tidegate trace info a.jsonl b.csv.gz --json | jq '.traces[].ratio'
"""
CONVERT_EXAMPLES = """
    tidegate trace convert azure.csv azure.jsonl.gz

    tidegate trace convert journal.jsonl replay.csv

    tidegate trace convert log.csv log.jsonl --columns arrival_ms=ts,input=prompt,output=answer

    tidegate trace convert chat.jsonl chat.csv --format azure --lossy
"""
MAKE_EXAMPLES = """
An hour of generated chat with the lengths of a published trace:

    tidegate trace make chat.jsonl --poisson 5 --preset azure-conv --duration 3600

A day that follows a published rate curve, ten times smaller:

    tidegate trace make day.jsonl.gz --rate-curve curves.csv.gz:m-large --rps 2
      --preset chat-mlarge --duration 86400

Production traffic with a spike of four times the rate and a moving mix:

    tidegate trace make hard.csv --base sample:azure-conv --spike 4:300:60
      --drift linear:0.5:2:600

Agents' sessions, one start every five seconds, and code completion that nobody has seen:

    tidegate trace make agents.jsonl.gz --like agent --sessions-per-s .2

    tidegate trace make code.jsonl --like code --seed 7

Two services on one cluster:

    tidegate trace make mix.jsonl --base a.jsonl --add b.jsonl --seed 7
"""

ARRIVALS_PANEL = "Arrivals"
LENGTHS_PANEL = "Lengths"
CHANGES = "Changes, applied in this order"
OUTPUT = "Output"
SOURCES = f"{common.FORMATS}."
TARGET = typer.Argument(metavar="OUT", help="FILE.jsonl or FILE.csv, plain or .gz.")


def info(
    traces: Annotated[list[str], typer.Argument(metavar="FILE...", help=SOURCES)],
    window: Annotated[
        float, Flag("Window for the drift of the input:output ratio and the load.", "S")
    ] = WINDOW_S,
    profile: Annotated[str, Flag("Estimate each phase's load on this profile.", "GPU/MODEL")] = "",
    slo: Annotated[
        Slo | None, Flag("TPOT target of that estimate (50 ms).", "ttft:MS,tpot:MS", read=Slo.parse)
    ] = None,
    plot: Annotated[Path | None, Flag("Draw rate, mix and lengths (extra: plots).", "FILE.png|svg")] = None,
    columns: Annotated[str, common.COLUMNS["columns"]] = "",
    as_json: Annotated[bool, Flag("Print JSON.", name="--json")] = False,
) -> None:
    """Say what traces look like: rates, burstiness, lengths, drift, sessions, reuse.

    Without a trace at hand, try sample:azure-conv. The load is an
    estimate: prefill of each prompt alone less what an unbounded prefix cache
    holds, decode at the largest batch that keeps the TPOT and fits the KV.
    """
    if plot is not None:
        check_plot(plot, "trace info")
    if slo and not profile:
        raise ConfigError("--slo goes with --profile")
    described = [_describe(source, columns, window, profile, slo or Slo()) for source in traces]
    if as_json:
        typer.echo(json.dumps({"traces": [one.to_json() for one in described]}, indent=2, allow_nan=False))
    else:
        show_traces(described)
    if plot is not None:
        plot_traces(plot, described)
        typer.echo(f"wrote {plot}", err=True)


def _describe(source: str, columns: str, window_s: float, profile: str, slo: Slo) -> Described:
    timed, workload = load(source, columns)
    described = Described(source, workload, timed, statistics(workload, timed=timed, window_s=window_s))
    if not profile or not timed:
        return described
    packaged = load_profile(profile)
    capacity = packaged.kv_capacity_tokens
    load_by_window = phase_load(
        workload, packaged.profile, tpot_s=slo.tpot_s, kv_tokens=capacity, window_s=window_s
    )
    return replace(described, profile=packaged.name, load=tuple(load_by_window))


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help=SOURCES)],
    target: Annotated[Path, TARGET],
    saved: Saved,
    columns: Annotated[str, common.COLUMNS["columns"]] = "",
) -> None:
    """Change a trace's format.

    Mooncake JSONL and tidegate's CSV hold everything, sessions and prefixes
    included; Azure's form holds times and lengths, BurstGPT's the session, too.
    An answer of 0 tokens is written as 1.
    """
    workload = load_timed(source, columns)
    saved.save(target, workload)
    typer.echo(f"wrote {len(workload):,} requests to {target}")


def _spikes(texts: list[str]) -> tuple[Spike, ...]:
    return tuple(map(Spike.parse, texts))


@dataclass(frozen=True, slots=True)
class Changes:
    """What is done to the base trace, in this order."""

    panel: ClassVar[str] = CHANGES

    add: Annotated[list[str] | None, Flag("Superpose a trace; repeatable.", "FILE")] = None
    then: Annotated[list[str] | None, Flag("Append a trace; repeatable.", "FILE")] = None
    rate_factor: Annotated[float, Flag("Thin or copy on the same clock, by coin flips.", "X")] = 1.0
    jitter_s: Annotated[float, Flag("Longest delay of a copy.", "S", "--jitter")] = DEFAULT_JITTER_S
    spikes: Annotated[
        tuple[Spike, ...],
        Flag(
            "Rate times X for S seconds; repeatable.",
            "X:START:S[:PERIOD]",
            "--spike",
            given=list[str],
            read=_spikes,
        ),
    ] = ()
    drift: Annotated[
        str,
        Flag(
            "Move the input:output ratio: linear:FROM:TO:S or sine:FACTOR:PERIOD; rate and tokens stay.",
            "DRIFT",
            panel=CHANGES,
        ),
    ] = ""
    reseed: Annotated[int, Flag("Permute requests within minutes; 0 does not.", "N")] = 0

    def apply(self, base: Workload, seed: int) -> Workload:
        """Return the changed trace, random with ``seed``. Raises ConfigError or TraceError."""
        # Every random step gets a seed of its own: copies of copies must not share names.
        seeds = count(seed * 1000 + 1)
        workload = superpose(base, *map(load_timed, self.add)) if self.add else base
        if self.then:
            workload = concatenate(workload, *map(load_timed, self.then))
        if self.rate_factor != 1.0:
            workload = replicate(workload, self.rate_factor, seed=next(seeds), jitter_s=self.jitter_s)
        for spike in self.spikes:
            workload = spikes(workload, spike, seed=next(seeds), jitter_s=self.jitter_s)
        if self.drift:
            workload = drift_mix(workload, parse_drift(self.drift))
        return reseeded(workload, self.reseed)


def _list_presets(wanted: bool) -> None:
    if wanted:
        for name in preset_names():
            typer.echo(preset(name).description)
        raise typer.Exit


def _list_likes(wanted: bool) -> None:
    if wanted:
        for name, like in LIKES.items():
            rounds = f", {like.rounds:g} rounds" if like.rounds > 1 else ""
            typer.echo(
                f"{name}: {like.about}; on average {like.new.mean:g} new prompt tokens, "
                f"{like.output.mean:g} answered{rounds}"
            )
        raise typer.Exit


def _based(choice: WorkloadChoice, like: str) -> WorkloadChoice:
    """Return the choice whose base is made like ``like``, with the choice's seed; its sessions start once a
    second where nothing else is said."""
    if not like:
        return choice
    if choice.trace:
        raise ConfigError("--base and --like both say what to start from; give one")
    choice = replace(choice, trace=f"{LIKE_PREFIX}{like}::{choice.seed}")
    without = starts_sessions(choice) and choice.gamma is None and not choice.bursts and not choice.rate_curve
    return replace(choice, sessions_per_s=1.0) if without else choice


def _on(panel: str, flags: Mapping[str, Flag]) -> dict[str, Flag]:
    return {name: flag.placed(panel) for name, flag in flags.items()}


MADE = OptionGroup(
    WorkloadChoice,
    {
        **_on(
            ARRIVALS_PANEL,
            {
                "trace": Flag("Trace to start from; see trace info.", "FILE", "--base"),
                **common.COLUMNS,
                **common.ARRIVALS,
                "cv": Flag("Coefficient of variation of --gamma or --rate-curve (1).", "X"),
                "rate_curve": Flag(
                    "Rates over time: t_s and a column NAME, or rows of workload NAME.", "FILE:NAME"
                ),
                "rate_rps": Flag("Mean over the curve.", "RPS", "--rps"),
                "sessions_per_s": Flag("Poisson starts of --base's sessions.", "X"),
                **common.TURN_GAP,
            },
        ),
        **_on(LENGTHS_PANEL, {"preset": Flag("Lengths of a published trace.", "NAME"), **common.LENGTHS}),
        **_on(CHANGES, {**common.SCALE_RATE, **common.SCALE_TOKENS, **common.WINDOW}),
        "seed": Flag("Of all else that is random.", panel=OUTPUT, more={"min": 0}),
    },
)


def make(
    target: Annotated[Path, TARGET],
    choice: Annotated[WorkloadChoice, MADE],
    changes: Changes,
    saved: Annotated[Saved, OptionGroup(Saved, panel=OUTPUT)],
    like: Annotated[
        str,
        Flag(
            "Start from traffic made by the statistics of a kind of application.",
            "NAME",
            panel=ARRIVALS_PANEL,
        ),
    ] = "",
    likes: Annotated[
        bool,
        Flag("List those kinds.", panel=ARRIVALS_PANEL, more={"callback": _list_likes, "is_eager": True}),
    ] = False,
    presets: Annotated[
        bool,
        Flag(
            "List the presets with their sources.",
            panel=LENGTHS_PANEL,
            more={"callback": _list_presets, "is_eager": True},
        ),
    ] = False,
    as_json: Annotated[bool, Flag("Print the summary as JSON.", name="--json", panel=OUTPUT)] = False,
) -> None:
    """Make a trace from a generator, or from traces and changes to them.

    The same options and seed make the same file, byte for byte.
    """
    if target.exists() and not saved.force:
        raise ConfigError(f"{target} exists; choose another name or add --force")
    with shown("making the trace"):
        base = load_workload(_based(choice, like), trace_flag="--base")
        workload = changes.apply(base, choice.seed)
    if not workload:
        raise ConfigError("no request is left; look at --rate-factor, --spike and --duration")
    saved.save(target, workload)
    made = Described(str(target), workload, True, statistics(workload, timed=True))
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2, allow_nan=False))
    else:
        show_traces([made])


verbs = typer.Typer(no_args_is_help=True, epilog=epilog(EXAMPLES))
verbs.command("info", epilog=epilog(INFO_EXAMPLES))(expanded(info))
verbs.command("forecast", epilog=epilog(FORECAST_EXAMPLES))(expanded(forecast))
verbs.command("make", epilog=epilog(MAKE_EXAMPLES))(expanded(make))
verbs.command("convert", epilog=epilog(CONVERT_EXAMPLES))(expanded(convert))
