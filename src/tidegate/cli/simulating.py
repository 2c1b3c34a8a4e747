"""What the verbs that simulate share: options, the fleet that they describe, and the folder of a report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tidegate
from tidegate.api import DEFAULT_PROFILE
from tidegate.cli.common_flags import CHUNKS_HELP, COLUMNS, JOIN_BLOCKS, SLO_CLASS, TURN_GAP, WINDOW
from tidegate.cli.options import MILLISECONDS, Flag, OptionGroup, Rule, at_least
from tidegate.cli.outputs import claim_folder
from tidegate.cli.terminal import note, note_classes, warn
from tidegate.core.errors import ConfigError
from tidegate.core.notation import parse_counted, parse_range
from tidegate.core.slo import Slo
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.costs.named_profile import load_profile
from tidegate.dataplane.replica import BLOCK_TOKENS, EngineSettings
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.policies.shares import parse_shares
from tidegate.reports.charts import Chart
from tidegate.reports.comparison import TABLES, Comparison, write_tables
from tidegate.reports.comparison_charts import comparison_charts
from tidegate.reports.page import render_page
from tidegate.reports.plot_style import NoPlots
from tidegate.reports.png import draw_png
from tidegate.signals.forecast.choice import SIMULATED as LOAD_SOURCES
from tidegate.signals.lengths.choice import SIMULATED as LENGTH_SOURCES
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice, requests_of
from tidegate.workloads.slo_classes import targets_by_class

REPORT = "report.html"
DEFAULT_INSTANCES = 4
DEFAULT_TRACE = "sample:azure-conv"
LEAST_HEARTBEAT_MS = 1.0
"""Every beat is an event for every instance; less than this is no staleness to speak of."""

WORKLOAD = "Workload"
FLEET = "Simulated fleet"
ENGINE = "Engine and gateway"

CUT = {**WINDOW, "limit": replace(WINDOW["limit"], name="--requests"), **TURN_GAP, **JOIN_BLOCKS, **COLUMNS}
"""The flags of the part of a trace that is simulated."""


def _milliseconds(text: str, name: str, rule: Rule = MILLISECONDS) -> Flag:
    """Return the flag of a setting in seconds that is given in milliseconds, 0 by default."""
    return Flag(text, "MS", name, ENGINE, "0", given=float, rule=rule, read=lambda ms: ms / 1000.0)


def _none_or_one_of(names: Sequence[str]) -> Rule:
    """Return the rule of a name that may be left out."""
    return Rule(lambda name: name in ("", *names), f"one of {', '.join(names)}")


A_RATE = Rule(lambda rps: 0 < rps < float("inf"), "a positive number of requests per second")
HEARTBEAT = Rule(
    lambda ms: ms == 0 or LEAST_HEARTBEAT_MS <= ms < float("inf"),
    f"0, where the scheduler sees all at once, or at least {LEAST_HEARTBEAT_MS:g}",
)
SIMULATED = {
    "slo": Flag("Latency targets.", "ttft:MS,tpot:MS", shown=str(Slo()), read=Slo.parse),
    "slo_classes": SLO_CLASS,
    "closed_loop": Flag(
        "A session's turn comes after the answer before it plus the client's pause.", panel=WORKLOAD
    ),
    "admission": Flag(
        "Refuse a request when its first token is predicted to take more than so many times its TTFT target; "
        "0 takes all, as no gateway does by default.",
        "X",
        panel=ENGINE,
        rule=Rule(lambda multiple: multiple == 0 or 1 <= multiple < float("inf"), "0, or 1 or more"),
    ),
    "shares": Flag(
        "Share what is served among the trace's clients by these weights, * for those not named. Repeat.",
        "CLIENT=WEIGHT",
        "--share",
        ENGINE,
        given=list[str],
        read=parse_shares,
        shown=False,
    ),
    "lengths": Flag(
        "Who predicts what is left of an answer: hidden (a predictor in the engine, with its errors), "
        "histogram, max-tokens or oracle; by default nobody, and hidden where the system needs it.",
        "SOURCE",
        panel=ENGINE,
        rule=_none_or_one_of(LENGTH_SOURCES),
    ),
    "forecast": Flag(
        "Who forecasts the load: last, seasonal-naive, ewma, arima, ensemble or oracle; by default nobody, "
        "and ensemble where the system needs it.",
        "SOURCE",
        panel=ENGINE,
        rule=_none_or_one_of(LOAD_SOURCES),
    ),
    "forecast_period_s": Flag("Length of a period of forecasts.", "S", "--forecast-period", panel=ENGINE),
    "forecast_steps": Flag("How many periods ahead they go.", "N", panel=ENGINE, rule=at_least(1)),
    "front_s": _milliseconds("From dispatch to the engine's queue, per leg.", "--front-ms"),
    "heartbeat_s": _milliseconds(
        "How often engines report (1 or more); 0: the scheduler sees all at once.",
        "--heartbeat-ms",
        HEARTBEAT,
    ),
}
CHUNKS = Flag(CHUNKS_HELP, "fixed|slack", panel=ENGINE)
BATCHING = OptionGroup(
    EngineSettings,
    {
        "max_batch_tokens": Flag("Token budget of a step.", "N", "--chunk-tokens", rule=at_least(1)),
        "max_num_seqs": Flag("Requests in a batch at most.", "N", rule=at_least(1)),
        "host_s": _milliseconds("Host time added to every step.", "--host-ms"),
    },
    ENGINE,
)


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """Which instances are simulated."""

    panel: ClassVar[str] = FLEET

    profile: Annotated[
        list[str] | None,
        Flag(
            "What an instance is: one that `tidegate profile --list` shows, or a file that `tidegate "
            f"profile` wrote ({DEFAULT_PROFILE}). Repeat with counts for a mixed fleet.",
            "GPU/MODEL[:N]",
        ),
    ] = None
    instances: Annotated[
        tuple[int, int] | None,
        Flag(
            f"Number of instances ({DEFAULT_INSTANCES}); A..B begins with A, or with --split, and leaves it "
            "to the system how many are up.",
            "N|A..B",
            given=str,
            read=parse_range,
        ),
    ] = None
    kv_tokens: Annotated[
        int | None,
        Flag("KV capacity of an instance; default: the profile's.", "N", rule=at_least(BLOCK_TOKENS)),
    ] = None
    mixed_context_ratio: Annotated[
        float | None,
        Flag("Cost of a decode's context beside a prefill chunk, over its cost in a pure decode step.", "X"),
    ] = None

    @property
    def grows(self) -> bool:
        """Whether the number of instances is a range."""
        return self.instances is not None and self.instances[0] < self.instances[1]

    def make(self, engine: EngineSettings) -> SimulatedFleet:
        """Return the fleet, of the most instances. Raises ConfigError, with all problems at once."""
        most = None if self.instances is None else self.instances[1]
        named = [parse_counted(text) for text in self.profile or [DEFAULT_PROFILE]]
        problems = [f"--profile {name}:0 has no instances" for name, count in named if count == 0]
        if len(named) == 1 and named[0][1] is None:
            named = [(named[0][0], most or DEFAULT_INSTANCES)]
        elif any(count is None for _, count in named):
            problems.append(f"with several --profile, give each a count, as in --profile {DEFAULT_PROFILE}:4")
        elif most is not None and most != sum(count or 0 for _, count in named):
            problems.append(f"--instances {most} is not the sum of the counts of --profile; drop it")
        groups: list[tuple[PackagedProfile, int]] = []
        for name, count in named:
            try:
                groups.append((self._profile(name), count or 0))
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return SimulatedFleet(tuple(groups), engine, self.kv_tokens)

    def _profile(self, name: str) -> PackagedProfile:
        if self.mixed_context_ratio is None:
            return load_profile(name)
        if name.endswith(".json"):
            raise ConfigError(f"--mixed-context-ratio is for packaged profiles; {name} was measured")
        return packaged_profile(name, mixed_context_ratio=self.mixed_context_ratio)


def with_classes(settings: SimSettings, workloads: Iterable[WorkloadChoice]) -> SimSettings:
    """Return the settings with targets for every class of the workloads, and note what has those of --slo."""
    read = [requests_of(workload) for workload in workloads]
    found = targets_by_class(read, settings.slo_classes, settings.slo)
    note_classes(found, settings.slo_classes, settings.slo)
    return replace(settings, slo_classes=found)


def processes(jobs: int | None) -> int:
    """Return how many processes to work in: as asked, or one per core that this process may use."""
    if jobs is not None:
        return jobs
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_folder(folder: Path, command: str) -> None:
    """Make the folder of a report; see ``claim_folder``."""
    claim_folder(folder, command, REPORT, TABLES)


def write_folder(folder: Path, command: str, comparison: Comparison, findings: Sequence[str]) -> None:
    """Write ``report.html``, the CSV tables and the PNGs, and note where the page is."""
    make_folder(folder, command)
    charts = comparison_charts(comparison)
    page = render_page(comparison, charts, findings, command)
    (folder / REPORT).write_text(page, encoding="utf-8")  # first: the page tells whose the folder is
    write_tables(folder, comparison)
    note(f"report: {folder / REPORT}")
    write_pngs(folder, charts)


def write_pngs(folder: Path, charts: Iterable[Chart]) -> None:
    """Draw each chart as ``NAME.png``; what cannot be drawn is said, for results are whole without it."""
    for chart in charts:
        try:
            (folder / f"{chart.name}.png").write_bytes(draw_png(chart))
        except NoPlots as error:
            note(f"no PNG files: {error.message}")
            break
        except Exception as error:
            warn(f"{chart.name}.png could not be drawn: {error}")


def tell_achievable(settings: Sequence[Setting], searches: int) -> None:
    """Say what ``searches`` of what is achievable take for each of ``settings``, or why there are none."""
    from tidegate.experiments.achievable import SIMULATIONS
    from tidegate.experiments.reference import expected_cpu_s
    from tidegate.experiments.run import unlimited

    for why in dict.fromkeys(filter(None, map(unlimited, settings))):
        warn(f"nothing is searched for what is achievable: {why}")
    searched = [setting for setting in settings if not unlimited(setting)]
    if searched:
        cpu_s = sum(expected_cpu_s(setting, searches) for setting in searched)
        runs = SIMULATIONS * searches * len(searched)
        time_is = f"{cpu_s:.0f} s" if cpu_s < 120 else f"{cpu_s / 60:.0f} min"
        note(f"what is achievable takes up to {runs:,} simulations more, about {time_is} of CPU here")


def command_line() -> str:
    """Return this process's command as a shell takes it."""
    return shlex.join(["tidegate", *sys.argv[1:]])


def titled(files: Sequence[str], cut: WorkloadChoice) -> dict[str, WorkloadChoice]:
    """Return the workloads by a short title each. Raises ConfigError unless files are named once each."""
    if not files or len(set(files)) < len(files):
        raise ConfigError("--traces names each trace once, at least one")
    short = [Path(name.rpartition(":")[2]).name.removesuffix(".gz") for name in files]
    short = [name.rpartition(".")[0] or name for name in short]
    titles = short if len(set(short)) == len(short) else list(files)
    return {title: replace(cut, trace=file) for title, file in zip(titles, files, strict=True)}


def software() -> dict[str, str]:
    """Return which versions run, and where."""
    return {
        "tidegate": tidegate.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }


def set_up(fleet: SimulatedFleet) -> dict[str, str]:
    """Return what a reader has to know to judge or repeat a comparison, beside its command."""
    facts = {
        **software(),
        "engine": f"{fleet.engine.max_batch_tokens} tokens, {fleet.engine.max_num_seqs} requests per step, "
        f"host time {1000 * fleet.engine.host_s:g} ms",
    }
    for profile, count in fleet.groups:
        capacity = profile.kv_capacity_tokens if fleet.kv_tokens is None else fleet.kv_tokens
        facts[f"profile {profile.name}"] = (
            f"{count} instances, KV for {capacity:,} tokens each; {profile.profile.source}"
            + (f"; {profile.note}" if profile.note else "")
        )
    return facts
