"""``tidegate profile --list``: the packaged profiles, and the measured ones with their age."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from tidegate.core.errors import ConfigError
from tidegate.costs.library import packaged_profile, profile_names
from tidegate.costs.named_profile import OLD_DAYS, profile_line
from tidegate.costs.saved_profile import SavedProfile, is_profile, read_profile


def show_profiles(paths: Sequence[Path], as_json: bool) -> None:
    """Print the packaged profiles and the measured ones at ``paths``, files or folders of some.

    Raises ConfigError for a path that does not exist, or a file that is no profile.
    """
    measured = _measured_at(paths)
    now = datetime.now(UTC)
    if as_json:
        rows = [*_packaged_rows(), *(_measured_row(path, saved, now) for path, saved in measured)]
        typer.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    _show_packaged()
    if measured:
        typer.echo()
        _show_measured(measured, now)
    typer.echo(
        "\nOr a file of `tidegate profile --out`, hardware:GPU/MODEL[/tpN], roofline:GPU/CONFIG.json[/tpN]."
    )


def _measured_at(paths: Sequence[Path]) -> list[tuple[Path, SavedProfile]]:
    found = []
    for path in paths:
        if path.is_dir():
            # Whatever else lies in a folder is no profile, and a broken one is told when it is named.
            files = [file for file in sorted(path.glob("*.json")) if is_profile(file)]
        elif path.exists():
            files = [path]
        else:
            raise ConfigError(f"no such file or folder: {path}")
        found += [(file, read_profile(file)) for file in files]
    return found


def _packaged_rows() -> list[dict[str, Any]]:
    found = [packaged_profile(name) for name in profile_names()]
    return [
        {
            "name": each.name,
            "prefill_2048_s": float(each.profile.prefill_s(2048)),
            "step_32x2048_s": float(each.profile.step.seconds(32, 32 * 2048)),
            "kv_capacity_tokens": each.kv_capacity_tokens,
            "mixed_measured": each.mixed_measured,
            "note": each.note,
        }
        for each in found
    ]


def _measured_row(path: Path, saved: SavedProfile, now: datetime) -> dict[str, Any]:
    return {
        "file": str(path),
        "name": saved.profile.name,
        "model": saved.model,
        "engine": saved.engine,
        "hardware": saved.hardware,
        "tidegate": saved.tidegate,
        "created": saved.created,
        "age_days": round(saved.age_days(now), 2),
        "prefill_2048_s": float(saved.profile.prefill_s(2048)),
        "step_32x2048_s": float(saved.profile.step.seconds(32, 32 * 2048)),
        "kv_capacity_tokens": saved.kv_capacity_tokens,
        "links": [
            {key: value for key, value in asdict(link).items() if key != "samples"} for link in saved.links
        ],
        "notes": list(saved.notes),
    }


def _show_packaged() -> None:
    rows = _packaged_rows()
    width = max(len(row["name"]) for row in rows)
    typer.echo(f"{'name':<{width}}  {'prefill 2,048':>13}  {'step 32x2,048':>13}  {'KV tokens':>9}")
    for row in rows:
        times = f"{1000 * row['prefill_2048_s']:>10.1f} ms  {1000 * row['step_32x2048_s']:>10.1f} ms"
        typer.echo(f"{row['name']:<{width}}  {times}  {row['kv_capacity_tokens']:>9,}")


def _show_measured(measured: Sequence[tuple[Path, SavedProfile]], now: datetime) -> None:
    width = max(len(str(path)) for path, _ in measured)
    typer.echo("measured")
    for path, saved in measured:
        old = " (old: measure it again)" if saved.age_days(now) > OLD_DAYS else ""
        typer.echo(f"{path!s:<{width}}  {profile_line(saved, now)}{old}")
