"""The types of settings: what may be written, and what is refused in which words.

A check raises ValueError, which pydantic reports with the setting. Rooms that take long to load are imported
by the checks that need them, so that the help does not wait.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import wraps
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from tidegate.core.errors import ConfigError
from tidegate.core.notation import FleetRange, parse_range, parse_split
from tidegate.core.slo import Slo

R = TypeVar("R")
MOST_PROCESSES = 256
"""More engines than any machine runs."""


def with_value_errors(read: Callable[..., R]) -> Callable[..., R]:
    """Return ``read`` as pydantic takes it: what it refuses is a ValueError."""

    @wraps(read)
    def reading(*args: Any) -> R:
        try:
            return read(*args)
        except ConfigError as error:
            raise ValueError(error.message) from None

    return reading


def _number(kind: type[int | float], what: str) -> BeforeValidator:
    """Return the check that a value is a number, or is written as one; true and false are none."""

    def read(value: object) -> float:
        try:
            if isinstance(value, str | int | kind) and not isinstance(value, bool):
                return kind(value)
        except ValueError:
            pass
        raise ValueError(f"expected a {what}")

    return BeforeValidator(read)


def _known_system(name: str) -> str:
    from tidegate.systems import named

    named(name)
    return name


def _words(value: object, what: str) -> list[str]:
    """Return a list of words; as text they stand apart by blanks or commas."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"expected a list of {what}")
    return list(words)


def _urls(value: object) -> list[str]:
    from tidegate.fleet.static import server_of

    servers = [server_of(word) for word in _words(value, "URLs")]
    if len({url for url, _ in servers}) < len(servers):
        raise ValueError("a URL is given more than once")
    return [url if role is None else f"{role.label}={url}" for url, role in servers]


def _origins(value: object) -> list[str]:
    words = _words(value, "origins")
    for word in words:
        if word != "*" and not re.fullmatch(r"https?://[^/?#\s]+", word):
            raise ValueError(f"{word!r} is no origin, as https://chat.example is, nor *")
    return words


def _shares(value: object) -> list[str]:
    from tidegate.policies.shares import parse_shares

    words = _words(value, "TENANT=WEIGHT")
    parse_shares(words)
    return words


def _fields(value: object) -> list[str]:
    from tidegate.protocol.parameters import GUARDABLE

    words = _words(value, "fields")
    for word in words:
        if word not in GUARDABLE:
            raise ValueError(f"{word!r} is none of {', '.join(sorted(GUARDABLE))}")
    return words


def _networks(value: object) -> list[str]:
    words = _words(value, "addresses")
    for word in words:
        ip_network(word, strict=False)
    return words


def _bootstraps(value: object) -> list[str]:
    from tidegate.fleet.static import checked_url

    return [checked_url(word) for word in _words(value, "URLs")]


def _groups(value: object) -> list[str]:
    from tidegate.dataplane.replica import parse_groups

    words = _words(value, "PROFILE:N")
    parse_groups(words)
    return words


def _profiles(value: object) -> list[str]:
    """Check that each names a profile; a file's path is made absolute, as the model's folder is."""
    from tidegate.costs.named_profile import load_profile

    words = _words(value, "profiles")
    for word in words:
        load_profile(word)
    return [
        str(Path(word).resolve()) if word.endswith(".json") and ":" not in word else word for word in words
    ]


def _serve_arguments(value: str) -> str:
    from tidegate.fleet.vllm import ServeArguments

    ServeArguments(shlex.split(value))
    return value


def _sendable(value: str) -> str:
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("an API key is one word of printable ASCII, as an HTTP header carries it")
    return value


def _model_folder(value: Path) -> Path:
    """Return the folder, absolute, or a model's name as it is."""
    from tidegate.cli.model import NAMED

    if (value / "config.json").is_file():
        return value.resolve()
    if str(value) not in NAMED:
        raise ValueError(
            "no such model: expected a folder in the Hugging Face layout, with a config.json, or "
            + " or ".join(NAMED)
        )
    return value


def _file_path(value: Path) -> Path:
    if value.is_dir():
        raise ValueError("is a folder; expected a file")
    return value


def _recording(value: Path, info: ValidationInfo) -> Path:
    """Return the file, absolute. ``info.context`` is the journal that the run writes: on its first start that
    may be named before it is there."""
    from tidegate.journal.reader import is_yet_to_come

    journal = None if info.context is None else Path(str(info.context))
    if not value.is_file() and not is_yet_to_come(value, journal):
        raise ValueError("there is no such file")
    return value.resolve()


def _range(value: object) -> FleetRange:
    found = value if isinstance(value, FleetRange) else parse_range(str(value))
    if found.most > MOST_PROCESSES:
        raise ValueError(f"expected at most {MOST_PROCESSES} instances")
    return found


def _multiple(value: float) -> float:
    if 0 < value < 1:
        raise ValueError("expected at least 1, or 0")
    return value


def _before(read: Callable[[Any], object]) -> BeforeValidator:
    return BeforeValidator(with_value_errors(read))


def _after(check: Callable[[Any], object]) -> AfterValidator:
    return AfterValidator(with_value_errors(check))


Whole = Annotated[int, _number(int, "whole number")]
Count = Annotated[Whole, Field(ge=1)]
Tokens = Annotated[Whole, Field(ge=16)]
Seconds = Annotated[float, _number(float, "number of seconds"), Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, _number(float, "number"), Field(gt=0, allow_inf_nan=False)]
Delay = Annotated[float, _number(float, "number of seconds"), Field(ge=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, _number(float, "number of milliseconds"), Field(ge=0, allow_inf_nan=False)]
Multiple = Annotated[float, _number(float, "number"), Field(ge=0, allow_inf_nan=False), _after(_multiple)]
Key = Annotated[str, _after(_sendable)]
SystemName = Annotated[str, _after(_known_system)]
ProfileName = Annotated[str, _after(lambda value: _profiles([value])[0])]
Targets = Annotated[Slo, _before(lambda value: value if isinstance(value, Slo) else Slo.parse(str(value)))]
Split = Annotated[tuple[int, int], _before(lambda value: parse_split(str(value)))]
InstanceRange = Annotated[FleetRange, _before(_range)]
"""The least and the most instances of a fleet; N is both."""
FilePath = Annotated[Path, _after(_file_path)]
Recording = Annotated[Path, AfterValidator(_recording)]
ModelFolder = Annotated[Path, _after(_model_folder)]
ServeWords = Annotated[str, _after(_serve_arguments)]
Groups = Annotated[list[str], _before(_groups)]
Fields = Annotated[list[str], _before(_fields)]
Networks = Annotated[list[str], _before(_networks)]
Origins = Annotated[list[str], _before(_origins)]
Shares = Annotated[list[str], _before(_shares)]
Bootstraps = Annotated[list[str], _before(_bootstraps)]
Profiles = Annotated[list[str], _before(_profiles)]
Urls = Annotated[list[str], _before(_urls)]
Words = Annotated[list[str], _before(lambda value: _words(value, "words"))]
