"""What ``--profile`` names: a packaged profile, a measured one's file, a derived one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.core.errors import ConfigError
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.costs.roofline import Shape, roofline_profile

if TYPE_CHECKING:
    from tidegate.bench.saved_profile import SavedProfile


def load_profile(name_or_file: str) -> PackagedProfile:
    """Return the profile that a user named.

    ``gpu/model[/tpN][@engine]`` is a packaged one; a path ending in ``.json`` is a file that
    ``tidegate profile`` wrote; ``hardware:gpu/model[/tpN]`` is fitted to aiconfigurator's tables, which the
    extra ``hardware`` installs; ``roofline:gpu/FOLDER_OR_CONFIG.json[/tpN]`` is derived from
    nominal figures. Raises ConfigError for what does not exist.
    """
    kind, colon, rest = name_or_file.partition(":")
    if colon and kind in DERIVED:
        return DERIVED[kind](name_or_file, *_parts(name_or_file, rest))
    if name_or_file.endswith(".json"):
        from tidegate.bench.saved_profile import read_profile  # brings an HTTP client along

        return as_packaged(read_profile(Path(name_or_file)))
    return packaged_profile(name_or_file)


def _parts(name: str, rest: str) -> tuple[str, str, int]:
    """Split ``gpu/model[/tpN]``; the model may hold slashes."""
    found = re.fullmatch(r"([^/]+)/(.+?)(?:/tp([1-9]\d{0,2}))?/?", rest)
    if not found:
        raise ConfigError(f"{name!r} is not KIND:GPU/MODEL[/tpN], as in roofline:l4/models/qwen/tp2")
    return found[1], found[2], int(found[3] or 1)


def _hardware(name: str, gpu: str, model: str, tp: int) -> PackagedProfile:
    from tidegate.costs.hardware import hardware_profile

    return hardware_profile(gpu, model, tp)


def _roofline(name: str, gpu: str, model: str, tp: int) -> PackagedProfile:
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model's {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    label = path.parent.resolve().name if path.name == "config.json" else path.stem
    return roofline_profile(name, gpu, Shape.from_config(config), model=label, tp=tp)


DERIVED = {"hardware": _hardware, "roofline": _roofline}
"""Kinds of profiles that are named by what they are derived from."""


def as_packaged(saved: SavedProfile) -> PackagedProfile:
    """Return a measured profile in the shape of the packaged ones; what was not measured is in the note."""
    profile = saved.profile
    notes = [f"measured at {saved.url} on {saved.created}", *saved.notes]
    if not saved.kv_bytes_per_token:
        notes.append("KV bytes per token are unknown: transfers cost their latency only")
    return PackagedProfile(
        name=profile.name,
        profile=profile,
        gpu="",
        model=saved.model,
        tp=1,
        engine=saved.engine,
        kv_bytes_per_token=saved.kv_bytes_per_token,
        kv_capacity_tokens=saved.kv_capacity_tokens,
        weight_gb=None,
        intra_node=profile.transfer,
        inter_node=profile.transfer,
        mixed_measured=any(form == "mixed" for form, _, _ in profile.errors),
        max_errors=(),
        note="; ".join(notes),
    )
