"""``tidegate compare --suite``: the rows of a suite, judged together."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tidegate.cli.durations import duration
from tidegate.cli.options import Flag
from tidegate.cli.outputs import claim_folder
from tidegate.cli.simulating import REPORT, command_line, processes, software
from tidegate.cli.terminal import note, plain_table, run_until_interrupted, share_bar, warn
from tidegate.core.errors import ConfigError
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.suites.catalogue import SUITES_OF_ROWS, suite_rows
from tidegate.experiments.suites.rows import known
from tidegate.experiments.suites.running import SuiteEstimate, SuitePlan, estimate, run_suite
from tidegate.experiments.systems import SUITES, contenders
from tidegate.reports.suite import SUITE_TABLES, SuiteReport, write_suite_tables
from tidegate.reports.suite_page import (
    CLAIMS_HEAD,
    MEANS_HEAD,
    ROWS_HEAD,
    claim_cells,
    headline,
    mean_cells,
    row_cells,
    suite_page,
)
from tidegate.systems import systems_in

SUITE = "Systems and suites"
OF_A_SUITE = frozenset({
    "suite", "systems", "only", "quick", "traces_from", "choose", "plan_only", "requests", "levels", "seeds",
    "tolerance", "out", "jobs", "json",
})  # fmt: skip
"""Options that a suite takes. What the others say its rows say themselves, or nothing shows."""
LEVELS = (0.9,)
"""Levels of a suite, unless others are given: one more doubles its runs."""
QUICK_SEEDS, QUICK_TOLERANCE = 1, 0.05


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """Which systems or suite, and which of its rows."""

    panel = SUITE

    systems: Annotated[str, Flag("Systems; see below.", "NAME,..")] = ""
    suite: Annotated[
        str,
        Flag(
            f"A set of systems ({', '.join(SUITES)}), or experiments ({', '.join(SUITES_OF_ROWS)}).",
            "NAME",
        ),
    ] = ""
    only: Annotated[str, Flag("Only rows whose name has one of these in it, or matches.", "PATTERN,..")] = ""
    quick: Annotated[bool, Flag("A few small rows that stand for the suite, one seed, at 90 %.")] = False
    traces_from: Annotated[Path | None, Flag("Folder of traces to add to --suite traces.", "DIR")] = None
    choose: Annotated[
        Path | None,
        Flag(
            "The systems of a Python file, of which each workload's is chosen on all other workloads.",
            "FILE.py",
        ),
    ] = None
    plan_only: Annotated[bool, Flag("Only say which rows there are and what they take.")] = False

    @property
    def of_rows(self) -> bool:
        """Whether it is a suite of experiments, or one of another name is wrong. Raises ConfigError then."""
        if self.suite in SUITES_OF_ROWS:
            return True
        if self.suite and self.suite not in SUITES:
            raise ConfigError(
                f"no suite is called {self.suite!r}; there is {', '.join(SUITES_OF_ROWS)}, and of systems "
                f"{', '.join(SUITES)}"
            )
        if self.only or self.quick or self.traces_from or self.choose or self.plan_only:
            raise ConfigError(
                "--only, --quick, --traces-from, --choose and --plan-only go with --suite "
                + ", ".join(SUITES_OF_ROWS)
            )
        return False


@dataclass(frozen=True, slots=True)
class Closeness:
    """How closely a suite is searched: what was given, with its flags' names."""

    levels: tuple[float, ...]
    seeds: int
    tolerance: float

    def of_suite(self, given: Collection[str], *, quick: bool) -> Closeness:
        """Return it with a suite's own where nothing else was given: one level, ``quick`` a coarse search."""
        return Closeness(
            self.levels if "levels" in given else LEVELS,
            self.seeds if "seeds" in given or not quick else QUICK_SEEDS,
            self.tolerance if "tolerance" in given or not quick else QUICK_TOLERANCE,
        )


def plan_of(
    options: SuiteOptions, closeness: Closeness, most_requests: int | None, given: Collection[str]
) -> SuitePlan:
    """Return what to run. Raises ConfigError for an option that would have no effect on the suite's rows, and
    for names that there are not."""
    vain = [f"--{name.replace('_', '-')}" for name in sorted(set(given) - OF_A_SUITE)]
    if vain:
        raise ConfigError(
            f"no effect on --suite {options.suite}, whose rows are given: {', '.join(vain)}; leave them out"
        )
    rows = suite_rows(
        options.suite,
        only=options.only,
        quick=options.quick,
        traces_from=options.traces_from,
        most_requests=most_requests,
    )
    named = tuple(name.strip() for name in options.systems.split(",") if name.strip())
    if missing := known(named)[1]:
        contenders(missing, rows[0].instances)  # raises ConfigError, with the names that there are
    variants = tuple(systems_in(options.choose)) if options.choose else ()
    if named or variants:
        rows = [replace(row, systems=(*variants, *(named or row.systems)), claims=()) for row in rows]
    closeness = closeness.of_suite(given, quick=options.quick)
    facts = {
        **software(),
        "search": f"levels {', '.join(f'{level:g}' for level in closeness.levels)}, {closeness.seeds} seeds, "
        f"within {100 * closeness.tolerance:g} %",
    }
    return SuitePlan(
        options.suite,
        tuple(rows),
        closeness.levels,
        closeness.seeds,
        closeness.tolerance,
        command_line(),
        facts,
        variants,
    )


def run_and_show(
    plan: SuitePlan, out: Path, probes: str, jobs: int | None, *, as_json: bool, plan_only: bool
) -> None:
    """Say what the suite takes, run it, print it and write its report. Results are kept in ``out``."""
    claim_folder(out, "compare", REPORT, SUITE_TABLES)
    workers_count = processes(jobs)
    _tell(plan, estimate(plan), workers_count)
    if plan_only:
        for row in plan.rows:
            typer.echo(f"{row.name}  {row.slo}")
        return
    store = Store(out / probes)
    if len(store):
        note(f"{out / probes} has {len(store)} results of earlier runs; what they answer is not run again")

    async def everything() -> SuiteReport:
        with share_bar() as advance:
            async with Workers(workers_count, store, advance) as workers:
                return await run_suite(plan, workers)

    try:
        kept = f"{out / probes} keeps what is finished, and the same command goes on from there"
        report = run_until_interrupted(everything(), kept)
    finally:
        store.close()
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        _show(report)
    (out / REPORT).write_text(suite_page(report), encoding="utf-8")
    write_suite_tables(out, report)
    note(f"report: {out / REPORT}")


def _tell(plan: SuitePlan, found: SuiteEstimate, workers: int) -> None:
    count, systems = len(plan.rows), len({name for row in plan.rows for name in row.systems})
    note(
        f"{plan.suite}: {_counted(count, 'row')}, {systems} systems, about {found.runs:,.0f} simulations of "
        f"{found.requests / 1e6:,.1f} M requests: {duration(found.cpu_s)} of CPU at the speed measured now, "
        f"{duration(found.cpu_s / workers)} in {_counted(workers, 'process')}"
    )


def _counted(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def _show(report: SuiteReport) -> None:
    """Print losses, means, rows and claims. What is no terminal has lines of any length."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    if report.missing:
        warn(f"not here, so not compared: {', '.join(report.missing)}")
    for row in report.rows:
        if row.failed:
            warn(f"{row.name}: {row.failed}")
    console.print(escape(headline(report)), style="bold", highlight=False)
    for level in report.levels:
        lost = report.losses(level)
        others = [row for row in report.ranked(level) if row not in lost]
        for title, rows in (("Losses", lost), ("As good as the best", others)):
            if rows:
                cells = [row_cells(report, row, level) for row in rows]
                _print(console, f"{title}, at {100 * level:g} %", ROWS_HEAD, cells)
        means = [mean_cells(mean) for mean in report.means(level)]
        _print(console, f"{report.subject}, at {100 * level:g} %", MEANS_HEAD, means)
    claims = [claim_cells(claim) for row in report.rows for claim in row.claims]
    if claims:
        _print(console, "The papers' figures", CLAIMS_HEAD, claims)


def _print(console: Console, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    shown = plain_table(title=title, title_justify="left", title_style="bold")
    for name in head:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    console.print()
