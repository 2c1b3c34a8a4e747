"""The folder that a comparison or a run is written to: the page, CSV and PNG files."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tidegate
from tidegate.cli.terminal import note
from tidegate.core.errors import ConfigError
from tidegate.experiments.setting import SimulatedFleet
from tidegate.reports.comparison import Comparison, write_tables
from tidegate.reports.figures import draw_figures, write_pngs
from tidegate.reports.page import render_page
from tidegate.reports.plot_style import NoPlots
from tidegate.workloads.choice import WorkloadChoice

REPORT = "report.html"


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


def set_up(fleet: SimulatedFleet) -> dict[str, str]:
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
