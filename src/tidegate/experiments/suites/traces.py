"""The suite ``traces``: every system on every trace and generator, on three profiles and two sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tidegate.core.defaults import DEFAULT_SYSTEM
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.suites.rows import HOST, LINKS, Experiment
from tidegate.workloads.choice import WorkloadChoice
from tidegate.workloads.likes import LIKE_PREFIX, LIKES
from tidegate.workloads.source import SAMPLE_PREFIX, sample_names

SYSTEMS = (
    DEFAULT_SYSTEM, "arrow-lending", "arrow", "ares", "ares-slo", "dopd", "ampd", "ampd-cost",
    "static:best", "static:even", "colocated:tuned", "colocated:slack",
)  # fmt: skip
"""The subject first, then what it is made of and each paper's, then what is found in hindsight."""
SIZES = {8: 5000, 64: 20_000}
"""Requests of a row by its number of instances."""
QUICK_REQUESTS = 2000
LONG_TTFT = 4.0
"""Times the usual target of the first token, where prompts are long."""
LONG = ("long", "mooncake-conv", "gaia", "agent")
BLOCK_TOKENS = 64
"""Prefix blocks of rows with sessions: histories in smaller ones take most of a simulation's time."""
ROUND_OF_A_SESSION = ("agent", "toolbench", "gaia", "hotpotqa", "dureader", "tau-airline")
FLEETS = {
    "h100_sxm/llama-3.1-8b": Slo(0.5, 0.05),
    "h100_sxm/llama-3.1-70b/tp4": Slo(1.0, 0.05),
    "rtx_4090/llama-3.1-8b": Slo(2.0, 0.06),
}
"""Targets by profile: fast prefills; a large model; little KV."""
TIGHT_TPOT_S = 0.02
QUICK = ("code", "long", "reasoning")
"""Workloads of which few requests make a run that lasts."""
NO_TRACES = ("README", "rate_curves", "lengths_")
"""Parts of names of files in a folder of traces that are none."""


def rows(traces_from: Path | None, most_requests: int | None = None) -> list[Experiment]:
    """Return the suite's rows, those of a folder's traces too, each of ``most_requests`` at most; rows with
    sessions keep theirs, for a fleet holds many of them at a time."""
    found: list[Experiment] = []
    for name, choice in {**_packaged(), **_of_folder(traces_from)}.items():
        if name in ROUND_OF_A_SESSION:
            choice = replace(choice, join_blocks=BLOCK_TOKENS)
        looser = LONG_TTFT if any(part in name for part in LONG) else 1.0
        for gpu, slo in FLEETS.items():
            for size, requests in SIZES.items():
                most = requests if name in ROUND_OF_A_SESSION else most_requests or requests
                sized = _sized(choice, min(requests, most))
                found += _on(name, sized, gpu, replace(slo, ttft_s=looser * slo.ttft_s), size)
    return found


def _on(name: str, choice: WorkloadChoice, gpu: str, slo: Slo, size: int) -> Iterator[Experiment]:
    """Yield a workload's rows on one fleet: in every world, and on the first fleet with a tight TPOT."""
    row = Experiment(
        workload=name,
        choice=choice,
        profile=packaged_profile(gpu),
        instances=size,
        slo=slo,
        systems=SYSTEMS,
        closed_loop=name in ROUND_OF_A_SESSION,
    )
    first = gpu == next(iter(FLEETS)) and size == min(SIZES)
    yield replace(row, quick=first and name in QUICK)
    yield replace(row, world=HOST)
    if first:
        yield replace(row, world=LINKS)
        yield replace(row, slo=replace(slo, tpot_s=TIGHT_TPOT_S), variant="tight")


def _sized(choice: WorkloadChoice, requests: int) -> WorkloadChoice:
    name = choice.trace.removeprefix(LIKE_PREFIX)
    if name == choice.trace:
        return replace(choice, limit=requests)
    like = LIKES[name]
    return replace(choice, trace=f"{choice.trace}:{max(1, round(requests / like.rounds))}")


def _packaged() -> dict[str, WorkloadChoice]:
    likes = [name for name, like in LIKES.items() if not like.phases]
    traces = [f"{SAMPLE_PREFIX}{name}" for name in sample_names()] + [
        f"{LIKE_PREFIX}{name}" for name in likes
    ]
    return {name.partition(":")[2]: WorkloadChoice(trace=name) for name in traces}


def _of_folder(folder: Path | None) -> dict[str, WorkloadChoice]:
    """Return the traces of a folder by name. Raises ConfigError where there is none."""
    if folder is None:
        return {}
    files = sorted(folder.glob("*.csv*")) + sorted(folder.glob("*.jsonl*")) if folder.is_dir() else []
    files = [file for file in files if not any(part in file.name for part in NO_TRACES)]
    if not files:
        raise ConfigError(f"--traces-from {folder}: there is no .csv or .jsonl trace, plain or gzipped")
    return {file.name.partition(".")[0]: WorkloadChoice(trace=str(file)) for file in files}
