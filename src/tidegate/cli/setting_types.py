"""The types of settings: what may be written, and what is refused in which words.

A check raises ValueError, which pydantic reports with the setting. Rooms that take long to load are imported
by the checks that need them, so that the help does not wait.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from tidegate.core.errors import ConfigError
from tidegate.core.notation import parse_split
from tidegate.core.slo import Slo

R = TypeVar("R")


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
    kinds = (str, int, kind)

    def read(value: object) -> float:
        try:
            if isinstance(value, kinds) and not isinstance(value, bool):
                return kind(value)
        except ValueError:
            pass
        raise ValueError(f"expected a {what}")

    return BeforeValidator(read)


@with_value_errors
def _known_system(name: str) -> str:
    from tidegate.systems import named

    named(name)
    return name


@with_value_errors
def _slo(value: object) -> Slo:
    return value if isinstance(value, Slo) else Slo.parse(str(value))


def _split(value: object) -> tuple[int, int]:
    return parse_split(str(value))


def _words(value: object, what: str) -> list[str]:
    """Return a list of words; as text they stand apart by blanks or commas."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"expected a list of {what}")
    return list(words)


@with_value_errors
def _urls(value: object) -> list[str]:
    from tidegate.fleet.static import server_of

    servers = [server_of(word) for word in _words(value, "URLs")]
    if len({url for url, _ in servers}) < len(servers):
        raise ValueError("a URL is given more than once")
    return [url if role is None else f"{role.label}={url}" for url, role in servers]


@with_value_errors
def _bootstraps(value: object) -> list[str]:
    from tidegate.fleet.static import checked_url

    return [checked_url(word) for word in _words(value, "URLs")]


@with_value_errors
def _groups(value: object) -> list[str]:
    from tidegate.dataplane.replica import parse_groups

    words = _words(value, "PROFILE:N")
    parse_groups(words)
    return words


@with_value_errors
def _profiles(value: object) -> list[str]:
    """Check that each names a profile; a file's path is made absolute, as the model's folder is."""
    from tidegate.costs.named_profile import load_profile

    words = [str(Path(word).resolve()) if _is_file(word) else word for word in _words(value, "profiles")]
    for word in words:
        load_profile(word)
    return words


def _is_file(profile: str) -> bool:
    return profile.endswith(".json") and ":" not in profile


@with_value_errors
def _serve_arguments(value: str) -> str:
    from tidegate.fleet.vllm_command import ServeArguments

    ServeArguments(shlex.split(value))
    return value


def _sendable(value: str) -> str:
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("an API key is one word of printable ASCII, as an HTTP header carries it")
    return value


def _model_folder(value: Path) -> Path:
    if not (value / "config.json").is_file():
        raise ValueError("no such model: expected a folder in the Hugging Face layout, with a config.json")
    return value.resolve()


def _file_path(value: Path) -> Path:
    if value.is_dir():
        raise ValueError("is a folder; expected a file")
    return value


Whole = Annotated[int, _number(int, "whole number")]
Count = Annotated[Whole, Field(ge=1)]
Tokens = Annotated[Whole, Field(ge=16)]
Seconds = Annotated[float, _number(float, "number of seconds"), Field(gt=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, _number(float, "number of milliseconds"), Field(ge=0, allow_inf_nan=False)]
Key = Annotated[str, AfterValidator(_sendable)]
SystemName = Annotated[str, AfterValidator(_known_system)]
Targets = Annotated[Slo, BeforeValidator(_slo)]
Split = Annotated[tuple[int, int], BeforeValidator(_split)]
FilePath = Annotated[Path, AfterValidator(_file_path)]
ModelFolder = Annotated[Path, AfterValidator(_model_folder)]
ServeWords = Annotated[str, AfterValidator(_serve_arguments)]
Groups = Annotated[list[str], BeforeValidator(_groups)]
Bootstraps = Annotated[list[str], BeforeValidator(_bootstraps)]
Profiles = Annotated[list[str], BeforeValidator(_profiles)]
Urls = Annotated[list[str], BeforeValidator(_urls)]
