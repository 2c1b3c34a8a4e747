"""The options of the verbs that simulate, ``sim`` and ``compare``, and the objects they describe."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate.core.errors import ConfigError
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.costs.named_profile import load_profile
from tidegate.dataplane.replica import BLOCK_TOKENS, EngineSettings
from tidegate.experiments.setting import Fleet

DEFAULT_PROFILE = "h100_sxm/llama-3.1-8b"
DEFAULT_INSTANCES = 4
DEFAULT_TRACE = "sample:azure-conv"
LEAST_HEARTBEAT_MS = 1.0
"""Every beat is an event for every instance; less than this is no staleness to speak of."""

WORKLOAD = "Workload"
FLEET = "Simulated fleet"
ENGINE = "Engine and gateway"
SCORING = "Scoring and output"

Profiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GPU/MODEL[:N]",
        help=f"What an instance is: one that `tidegate profile --list` shows, or a file that `tidegate "
        f"profile` wrote ({DEFAULT_PROFILE}). Repeat with counts for a mixed fleet.",
        rich_help_panel=FLEET,
        show_default=False,
    ),
]
Instances = Annotated[
    int | None,
    typer.Option(
        metavar="N", help=f"Number of instances ({DEFAULT_INSTANCES}).", rich_help_panel=FLEET,
        show_default=False,
    ),
]  # fmt: skip
KvTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="KV capacity of an instance; default: the profile's.", rich_help_panel=FLEET
    ),
]
MixedContextRatio = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Cost of a decode's context beside a prefill chunk, over its cost in a pure decode step.",
        rich_help_panel=FLEET,
    ),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Token budget of a step (8192).", rich_help_panel=ENGINE),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Requests in a batch at most (1024).", rich_help_panel=ENGINE),
]
HostMs = Annotated[
    float, typer.Option(metavar="MS", help="Host time added to every step.", rich_help_panel=ENGINE)
]
FrontMs = Annotated[
    float,
    typer.Option(metavar="MS", help="From dispatch to the engine's queue, per leg.", rich_help_panel=ENGINE),
]
HeartbeatMs = Annotated[
    float,
    typer.Option(
        metavar="MS",
        help="How often engines report (1 or more); 0: the scheduler sees all at once.",
        rich_help_panel=ENGINE,
    ),
]
MostRequests = Annotated[
    int | None, typer.Option("--requests", metavar="N", help="The first N only.", rich_help_panel=WORKLOAD)
]
Duration = Annotated[
    float | None,
    typer.Option(metavar="S", help="Arrivals of the first S seconds only.", rich_help_panel=WORKLOAD),
]
Start = Annotated[
    float, typer.Option(metavar="S", help="Skip the first S seconds.", rich_help_panel=WORKLOAD)
]
ClosedLoop = Annotated[
    bool,
    typer.Option(
        "--closed-loop",
        help="A session's turn comes after the answer before it plus the client's pause.",
        rich_help_panel=WORKLOAD,
    ),
]
TurnGap = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        help="Seconds between a session's turns, for traces that have none.",
        rich_help_panel=WORKLOAD,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Processes; default: one per core.", rich_help_panel=SCORING, min=1),
]


def make_fleet(
    profiles: Sequence[str] | None,
    instances: int | None,
    *,
    kv_tokens: int | None = None,
    mixed_context_ratio: float | None = None,
    chunk_tokens: int | None = None,
    max_num_seqs: int | None = None,
    host_ms: float = 0.0,
) -> Fleet:
    """Return the fleet that the options describe. Raises ConfigError, with all problems at once."""
    default = EngineSettings()
    named = [_name_and_count(text) for text in profiles or [DEFAULT_PROFILE]]
    problems = [
        f"{flag} is at least {least}, got {value}"
        for flag, value, least in (
            ("--instances", instances, 1),
            ("--kv-tokens", kv_tokens, BLOCK_TOKENS),
            ("--chunk-tokens", chunk_tokens, 1),
            ("--max-num-seqs", max_num_seqs, 1),
        )
        if value is not None and value < least
    ]
    problems += [f"--profile {name}:0 has no instances" for name, count in named if count == 0]
    if problems:
        raise ConfigError(problems)
    if len(named) == 1 and named[0][1] is None:
        named = [(named[0][0], DEFAULT_INSTANCES if instances is None else instances)]
    elif any(count is None for _, count in named):
        problems.append("with several --profile, give each a count, as in --profile h100_sxm/llama-3.1-8b:4")
    elif instances is not None and instances != sum(count or 0 for _, count in named):
        problems.append(f"--instances {instances} is not the sum of the counts of --profile; drop it")
    groups: list[tuple[PackagedProfile, int]] = []
    for name, count in named:
        try:
            groups.append((_profile(name, mixed_context_ratio), count or 0))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    engine = EngineSettings(
        max_batch_tokens=default.max_batch_tokens if chunk_tokens is None else chunk_tokens,
        max_num_seqs=default.max_num_seqs if max_num_seqs is None else max_num_seqs,
        host_s=_milliseconds("--host-ms", host_ms),
    )
    return Fleet(tuple(groups), engine, kv_tokens)


def _profile(name: str, mixed_context_ratio: float | None) -> PackagedProfile:
    if mixed_context_ratio is None:
        return load_profile(name)
    if name.endswith(".json"):
        raise ConfigError(f"--mixed-context-ratio is for packaged profiles; {name} was measured")
    return packaged_profile(name, mixed_context_ratio=mixed_context_ratio)


def _name_and_count(text: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+):(\d+)", text)
    return (found[1], int(found[2])) if found else (text, None)


def _milliseconds(flag: str, value: float) -> float:
    """Return seconds. Raises ConfigError for a negative or infinite time."""
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{flag} is a time of 0 ms or more, got {value}")
    return value / 1000.0


def front_s(front_ms: float) -> float:
    """Return ``--front-ms`` in seconds."""
    return _milliseconds("--front-ms", front_ms)


def heartbeat_s(heartbeat_ms: float) -> float:
    """Return ``--heartbeat-ms`` in seconds."""
    if 0 < heartbeat_ms < LEAST_HEARTBEAT_MS:
        raise ConfigError(
            f"--heartbeat-ms is 0, where the scheduler sees all at once, or at least {LEAST_HEARTBEAT_MS:g}; "
            f"got {heartbeat_ms}"
        )
    return _milliseconds("--heartbeat-ms", heartbeat_ms)


def processes(jobs: int | None) -> int:
    """Return how many processes to work in: as asked, or one per core that this process may use."""
    if jobs is not None:
        return jobs
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warn(text: str) -> None:
    """Tell of what is suspicious, beside the result."""
    typer.echo(f"tidegate: warning: {text}", err=True)


def note(text: str) -> None:
    """Tell of what is good to know, beside the result."""
    typer.echo(f"tidegate: {text}", err=True)


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int, int | None, str], None]]:
    """Give ``show(done, total, text)``, which redraws a bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, text: None
        return
    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, total, text: progress.update(task, completed=done, total=total, description=text)
