"""One load, or several one after the other whose results outlive a sweep that is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

from tidegate.bench.run import Watch, asked, bench
from tidegate.bench.settings import BenchSettings
from tidegate.core.errors import ConfigError
from tidegate.measure.results import PART, read_results
from tidegate.reports.bench_report import BenchReport, recorded_report
from tidegate.workloads.choice import WorkloadChoice, at_rate, load_workload, requests_of
from tidegate.workloads.trace import Workload

Watching = Callable[[str, int], AbstractContextManager[Watch]]
"""Makes what is told of a load's progress, from what is counted and how many there are."""

_loaded = lru_cache(maxsize=4)(load_workload)
"""The same workload again for the same choice: the loads of a sweep share a trace."""


@dataclass(frozen=True, slots=True)
class Load:
    """A workload at a mean rate, or in a closed loop of ``settings.concurrency`` users, or as it is.

    Raises ConfigError for choices that do not go together.
    """

    choice: WorkloadChoice
    settings: BenchSettings
    rate_rps: float | None = None

    def __post_init__(self) -> None:
        choice, closed = self.choice, self.settings.concurrency is not None
        if not closed and self.rate_rps is None:
            return
        rivals = {
            "--rate": closed and self.rate_rps is not None,
            "--poisson": choice.poisson is not None,
            "--gamma": choice.gamma is not None,
            "--bursts": closed and bool(choice.bursts),
            "--scale-rate": choice.scale_rate != 1.0,
        }
        problems = []
        if any(rivals.values()):
            says = "--concurrency has answers set" if closed else "--rate sets"
            given = " and ".join(name for name, is_given in rivals.items() if is_given)
            problems.append(f"{says} when requests come; drop {given}")
        if closed and not choice.trace and choice.limit is None:
            problems.append(
                "--concurrency without --trace needs --limit N: a closed loop has no end of its own"
            )
        if self.rate_rps is not None and not 0 < self.rate_rps < float("inf"):
            problems.append(f"--rate is a positive number of requests per second, got {self.rate_rps:g}")
        if problems:
            raise ConfigError(problems)

    def records(self) -> Workload:
        """Read or draw the requests. Raises TraceError and ConfigError as ``load_workload`` does."""
        choice = self.choice
        if self.settings.concurrency is not None:
            return requests_of(choice if choice.trace else replace(choice, poisson=1.0))
        if self.rate_rps is None:
            return _loaded(choice)
        if choice.trace or choice.bursts:
            return at_rate(_loaded(choice), self.rate_rps, 0)
        return _loaded(replace(choice, poisson=self.rate_rps))

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded of the load, beside the settings."""
        return {"workload": self.choice.describe(), "rate_rps": self.rate_rps}

    @property
    def name(self) -> str:
        users = self.settings.concurrency
        return f"rate-{self.rate_rps:g}" if users is None else f"concurrency-{users}"

    @property
    def file(self) -> str:
        """Return the name of its results in the folder of a sweep."""
        return f"{self.name}.jsonl"

    def drawn_apart(self) -> Load:
        """Return the load with prompts of its own: those of the load before may be in a prefix cache."""
        seed = crc32(f"{self.settings.seed} {self.name}".encode())
        return replace(self, settings=replace(self.settings, seed=seed))


def run_sweep(
    loads: Sequence[Load], *, level: float, folder: Path | None, watching: Watching
) -> Iterator[BenchReport]:
    """Offer each load once the one before is over, and yield its report.

    Results stay in ``folder``, and a load whose results are there already is not offered again. Ctrl-C raises
    KeyboardInterrupt. Raises ConfigError where the folder has results of other loads by these names.
    """
    drawn = [load.drawn_apart() for load in loads]
    if len({load.name for load in drawn}) < len(drawn):
        raise ConfigError("a sweep has each load once")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {folder}: no such folder can be made: {error.strerror}") from None
    known = [None if folder is None else _known(load, folder, level) for load in drawn]
    for load, report in zip(drawn, known, strict=True):
        yield report or _offered(load, folder, level, watching)


def _known(load: Load, folder: Path, level: float) -> BenchReport | None:
    """Return the report of results that are there. Raises ConfigError for those of another load."""
    path = folder / load.file
    if not path.exists():
        return None
    recorded = read_results(path)
    settings, header = load.settings, recorded.header
    wanted = asked(settings, load.records(), load.facts)
    if settings.model:
        wanted["model"] = settings.model
    other = [
        f"{key} {header.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if header.get(key) != value
    ]
    if other:
        raise ConfigError(f"{path} is of another run ({'; '.join(other)}); give another --out")
    return recorded_report(recorded, None, level)


def _offered(load: Load, folder: Path | None, level: float, watching: Watching) -> BenchReport:
    """Offer a load. Its file has its name once it is whole."""
    part = None if folder is None else folder / f"{load.name}{PART}"
    if part is not None:
        part.unlink(missing_ok=True)
    records = load.records()
    with watching(f"requests, {load.name}", len(records)) as watch:
        done = bench(load.settings, records, facts=load.facts, level=level, out=part, watch=watch)
    if done.interrupted:
        raise KeyboardInterrupt
    if part is not None:
        part.rename(part.with_name(load.file))
    return done.report
