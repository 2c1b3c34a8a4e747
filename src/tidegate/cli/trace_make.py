"""``tidegate trace make``: a trace from a generator or from other traces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.cli.options import Flag, OptionGroup
from tidegate.cli.tables import show_traces
from tidegate.cli.trace_files import Described, Saved, load_timed, shown
from tidegate.cli.workload_flags import (
    ARRIVALS,
    LENGTHS,
    SCALE_RATE,
    SCALE_TOKENS,
    TURN_GAP,
    WINDOW,
)
from tidegate.core.errors import ConfigError
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.generate import preset, preset_names
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
from tidegate.workloads.trace_statistics import statistics

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

ARRIVALS_PANEL = "Arrivals"
LENGTHS_PANEL = "Lengths"
CHANGES = "Changes, applied in this order"
OUTPUT = "Output"


def _spikes(texts: list[str]) -> tuple[Spike, ...]:
    return tuple(map(Spike.parse, texts))


@dataclass(frozen=True, slots=True)
class Changes:
    """What is done to the base trace, in this order."""

    add: Annotated[list[str] | None, Flag("Superpose a trace; repeatable.", "FILE", panel=CHANGES)] = None
    then: Annotated[list[str] | None, Flag("Append a trace; repeatable.", "FILE", panel=CHANGES)] = None
    rate_factor: Annotated[
        float, Flag("Thin or copy on the same clock, by coin flips.", "X", panel=CHANGES)
    ] = 1.0
    jitter_s: Annotated[float, Flag("Longest delay of a copy.", "S", "--jitter", CHANGES)] = DEFAULT_JITTER_S
    spikes: Annotated[
        tuple[Spike, ...],
        Flag(
            "Rate times X for S seconds; repeatable.",
            "X:START:S[:PERIOD]",
            "--spike",
            CHANGES,
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
    reseed: Annotated[int, Flag("Permute requests within minutes; 0 does not.", "N", panel=CHANGES)] = 0

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


def _on(panel: str, flags: Mapping[str, Flag]) -> dict[str, Flag]:
    return {name: flag.placed(panel) for name, flag in flags.items()}


MADE = OptionGroup(
    WorkloadChoice,
    {
        **_on(
            ARRIVALS_PANEL,
            {
                "trace": Flag("Trace to start from; see trace info.", "FILE", "--base"),
                **ARRIVALS,
                "cv": Flag("Coefficient of variation of --gamma or --rate-curve (1).", "X"),
                "rate_curve": Flag(
                    "Rates over time: t_s and a column NAME, or rows of workload NAME.", "FILE:NAME"
                ),
                "rate_rps": Flag("Mean over the curve.", "RPS", "--rps"),
                "sessions_per_s": Flag("Poisson starts of --base's sessions.", "X"),
                **TURN_GAP,
            },
        ),
        **_on(LENGTHS_PANEL, {"preset": Flag("Lengths of a published trace.", "NAME"), **LENGTHS}),
        **_on(CHANGES, {**SCALE_RATE, **SCALE_TOKENS, **WINDOW}),
        "seed": Flag("Of all else that is random.", panel=OUTPUT, more={"min": 0}),
    },
)


def make(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="FILE.jsonl or FILE.csv, plain or .gz.")],
    choice: Annotated[WorkloadChoice, MADE],
    changes: Changes,
    saved: Annotated[Saved, OptionGroup(Saved, panel=OUTPUT)],
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
        workload = changes.apply(load_workload(choice, trace_flag="--base"), choice.seed)
    if not workload:
        raise ConfigError("no request is left; look at --rate-factor, --spike and --duration")
    saved.save(target, workload)
    made = Described(str(target), statistics(workload, timed=True))
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2, allow_nan=False))
    else:
        show_traces([made], Console())
