"""``tidegate trace make``: a trace from a generator or from other traces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.cli.trace_files import load_timed, save, shown
from tidegate.cli.trace_show import Described, show
from tidegate.core.errors import ConfigError
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.combine import concatenate, superpose
from tidegate.workloads.mix import drift_mix, parse_drift
from tidegate.workloads.presets import preset, preset_names
from tidegate.workloads.reseed import reseeded
from tidegate.workloads.reshape import DEFAULT_JITTER_S, Spike, replicate, spikes
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_statistics import statistics
from tidegate.workloads.writers import WriteFormat

EPILOG = """
[bold]Examples[/bold]

An hour of generated chat with the lengths of a published trace:

    tidegate trace make chat.jsonl --poisson 5 --preset azure-conv --duration 3600

A day that follows a published rate curve, ten times smaller:

    tidegate trace make day.jsonl.gz --rate-curve curves.csv.gz:m-large --rps 2
      --preset chat-mlarge --duration 86400

Production traffic with a spike of four times the rate and a moving mix:

    tidegate trace make hard.csv --base sample:azure-conv --spike 4:300:60
      --drift linear:0.5:2:600

Agents' sessions, one start every five seconds:

    tidegate trace make agents.jsonl.gz --base sessions.csv.gz --sessions-per-s .2

Two services on one cluster:

    tidegate trace make mix.jsonl --base a.jsonl --add b.jsonl --seed 7
"""

ARRIVALS = "Arrivals"
LENGTHS = "Lengths"
CHANGES = "Changes, applied in this order"
OUTPUT = "Output"


@dataclass(frozen=True, slots=True)
class Changes:
    """What is done to the base trace, in this order."""

    add: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    rate_factor: float = 1.0
    jitter_s: float = DEFAULT_JITTER_S
    spikes: tuple[Spike, ...] = ()
    drift: str = ""
    reseed: int = 0
    seed: int = 0

    def apply(self, base: Workload) -> Workload:
        """Return the changed trace; raises ConfigError or TraceError."""
        # Every random step gets a seed of its own: copies of copies must not share names.
        seeds = count(self.seed * 1000 + 1)
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
            typer.echo(preset(name).describe())
        raise typer.Exit


def make(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="FILE.jsonl or FILE.csv, plain or .gz.")],
    base: Annotated[
        str,
        typer.Option(metavar="FILE", help="Trace to start from; see trace info.", rich_help_panel=ARRIVALS),
    ] = "",
    poisson: Annotated[
        float | None, typer.Option(metavar="RPS", help="Poisson arrivals.", rich_help_panel=ARRIVALS)
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(metavar="RPS", help="Gamma gaps; see --cv.", rich_help_panel=ARRIVALS)
    ] = None,
    cv: Annotated[
        float | None,
        typer.Option(metavar="X", help="CV of --gamma or --rate-curve (1).", rich_help_panel=ARRIVALS),
    ] = None,
    bursts: Annotated[
        str, typer.Option(metavar="RPS:S,..", help="Phases in a cycle.", rich_help_panel=ARRIVALS)
    ] = "",
    rate_curve: Annotated[
        str,
        typer.Option(
            metavar="FILE:NAME",
            help="Rates over time: t_s and a column NAME, or rows of workload NAME.",
            rich_help_panel=ARRIVALS,
        ),
    ] = "",
    rps: Annotated[
        float | None, typer.Option(metavar="RPS", help="Mean over the curve.", rich_help_panel=ARRIVALS)
    ] = None,
    sessions_per_s: Annotated[
        float | None,
        typer.Option(metavar="X", help="Poisson starts of --base's sessions.", rich_help_panel=ARRIVALS),
    ] = None,
    turn_gap: Annotated[
        float | None,
        typer.Option(metavar="S", help="Pause between turns of a session.", rich_help_panel=ARRIVALS),
    ] = None,
    preset_name: Annotated[
        str,
        typer.Option(
            "--preset", metavar="NAME", help="Lengths of a published trace.", rich_help_panel=LENGTHS
        ),
    ] = "",
    presets: Annotated[
        bool,
        typer.Option(
            "--presets",
            callback=_list_presets,
            is_eager=True,
            help="List them with their sources.",
            rich_help_panel=LENGTHS,
        ),
    ] = False,
    input_tokens: Annotated[
        str,
        typer.Option(
            metavar="N|DIST",
            help="N, uniform:LOW:HIGH or lognormal:MEAN:CV (512).",
            rich_help_panel=LENGTHS,
        ),
    ] = "",
    output_tokens: Annotated[
        str, typer.Option(metavar="N|DIST", help="Likewise (128).", rich_help_panel=LENGTHS)
    ] = "",
    lengths_from: Annotated[
        str, typer.Option(metavar="FILE", help="Draw pairs from a trace.", rich_help_panel=LENGTHS)
    ] = "",
    scale_rate: Annotated[
        float,
        typer.Option(metavar="X", help="Compress time: bursts get denser, too.", rich_help_panel=CHANGES),
    ] = 1.0,
    scale_tokens: Annotated[
        float, typer.Option(metavar="X", help="Multiply lengths.", rich_help_panel=CHANGES)
    ] = 1.0,
    start: Annotated[
        float, typer.Option(metavar="S", help="Skip the first S seconds.", rich_help_panel=CHANGES)
    ] = 0.0,
    duration: Annotated[
        float | None, typer.Option(metavar="S", help="Keep S seconds.", rich_help_panel=CHANGES)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Keep N requests.", rich_help_panel=CHANGES)
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Superpose a trace; repeatable.", rich_help_panel=CHANGES),
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Append a trace; repeatable.", rich_help_panel=CHANGES),
    ] = None,
    rate_factor: Annotated[
        float,
        typer.Option(
            metavar="X", help="Thin or copy on the same clock, by coin flips.", rich_help_panel=CHANGES
        ),
    ] = 1.0,
    jitter: Annotated[
        float,
        typer.Option(metavar="S", help="Longest delay of a copy.", rich_help_panel=CHANGES),
    ] = DEFAULT_JITTER_S,
    spike: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X:START:S[:PERIOD]",
            help="Rate times X for S seconds; repeatable.",
            rich_help_panel=CHANGES,
        ),
    ] = None,
    drift: Annotated[
        str,
        typer.Option(
            metavar="DRIFT",
            help="Move the input:output ratio: linear:FROM:TO:S or sine:FACTOR:PERIOD; rate and tokens stay.",
            rich_help_panel=CHANGES,
        ),
    ] = "",
    reseed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Permute requests within minutes; 0 does not.", rich_help_panel=CHANGES
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all else that is random.", rich_help_panel=OUTPUT)] = 0,
    form: Annotated[
        WriteFormat | None, typer.Option("--format", help="Default: by suffix.", rich_help_panel=OUTPUT)
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Leave out what the format cannot hold.", rich_help_panel=OUTPUT)
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make a trace from a generator, or from traces and changes to them.

    The same options and seed make the same file, byte for byte.
    """
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; choose another name or add --force")
    choice = WorkloadChoice(
        trace=base,
        poisson=poisson,
        gamma=gamma,
        cv=cv,
        bursts=bursts,
        rate_curve=rate_curve,
        rate_rps=rps,
        sessions_per_s=sessions_per_s,
        preset=preset_name,
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
    changes = Changes(
        add=tuple(add or ()),
        then=tuple(then or ()),
        rate_factor=rate_factor,
        jitter_s=jitter,
        spikes=tuple(map(Spike.parse, spike or ())),
        drift=drift,
        reseed=reseed,
        seed=seed,
    )
    with shown("making the trace"):
        workload = changes.apply(load_workload(choice, trace_flag="--base"))
    if not workload:
        raise ConfigError("no request is left; look at --rate-factor, --spike and --duration")
    save(target, workload, form, force=force, lossy=lossy)
    made = Described(str(target), statistics(workload, timed=True))
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2, allow_nan=False))
    else:
        show([made], Console())
