"""What a command may write over: nothing but its own output, which each kind of file tells of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tidegate.core.errors import ConfigError

HEAD_BYTES = 1 << 20
MARKS = {
    "bench": re.compile(rb'\A\{"type":"bench"'),
    "profile": re.compile(rb'\A\{\s*"format": *"tidegate-profile"'),
    "trace forecast": re.compile(rb"\A(\x89PNG|%PDF|<\?xml).*tidegate trace forecast", re.DOTALL),
    "trace info": re.compile(rb"\A(\x89PNG|%PDF|<\?xml).*tidegate trace info", re.DOTALL),
}
"""By what a file's beginning tells the command that wrote it; pages of ours name theirs."""
PAGE = re.compile(rb'<meta name="generator" content="tidegate ([a-z]+)">')


def claim_file(path: Path, command: str, flag: str = "--out") -> None:
    """Raise ConfigError unless ``command`` may write ``path``: a folder is there, and no file but its own."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: give a file in a folder that exists")
    if not _is_free(path, command):
        raise ConfigError(f"{flag} {path} exists and {_stranger(path, command)}; it is not written over")


def claim_folder(folder: Path, command: str, page: str, others: Sequence[str]) -> None:
    """Make a folder for the ``page`` of ``command`` and the ``others`` beside it.

    Raises ConfigError where none can be made, or has such files of another command: better before a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: no such folder can be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder}: no permission to write there")
    if _written_by(folder / page) == command:
        return
    for path in (folder / page, *(folder / name for name in others)):
        if not _is_free(path, command):
            told = f"{path.name}, which {_stranger(path, command)}"
            raise ConfigError(f"--out {folder} has {told}; give another folder")


def _is_free(path: Path, command: str) -> bool:
    # A device, as /dev/null, takes anything; of an empty file nothing is lost.
    return not path.is_file() or not path.stat().st_size or _written_by(path) == command


def _written_by(path: Path) -> str:
    """Return the command that wrote a file, "" where that is unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""
    page = PAGE.search(head)
    if page is not None:
        return page[1].decode()
    return next((command for command, mark in MARKS.items() if mark.search(head)), "")


def _stranger(path: Path, command: str) -> str:
    other = _written_by(path)
    return f"is of `tidegate {other}`" if other else f"is not of `tidegate {command}`"
