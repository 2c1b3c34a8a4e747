"""The reader of journals, whichever version wrote them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import msgspec

from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.slo import Slo
from tidegate.journal.schema import (
    LINES,
    ControlLine,
    DecisionLine,
    FlipLine,
    ForecastLine,
    HeaderLine,
    InstanceLine,
    JournalLine,
    OutcomeLine,
)
from tidegate.workloads.source import parse_object, read_lines

Line = TypeVar("Line")

_EXPECTED = {
    "float": "a number",
    "int": "an integer",
    "str": "a string",
    "object": "an object",
    "array": "a list",
}
"""What a user is told in place of msgspec's names of types."""


@dataclass(slots=True)
class Journal:
    """A journal read into memory, decisions reduced to counts.

    ``system``, ``version``, ``slo`` and ``roles``, the labels by instance at the start, are those of the last
    run; the rest is of all. ``unfinished`` counts requests with a decision but no outcome. ``truncated`` says
    that the last line is cut off.
    """

    system: str = ""
    version: str = ""
    slo: Slo | None = None
    roles: dict[str, str] = field(default_factory=dict)
    outcomes: list[OutcomeLine] = field(default_factory=list)
    flips: list[FlipLine] = field(default_factory=list)
    controls: list[ControlLine] = field(default_factory=list)
    forecasts: list[ForecastLine] = field(default_factory=list)
    instance_events: list[InstanceLine] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    last_t_s: float = 0.0
    truncated: bool = False


class RecordedLines(Generic[Line]):
    """The lines of a JSONL recording in file order, each as ``schemas`` has it by its ``type``; iterate once.

    Lines of an unknown type are left out.

    Half a last line, as a killed writer leaves it, ends the iteration and sets ``truncated``. A line that is
    broken anywhere else, or has a value of the wrong type, raises TraceError with its place.
    """

    def __init__(self, path: str | Path, schemas: Mapping[str, type[Line]]) -> None:
        self.path = str(path)
        self.truncated = False
        self._schemas = schemas

    def __iter__(self) -> Iterator[Line]:
        broken: TraceError | None = None
        for number, text in read_lines(self.path):
            if broken is not None:
                raise broken
            if not text.strip():
                continue
            try:
                value = parse_object(self.path, number, text)
            except TraceError as error:
                broken = error
                continue
            line = decode_line(value, text, self.path, number, self._schemas)
            if line is not None:
                yield line
        self.truncated = broken is not None


class JournalLines(RecordedLines[JournalLine]):
    """The lines of a journal."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, LINES)


def recorded_kind(path: str | Path) -> str:
    """Return the ``type`` of a recording's first line, "" where there is none; TraceError for no file."""
    first = next((text for _, text in read_lines(str(path)) if text.strip()), "")
    try:
        kind = parse_object(str(path), 1, first).get("type")
    except TraceError:
        return ""
    return kind if isinstance(kind, str) else ""


def is_yet_to_come(recording: Path, journal: Path | None) -> bool:
    """Tell whether a recording is the journal that a run is going to write, of which there is nothing yet."""
    if journal is None or journal.resolve() != recording.resolve():
        return False
    return not recording.exists() or (recording.is_file() and recording.stat().st_size == 0)


def read_journal(path: str | Path) -> Journal:
    """Read a journal. Raises TraceError for a broken or mistyped line, and for a file without a header."""
    lines = JournalLines(path)
    journal = Journal()
    decided: set[str] = set()
    ended: set[str] = set()
    seen_header = False
    for line in lines:
        journal.last_t_s = max(journal.last_t_s, line.t_s)
        match line:
            case HeaderLine():
                seen_header = True
                journal.system, journal.version, journal.slo = line.system, line.version, line.slo
                journal.roles = {instance.id: instance.role for instance in line.instances}
            case OutcomeLine():
                journal.outcomes.append(line)
                ended.add(line.request)
            case DecisionLine():
                journal.decisions[line.label] += 1
                decided.add(line.request)
            case FlipLine():
                journal.flips.append(line)
            case ControlLine():
                journal.controls.append(line)
            case ForecastLine():
                journal.forecasts.append(line)
            case InstanceLine():
                journal.instance_events.append(line)
    if not seen_header:
        raise TraceError("this is not a journal: it has no 'header' line", file=str(path), line=1)
    journal.unfinished = len(decided - ended)
    journal.truncated = lines.truncated
    return journal


def decode_line(
    value: dict[str, Any], text: str, file: str, number: int, schemas: Mapping[str, type[Line]]
) -> Line | None:
    """Return the line that a JSON object stands for, None for one of a type that ``schemas`` does not have.

    Null is alike to absent, and unknown keys are ignored. ``text``, ``file`` and ``number`` are the object's
    source, for the place of an error. Raises TraceError for a missing or mistyped value.
    """
    kind = value.get("type")
    schema = schemas.get(kind) if isinstance(kind, str) else None
    if schema is None:
        return None
    try:
        return msgspec.convert({key: item for key, item in value.items() if item is not None}, schema)
    except (msgspec.ValidationError, ConfigError) as error:
        raise _placed(str(error), schema, value, text, file, number) from None


def _placed(
    message: str, schema: type[Any], value: dict[str, Any], text: str, file: str, number: int
) -> TraceError:
    """Return the error at the place of the value that msgspec's message is about."""
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        return TraceError(f"the {value['type']!r} line lacks {missing[1]}", file=file, line=number)
    key = "slo"  # the one value that checks more than its type
    at = re.search(r" - at `\$\.(\w+)", message)
    if at:
        key = at[1]
        wanted = re.search(r"Expected `(\w+)", message)
        if wanted:
            expected = _EXPECTED.get(wanted[1], wanted[1])
        else:
            expected = f"one of {', '.join(get_args(get_type_hints(schema)[key]))}"
        message = f"{key} is {value[key]!r}, expected {expected}"
    found = re.search(rf'"{re.escape(key)}"\s*:\s*', text)
    return TraceError(message, file=file, line=number, column=found.end() + 1 if found else 0)
