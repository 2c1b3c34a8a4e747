"""What ``--profile`` names: a packaged profile, a measured one's file, a derived one."""

from __future__ import annotations

from pathlib import Path

from tidegate.bench.saved_profile import SavedProfile, read_profile
from tidegate.costs.library import PackagedProfile, packaged_profile


def load_profile(name_or_file: str) -> PackagedProfile:
    """Return the profile that a user named.

    ``gpu/model[/tpN][@engine]`` is a packaged one; a path ending in ``.json`` is a file that
    ``tidegate profile`` wrote. Raises ConfigError for what does not exist.
    """
    if name_or_file.endswith(".json"):
        return as_packaged(read_profile(Path(name_or_file)))
    return packaged_profile(name_or_file)


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
