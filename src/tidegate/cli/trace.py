"""``tidegate trace``: look at traces, make them, and change their format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidegate.bound.phase_load import phase_load
from tidegate.cli import trace_make
from tidegate.cli.common_flags import FORMATS
from tidegate.cli.options import Flag, expanded
from tidegate.cli.trace_files import Described, Loaded, Saved, load, load_timed, show_traces
from tidegate.cli.trace_plot import check_plot, plot_traces
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.named_profile import load_profile
from tidegate.workloads.trace_statistics import WINDOW_S, statistics

EPILOG = """
[bold]Examples[/bold]

    tidegate trace info sample:azure-conv

    tidegate trace make hard.jsonl --base sample:azure-conv --spike 4:300:60

    tidegate trace convert azure.csv azure.jsonl.gz
"""
INFO_EPILOG = """
[bold]Examples[/bold]

    tidegate trace info sample:azure-conv

    tidegate trace info day.csv.gz --profile h100_sxm/llama-3.1-8b --plot day.png

    tidegate trace info a.jsonl b.csv.gz --json | jq '.traces[].ratio'
"""
CONVERT_EPILOG = """
[bold]Examples[/bold]

    tidegate trace convert azure.csv azure.jsonl.gz

    tidegate trace convert journal.jsonl replay.csv

    tidegate trace convert chat.jsonl chat.csv --format azure --lossy
"""
SOURCES = f"{FORMATS}."


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
    as_json: Annotated[bool, Flag("Print JSON.", name="--json")] = False,
) -> None:
    """Say what traces look like: rates, burstiness, lengths, drift, sessions, reuse.

    Without a trace at hand, try sample:azure-conv. The load is an
    estimate: prefill of each prompt alone less what an unbounded prefix cache
    holds, decode at the largest batch that keeps the TPOT and fits the KV.
    """
    if plot is not None:
        check_plot(plot)
    if slo and not profile:
        raise ConfigError("--slo goes with --profile")
    loaded = [load(source) for source in traces]
    described = [_describe(one, window, profile, slo or Slo()) for one in loaded]
    if as_json:
        typer.echo(json.dumps({"traces": [one.to_json() for one in described]}, indent=2, allow_nan=False))
    else:
        show_traces(described, Console())
    if plot is not None:
        plot_traces(plot, loaded, described)
        typer.echo(f"wrote {plot}", err=True)


def _describe(one: Loaded, window_s: float, profile: str, slo: Slo) -> Described:
    about = statistics(one.workload, timed=one.timed, window_s=window_s)
    if not profile or not one.timed:
        return Described(one.name, about)
    packaged = load_profile(profile)
    load_by_window = phase_load(
        one.workload,
        packaged.profile,
        tpot_s=slo.tpot_s,
        kv_tokens=packaged.kv_capacity_tokens,
        window_s=window_s,
    )
    return Described(one.name, about, packaged.name, tuple(load_by_window))


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help=SOURCES)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="FILE.jsonl or FILE.csv, plain or .gz.")],
    saved: Saved,
) -> None:
    """Change a trace's format.

    Mooncake JSONL and tidegate's CSV hold everything, sessions and prefixes
    included; Azure's form holds times and lengths, BurstGPT's the session, too.
    An answer of 0 tokens is written as 1.
    """
    workload = load_timed(source)
    saved.save(target, workload)
    typer.echo(f"wrote {len(workload):,} requests to {target}")


verbs = typer.Typer(no_args_is_help=True, epilog=EPILOG)
verbs.command("info", epilog=INFO_EPILOG)(expanded(info))
verbs.command("make", epilog=trace_make.EPILOG)(expanded(trace_make.make))
verbs.command("convert", epilog=CONVERT_EPILOG)(expanded(convert))
