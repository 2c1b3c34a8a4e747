"""``tidegate plan``: what to deploy for a workload under a budget of GPUs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import tidegate
from tidegate.cli.common_flags import AS_JSON, JOBS, SCALE_RATE, SCORING
from tidegate.cli.options import SHARE, Flag, OptionGroup, at_least
from tidegate.cli.outputs import claim_folder
from tidegate.cli.simulating import (
    A_RATE,
    BATCHING,
    CUT,
    DEFAULT_TRACE,
    SIMULATED,
    WORKLOAD,
    command_line,
    processes,
    with_classes,
    write_pngs,
)
from tidegate.cli.terminal import note, plain_table, run_until_interrupted, share_bar
from tidegate.core.errors import ConfigError
from tidegate.core.notation import parse_counted
from tidegate.costs.shapes import SHAPES
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.measure.attainment import DEFAULT_LEVEL
from tidegate.planner.answer import RankedPlan, answer
from tidegate.planner.deployment import Offer, kinds_on, offers
from tidegate.planner.page import HEAD, cells, charts, render
from tidegate.planner.question import SYSTEMS, Question, systems_for
from tidegate.planner.watch import Deployed, WindowVerdict, until_readable, verdicts
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice, requests_of

PAGE = "plan.html"
FILES = ("plan.json", "commands.sh", "compose.yaml", "kubernetes.yaml")
RATED_LEVEL = 0.99
"""Attainment of a plan for a rate, by default."""
BUDGET = "Budget"
EXPECTED_RUNS = 140.0

EXAMPLES = """
The best use of eight H100s for ten minutes of production chat traffic:

    tidegate plan --model llama-3.1-8b --gpu h100_sxm --gpus 8

The cheapest of two kinds of GPU that serves 200 requests/s at 99 % attainment, with all files to start it:

    tidegate plan --model llama-3.1-8b --gpu h100_sxm:16 --gpu a100:16 --rate 200 --out plan

Whether what was planned is still the best, by the journal of the gateway that runs it:

    tidegate plan --watch journal.jsonl --deployed plan/plan.json --follow

[bold]Exit codes[/bold]

0 planned; 2 wrong usage or input, or nothing meets the SLO under this budget; 130 interrupted.
"""


def _gpus(texts: list[str]) -> tuple[tuple[str, int | None], ...]:
    return tuple(parse_counted(text) for text in texts)


def _prices(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if not (name and equals and 0 <= price < float("inf")):
            raise ConfigError(f"--price is GPU=DOLLARS, for a GPU and hour, as in h100_sxm=2.8; got {text!r}")
        found[name] = price
    return found


@dataclass(frozen=True, slots=True)
class Budget:
    """What there is."""

    model: Annotated[
        str,
        Flag(
            f"What is served: {', '.join(SHAPES)}, or a folder with a config.json, by rooflines.",
            "NAME",
            panel=BUDGET,
        ),
    ] = "llama-3.1-8b"
    gpu: Annotated[
        tuple[tuple[str, int | None], ...],
        Flag(
            "A kind of GPU, with how many there are of it; repeat for several kinds.",
            "NAME[:N]",
            panel=BUDGET,
            given=list[str],
            shown="h100_sxm",
            read=_gpus,
        ),
    ] = (("h100_sxm", None),)
    gpus: Annotated[
        int | None, Flag("How many, of a kind without its own number.", "N", panel=BUDGET, rule=at_least(1))
    ] = None
    price: Annotated[
        Mapping[str, float] | None,
        Flag(
            "Dollars per GPU and hour, in place of the assumed ones; repeat.",
            "GPU=X",
            panel=BUDGET,
            given=list[str],
            shown=False,
            read=_prices,
        ),
    ] = None

    def offers(self) -> tuple[Offer, ...]:
        return offers(self.gpu, self.gpus, self.price or {})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is best."""

    rate_rps: Annotated[
        float | None,
        Flag(
            "Find the cheapest deployment that serves this rate, not the most that the budget serves.",
            "RPS",
            "--rate",
            WORKLOAD,
            rule=A_RATE,
        ),
    ] = None
    level: Annotated[
        float | None,
        Flag(
            f"Attainment that counts as met ({DEFAULT_LEVEL:g}; {RATED_LEVEL:g} with --rate).",
            "X",
            panel=SCORING,
            rule=SHARE,
        ),
    ] = None
    system: Annotated[
        str | None,
        Flag(
            f"Who decides in a disaggregated fleet ({SYSTEMS['disaggregated'][0]}; for conversations "
            "ampd-cost, too).",
            "NAME",
        ),
    ] = None
    top: Annotated[int, Flag("Deployments in the table.", "K", panel=SCORING, rule=at_least(1))] = 3
    seeds: Annotated[int, Flag("Draws of the workload.", "N", panel=SCORING, rule=at_least(1))] = 3


@dataclass(frozen=True, slots=True)
class Watching:
    """Whether a deployment is still the best."""

    watch: Annotated[Path | None, Flag("A gateway's journal: its traffic.", "JOURNAL", panel=SCORING)] = None
    deployed: Annotated[
        Path | None, Flag("The plan.json of what runs.", "FILE", panel=SCORING, needs=("watch",))
    ] = None
    every_s: Annotated[
        float, Flag("Seconds of the journal that are looked at together.", "S", "--every", SCORING)
    ] = 600.0
    follow: Annotated[
        bool,
        Flag("Go on as the journal grows, until Ctrl-C.", panel=SCORING, needs=("watch",)),
    ] = False
    start_delay_s: Annotated[
        float, Flag("How long a server takes to load its model.", "S", "--start-delay", SCORING)
    ] = 60.0
    payback_s: Annotated[
        float,
        Flag("Propose only moves that gain what they cost within this time.", "S", "--payback", SCORING),
    ] = 3600.0

    def __post_init__(self) -> None:
        spans_s = (self.every_s, self.payback_s)
        if not (all(0 < s < float("inf") for s in spans_s) and 0 <= self.start_delay_s < float("inf")):
            raise ConfigError(
                "--every and --payback are positive numbers of seconds, --start-delay at least 0"
            )


def run(
    *,
    budget: Budget,
    workload: Annotated[
        WorkloadChoice,
        OptionGroup(
            WorkloadChoice,
            {
                "trace": Flag(
                    f"Trace of any format that `tidegate trace info` reads ({DEFAULT_TRACE}).",
                    "FILE",
                    "--workload",
                ),
                **SCALE_RATE,
                **CUT,
            },
            WORKLOAD,
        ),
    ],
    settings: Annotated[SimSettings, OptionGroup(SimSettings, SIMULATED)],
    engine: Annotated[
        EngineSettings,
        OptionGroup(
            EngineSettings,
            {name: flag for name, flag in BATCHING.flags.items() if name != "max_batch_tokens"},
        ),
    ],
    wanted: Wanted,
    watching: Watching,
    out: Annotated[
        Path | None, Flag("Write plan.html, plan.json and what starts the first one.", "DIR", panel=SCORING)
    ] = None,
    jobs: Annotated[int | None, JOBS] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Find what to deploy for a workload: how many replicas of which size, for which phase.

    A mixed-integer program proposes, simulations with the policies in them decide.
    The answer may be not to disaggregate.
    """
    if (watching.watch is None) != (watching.deployed is None):
        raise ConfigError("--watch JOURNAL goes with --deployed FILE, the plan.json of what runs")
    deployed = None if watching.deployed is None else Deployed.read(watching.deployed)
    model = budget.model if deployed is None else deployed.model
    offered = budget.offers() if deployed is None else deployed.offers
    choice = replace(workload, trace=str(watching.watch or workload.trace or DEFAULT_TRACE))
    if watching.follow:
        run_until_interrupted(until_readable(choice), "")
        logging.getLogger("tidegate.workloads.readers").setLevel(
            logging.WARNING
        )  # it is read again and again
    setting = Setting(choice, SimulatedFleet((), engine), "", None, with_classes(settings, [choice]))
    question = Question(
        setting,
        offered,
        kinds_on(offered, model),
        wanted.level or (DEFAULT_LEVEL if wanted.rate_rps is None else RATED_LEVEL),
        wanted.rate_rps,
        systems_for(requests_of(choice), wanted.system),
        top=wanted.top,
        seeds=wanted.seeds,
    )
    if deployed is not None:
        _watch(replace(question, rate_rps=None), deployed, watching, jobs)
        return
    if out is not None:
        claim_folder(out, "plan", PAGE, FILES)
    begun_s = time.monotonic()
    found = _answered(question, jobs)
    took_s = time.monotonic() - begun_s
    if as_json:
        typer.echo(json.dumps(to_json(found, model, took_s), indent=2, allow_nan=False))
    else:
        _show(found, took_s)
    if out is not None:
        _write(out, found, model, took_s)


def _answered(question: Question, jobs: int | None) -> RankedPlan:
    async def everything() -> RankedPlan:
        with share_bar() as advance:
            async with Workers(processes(jobs), Store(None), advance) as workers:
                workers.expect(EXPECTED_RUNS)
                return await answer(question, workers)

    return run_until_interrupted(everything(), "nothing is kept")


def _watch(question: Question, deployed: Deployed, watching: Watching, jobs: int | None) -> None:
    """Print a line per window of the journal, and when what is deployed ceased to be the best."""
    every_s, delay_s, follow = watching.every_s, watching.start_delay_s, watching.follow

    async def everything() -> list[WindowVerdict]:
        seen = []
        async with Workers(processes(jobs), Store(None)) as workers:
            async for verdict in verdicts(
                question, deployed.chosen, every_s, workers, start_delay_s=delay_s, follow=follow
            ):
                typer.echo(verdict.sentence(question.level, watching.payback_s))
                seen.append(verdict)
        return seen

    seen = run_until_interrupted(everything(), "" if follow else "nothing is kept")
    last_good = max((at for at, each in enumerate(seen) if each.best is None), default=-1)
    if last_good + 1 < len(seen):
        typer.echo(f"not the best any more since {seen[last_good + 1].start_s:.0f} s of the journal")


def _show(found: RankedPlan, took_s: float) -> None:
    question = found.question
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    budget = ", ".join(f"{offer.count} x {offer.gpu}" for offer in question.offers)
    aim = "most requests/s" if question.rate_rps is None else f"cheapest for {question.rate_rps:g} requests/s"
    table = plain_table(
        title=escape(f"{budget}, {question.setting.settings.slo}, {question.level:.0%}: {aim}"),
        title_justify="left",
        title_style="bold",
    )
    for at, title in enumerate(HEAD):
        table.add_column(escape(title), justify="left" if at in (1, 2) else "right", no_wrap=at != 1)
    for place, each in enumerate(found.ranked, 1):
        table.add_row(*map(escape, cells(place, each)))
    console.print(table)
    for sentence in found.sentences:
        console.print(escape(sentence), highlight=False, soft_wrap=not console.is_terminal)
    notes = {pool.kind.profile.note for pool in found.ranked[0].deployment.pools if pool.kind.profile.note}
    for text in sorted(notes):
        console.print(f"* {escape(text)}", style="dim", highlight=False)
    console.print(f"planned in {took_s:.1f} s", style="dim", highlight=False)


def to_json(found: RankedPlan, model: str, took_s: float) -> dict[str, Any]:
    """Return the object of ``--json`` and of plan.json, from which ``--watch`` reads a deployment again."""
    question = found.question
    return {
        "format": "tidegate-plan",
        "version": tidegate.__version__,
        "command": command_line(),
        "model": model,
        "workload": question.setting.workload.describe(),
        "slo": str(question.setting.settings.slo),
        "level": question.level,
        "rate_rps": found.rate_rps,
        "offers": [
            {"gpu": offer.gpu, "count": offer.count, "price_per_h": offer.price_per_h}
            for offer in question.offers
        ],
        "findings": list(found.sentences),
        "plans": [each.to_json() for each in found.ranked],
        "goodput_over_gpus": [
            {"gpus": gpus, "family": family, "goodput_rps": rps} for gpus, family, rps in found.curve
        ],
        "parts": found.parts,
        "requests_per_run": found.length.requests,
        "took_s": took_s,
    }


def _write(folder: Path, found: RankedPlan, model: str, took_s: float) -> None:
    from tidegate.planner.manifests import commands, compose, kubernetes, system_file

    question, first = found.question, found.ranked[0].deployment
    slo = question.setting.settings.slo
    served = first.pools[0].kind.profile.model
    drawn = charts(found)
    facts = {
        "tidegate": tidegate.__version__,
        "requests per run": str(found.length.requests),
        "took": f"{took_s:.1f} s",
        **{
            f"profile {each.name}": f"{each.profile.source}; {each.note}"
            for each in (pool.kind.profile for pool in first.pools)
        },
    }
    texts = {
        PAGE: render(found, drawn, facts, command_line()),
        "plan.json": json.dumps(to_json(found, model, took_s), indent=2, allow_nan=False) + "\n",
        "commands.sh": commands(first, served, slo),
        "compose.yaml": compose(first, served, slo),
        "kubernetes.yaml": kubernetes(first, served, slo),
    }
    if first.family == "mixed":
        texts["plan_system.py"] = system_file(first)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_pngs(folder, drawn)
    note(f"plan: {folder / PAGE}")
