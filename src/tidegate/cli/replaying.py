"""``tidegate sim --replay``: a journal beside its simulation, predicted against observed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from tidegate.cli.terminal import note, warn
from tidegate.core.errors import ConfigError, TraceError
from tidegate.experiments.setting import SimulatedFleet
from tidegate.journal import Journal, read_journal
from tidegate.sim import SimSettings
from tidegate.sim.replay import Compared, JournalReplay, replay_journal
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice

WIDTH = 74


def replay(
    path: Path,
    workload: WorkloadChoice,
    fleet_of: Callable[[int | None], SimulatedFleet],
    system: str,
    settings: SimSettings,
    chunks: str | None,
    *,
    as_json: bool,
) -> None:
    """Simulate the journal's requests and print both. ``fleet_of`` makes the fleet from the journal's size.

    The journal says which system and how many instances, unless ``system`` is given. Raises TraceError for
    what is no journal, ConfigError for options that do not go with one.
    """
    if workload != WorkloadChoice():
        raise ConfigError("--replay brings its own workload: drop --trace, --rate and what else chooses one")
    journal = read_journal(path)
    name = system or journal.system
    if not name:
        raise ConfigError(f"{path} does not name its system; give --system")
    fleet = fleet_of(len(journal.roles) or None)
    made = make_system(name, slo=journal.slo or settings.slo, chunks=chunks)
    try:
        compared = replay_journal(journal, made, fleet.replicas(), settings)
    except TraceError as error:
        raise TraceError(error.message.partition(": ")[2] or error.message, file=str(path)) from None
    for text in compared.run.warnings:
        warn(text)
    if as_json:
        typer.echo(json.dumps(_as_json(compared, name, journal), indent=2, allow_nan=False))
        return
    note(f"simulated with system {name} on {fleet.size} instances of {fleet.title}")
    typer.echo(replay_block(compared, path, name))


def _as_json(compared: JournalReplay, system: str, journal: Journal) -> dict[str, Any]:
    latencies = {name: getattr(compared, name) for name in ("ttft", "tpot", "e2e")}
    return {
        "system": system,
        "requests": compared.requests,
        "left_out": compared.left_out,
        **{name: None if value is None else asdict(value) for name, value in latencies.items()},
        "predicted_flips": compared.predicted_flips,
        "observed_flips": compared.observed_flips,
        "version": journal.version,
    }


def replay_block(compared: JournalReplay, path: Path, system: str) -> str:
    """Return what was predicted beside what a journal observed."""
    left_out = f", {compared.left_out:,} not answered in both" if compared.left_out else ""
    lines = [
        f"{f' {path.name}: {system}, predicted and observed ':=^{WIDTH}}",
        f"{'Requests compared:':<24}{compared.requests:,}{left_out}",
        f"{'Flips:':<24}{compared.predicted_flips} predicted, {compared.observed_flips} observed",
        f"{' Latency (ms) ':-^{WIDTH}}",
        f"{'':<20}{'predicted':>14}{'observed':>14}{'error':>12}",
        *_latency_rows("TTFT", compared.ttft),
        *_latency_rows("TPOT", compared.tpot),
        *_latency_rows("end to end", compared.e2e),
        "=" * WIDTH,
    ]
    return "\n".join(lines)


def _latency_rows(title: str, value: Compared | None) -> list[str]:
    if value is None:
        return [f"{title:<20}{'n/a':>14}{'n/a':>14}{'n/a':>12}"]
    rows = []
    for name in ("mean", "p50", "p99"):
        ours, theirs = getattr(value.predicted, f"{name}_s"), getattr(value.observed, f"{name}_s")
        error = getattr(value, f"{name}_error")
        rows.append(
            f"{f'{title} {name}':<20}{1000 * ours:>14,.1f}{1000 * theirs:>14,.1f}{100 * error:>+10.1f} %"
        )
    return [*rows, f"{'  of one request':<48}{100 * value.request_error:>10.1f} %  (median, either way)"]
