"""What ``--profile`` names: a packaged profile, a measured one's file, a derived one."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.core.errors import ConfigError
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.costs.parallel import gpu_name, profiles_on, roofline_of

if TYPE_CHECKING:
    from tidegate.costs.saved_profile import SavedProfile


OLD_DAYS = 30.0
"""Age in days from which a measured profile is called old: drivers, engines and clocks change (ours)."""


def load_profile(name_or_file: str) -> PackagedProfile:
    """Return the profile that a user named.

    ``gpu/model[/tpN][@engine]`` is a packaged one; a path ending in ``.json`` is a file that
    ``tidegate profile`` wrote; ``hardware:gpu/model[/tpN]`` is fitted to aiconfigurator's tables, which the
    extra ``hardware`` installs; ``scaled:gpu/model[/tpN]`` is a packaged one scaled to another size or GPU;
    ``roofline:gpu/FOLDER_OR_CONFIG.json[/tpN]`` is derived from nominal figures. Raises ConfigError for what
    does not exist.
    """
    kind, colon, rest = name_or_file.partition(":")
    if colon and kind in DERIVED:
        return DERIVED[kind](name_or_file, *_parts(name_or_file, rest))
    saved = measured_profile(name_or_file)
    return packaged_profile(name_or_file) if saved is None else as_packaged(saved)


def measured_profile(name_or_file: str) -> SavedProfile | None:
    """Return the measured profile that a user named; None for one of another kind. Raises ConfigError."""
    if not name_or_file.endswith(".json") or name_or_file.partition(":")[0] in DERIVED:
        return None
    from tidegate.costs.saved_profile import read_profile

    return read_profile(Path(name_or_file))


def profile_line(saved: SavedProfile, now: datetime) -> str:
    """Say in a line what was measured, and how long ago."""
    where = f", {saved.hardware}" if saved.hardware else ""
    links = f", {len(saved.links)} links" if saved.links else ""
    return f"{saved.model} on {saved.engine}{where}{links}, measured {saved.age_days(now):.1f} days ago"


def profile_warnings(saved: SavedProfile, model: str, now: datetime) -> list[str]:
    """Return what speaks against using a measured profile for servers of ``model``."""
    warnings = []
    if saved.age_days(now) > OLD_DAYS:
        warnings.append(f"the profile was measured {saved.age_days(now):.0f} days ago: measure it again")
    if saved.model != model:
        warnings.append(
            f"the profile was measured with the model {saved.model!r}, the servers serve {model!r}"
        )
    return warnings


def _parts(name: str, rest: str) -> tuple[str, str, int]:
    """Split ``gpu/model[/tpN]``; the model may hold slashes."""
    found = re.fullmatch(r"([^/]+)/(.+?)(?:/tp([1-9]\d{0,2}))?/?", rest)
    if not found:
        raise ConfigError(f"{name!r} is not KIND:GPU/MODEL[/tpN], as in roofline:l4/models/qwen/tp2")
    return found[1], found[2], int(found[3] or 1)


def _hardware(name: str, gpu: str, model: str, tp: int) -> PackagedProfile:
    from tidegate.costs.hardware import hardware_profile

    return hardware_profile(gpu, model, tp)


def _scaled(name: str, gpu: str, model: str, tp: int) -> PackagedProfile:
    found = profiles_on(gpu_name(gpu), model, [tp])[tp]
    return found if found.name == name else replace(found, profile=replace(found.profile, name=name))


DERIVED = {"hardware": _hardware, "roofline": roofline_of, "scaled": _scaled}
"""Kinds of profiles that are named by what they are derived from."""


def as_packaged(saved: SavedProfile) -> PackagedProfile:
    """Return a measured profile in the shape of the packaged ones; what was not measured is in the note."""
    profile = saved.profile
    notes = [f"measured at {saved.url} on {saved.created}", *saved.notes]
    if not saved.kv_bytes_per_token:
        notes.append("KV bytes per token are unknown: transfers cost their latency only")
    return PackagedProfile(
        profile,
        saved.model,
        saved.kv_bytes_per_token,
        saved.kv_capacity_tokens,
        profile.transfer,
        "; ".join(notes),
    )
