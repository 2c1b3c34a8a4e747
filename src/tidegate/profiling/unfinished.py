"""What an interrupted measurement has: a file from which the same command goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from tidegate.core.errors import ConfigError
from tidegate.costs.fitting import MixedSample, StepSample


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What was timed of the instance ``of`` in ``spent_s`` seconds of the budget.

    ``ttft`` has new tokens, cached tokens and all repeats; ``sessions`` are the batches and contexts that
    were decoded.
    """

    of: tuple[str, ...]
    spent_s: float
    max_batch_tokens: int | None
    notes: list[str]
    ttft: list[tuple[int, int, list[float]]]
    step: list[StepSample]
    mixed: list[MixedSample]
    sessions: list[tuple[int, int]]


def unfinished_path(path: Path) -> Path:
    """Return where an interrupted measurement for ``path`` is kept."""
    return path.with_name(f"{path.name}.part")


def keep_unfinished(path: Path, found: Unfinished) -> None:
    """Write the file. Raises ConfigError when it cannot be written."""
    try:
        path.write_bytes(msgspec.json.encode(found))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def read_unfinished(path: Path, of: tuple[str, ...]) -> Unfinished | None:
    """Return what is kept of this instance; None where there is no such file, or it is of another one."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Unfinished)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.of == of else None
