"""Where a comparison goes: a table on the terminal, and a folder with the page, CSV and PNG files."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tidegate
from tidegate.cli.simulating import note
from tidegate.core.errors import ConfigError
from tidegate.experiments.setting import Fleet
from tidegate.reports.comparison import Comparison, Entry, TraceComparison, write_tables
from tidegate.reports.figures import draw_figures, write_pngs
from tidegate.reports.page import render_page
from tidegate.reports.plot_style import NoPlots
from tidegate.workloads.choice import WorkloadChoice

REPORT = "report.html"


NARROW = 100
"""Columns of a terminal below which a table leaves the intervals to the report."""


def print_tables(comparison: Comparison, findings: Sequence[str]) -> None:
    """Print a table per trace, then the findings. What is no terminal has lines of any length."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for trace in comparison.traces:
        console.print(_table(comparison, trace, intervals=comparison.seeds > 1 and console.width >= NARROW))
        notes = {f.reason for entry in trace.entries for f in entry.levels if f.reason}
        for text in sorted(notes):
            console.print(f"* {escape(text)}", style="dim")
        console.print()
    for sentence in findings:
        console.print(escape(sentence), highlight=False, soft_wrap=not console.is_terminal)


def _table(comparison: Comparison, trace: TraceComparison, *, intervals: bool) -> Table:
    table = Table(
        title=f"{escape(trace.title)}: goodput (requests/s) at {escape(comparison.slo)}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("system", overflow="fold", min_width=16)
    for level in comparison.levels:
        table.add_column(f"at {100 * level:g} %", justify="right", no_wrap=True)
        if intervals:
            table.add_column("interval", justify="right", style="dim", no_wrap=True)
        table.add_column("of limit", justify="right")
    rate = "" if trace.common_rate_rps is None else f" at {_rate(trace.common_rate_rps)}"
    table.add_column(f"flips{rate}", justify="right", max_width=9)
    table.add_column("p99 TTFT of misses", justify="right", max_width=9)
    table.add_column("p99 TPOT of misses", justify="right", max_width=9)
    for entry in trace.entries:
        table.add_row(*_cells(entry, intervals))
    return table


def _cells(entry: Entry, interval: bool) -> list[str]:
    cells = [escape(entry.title)]
    for found in entry.levels:
        share = found.share_of_limit
        cells.append(f"[bold]{_rate(found.goodput_rps)}[/]{'*' if found.reason else ''}")
        if interval:
            cells.append(f"{_rate(found.low_rps)}-{_rate(found.high_rps)}")
        cells.append("-" if share is None else f"{100 * share:.0f} %")
    flips, view = (entry.at_common or {}).get("flips"), entry.view
    cells.append("-" if flips is None else str(flips))
    misses = (None, None) if view is None else (view.missed_ttft_p99_s, view.missed_tpot_p99_s)
    return cells + [_time(each) for each in misses]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def make_folder(folder: Path) -> None:
    """Have the folder of a report. Raises ConfigError where none can be written: better before a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: no such folder can be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder}: no permission to write there")


def write_folder(folder: Path, comparison: Comparison, findings: Sequence[str]) -> str:
    """Write ``report.html``, the CSV tables and the PNGs; return why charts are missing, if they are."""
    make_folder(folder)
    write_tables(folder, comparison)
    missing = ""
    try:
        figures = draw_figures(comparison)
    except NoPlots as error:
        figures, missing = [], error.message
    write_pngs(folder, figures)
    page = render_page(
        comparison, figures, findings, f"This page has no charts: {missing}." if missing else ""
    )
    (folder / REPORT).write_text(page, encoding="utf-8")
    return missing


def tell_where(folder: Path, missing: str) -> None:
    """Say where the page is, and what it lacks."""
    if missing:
        note(f"no charts: {missing}")
    note(f"report: {folder / REPORT}")


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


def set_up(fleet: Fleet) -> dict[str, str]:
    """Return what a reader has to know to judge or repeat a comparison, beside its command."""
    facts = {
        "tidegate": tidegate.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
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
