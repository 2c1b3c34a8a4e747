"""The file of a measured profile: written by ``tidegate profile``, read wherever a profile is named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_type_hints

from msgspec import convert

from tidegate.core.errors import ConfigError
from tidegate.costs.profile import Profile

FORMAT = "tidegate-profile"
VERSION = 2


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Relative errors of one form on ``points`` that its fit did not see."""

    form: str
    p50: float
    p95: float
    points: int


@dataclass(frozen=True, slots=True)
class LinkSample:
    """One prompt's transfer: medians over repeats. ``read_s`` is the connector's own time, None if untold."""

    tokens: int
    n_bytes: int
    seconds: float
    read_s: float | None = None


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """The way of KV from ``source`` to ``target``, two URLs.

    ``by`` says how ``latency_s`` and ``bytes_per_s`` were found, ``read_*`` are those of the connector's own
    times (None where it tells none), and ``error_p50`` is the fit's median relative error.
    """

    source: str
    target: str
    by: str
    latency_s: float
    bytes_per_s: float
    error_p50: float
    read_latency_s: float | None
    read_bytes_per_s: float | None
    samples: tuple[LinkSample, ...]


@dataclass(frozen=True, slots=True)
class SavedProfile:
    """A profile measured on one live instance, with what else the measurement showed.

    Host time is part of the steps, so that a simulation of this profile adds none. ``max_batch_tokens`` is
    what the instance computes in one step at most, None when no prompt was long enough to show it. ``links``
    are the ways on which KV was moved, and ``profile.transfer`` fits all of them; ``kv_bytes_per_token`` is 0
    without any. ``created`` is ISO 8601 in UTC; ``engine`` is a name and a version; ``hardware`` is a GPU or
    CPU, empty where unknown; ``samples`` are the medians that were fitted, by form.
    """

    profile: Profile
    created: str
    tidegate: str
    url: str
    model: str
    engine: str
    hardware: str
    max_model_len: int
    block_tokens: int
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    max_batch_tokens: int | None
    held_out: tuple[HeldOut, ...]
    notes: tuple[str, ...]
    samples: dict[str, list[dict[str, float]]]
    links: tuple[MeasuredLink, ...] = ()

    def age_days(self, now: datetime) -> float:
        """Return the days since it was measured."""
        return (now - datetime.fromisoformat(self.created)).total_seconds() / 86400.0

    def to_json(self) -> dict[str, Any]:
        """Return the file's object: the keys that ``Profile.from_json`` reads, and the rest."""
        rest = asdict(self)
        del rest["profile"]
        return {"format": FORMAT, "version": VERSION, **self.profile.to_json(), **rest}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SavedProfile:
        """Build it from the file's object. Raises ConfigError for another format or a missing key.

        Version 1 knew neither links nor hardware.
        """
        if data.get("format") != FORMAT:
            raise ConfigError("not a profile that `tidegate profile` wrote: it has no format mark")
        if data.get("version") not in (1, VERSION):
            raise ConfigError(
                f"the profile has format version {data.get('version')}, this tidegate reads up to {VERSION}; "
                "measure it again with `tidegate profile`"
            )
        kinds = get_type_hints(cls) | {"profile": Any}
        values = {"tidegate": "", "hardware": "", **data, "profile": None}
        try:
            saved = cls(**{name: convert(values[name], kinds[name]) for name in kinds if name in values})
            return replace(
                saved,
                profile=Profile.from_json(data),
                created=datetime.fromisoformat(saved.created).isoformat(),
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the profile is damaged: {error}") from None


def save_profile(path: Path, saved: SavedProfile) -> None:
    """Write the file. Raises ConfigError when it cannot be written."""
    try:
        path.write_text(json.dumps(saved.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def is_profile(path: Path) -> bool:
    """Tell whether a file carries the mark of a measured profile, of whatever version."""
    try:
        return _read_object(path).get("format") == FORMAT
    except ConfigError:
        return False


def read_profile(path: Path) -> SavedProfile:
    """Read the file. Raises ConfigError, naming it, when it is not there or not what it should be."""
    data = _read_object(path)
    try:
        return SavedProfile.from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a profile: it holds no JSON object")
    return data
