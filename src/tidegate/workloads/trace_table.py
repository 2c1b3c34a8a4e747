"""The columns of a trace file, and the requests that they describe."""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from operator import itemgetter
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, ValidationError, convert

from tidegate.core.errors import TraceError
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS, Floats, Integers, Workload, array, optional

AZURE_TIME = "TIMESTAMP"
AtLeastZero = Annotated[float, Meta(ge=0, le=sys.float_info.max)]


@dataclass(frozen=True, slots=True)
class TraceTable:
    """The rows of a trace file by column.

    ``lines`` are the rows' line numbers and texts, ``columns`` their values: texts, or plain JSON data with
    None for what a line lacks. ``names`` gives the column of a field of ``TraceRecord`` where its name is
    another. ``place(line's text, column)`` returns where a value starts, from 1. JSON has times in
    milliseconds, and numbers that are no texts.
    """

    file: str
    lines: Sequence[tuple[int, str]]
    columns: Mapping[str, Sequence[Any]]
    names: Mapping[str, str]
    place: Callable[[str, str], int]
    is_json: bool = False

    def name(self, field: str) -> str:
        return self.names.get(field, field)

    def has(self, field: str) -> bool:
        return self.name(field) in self.columns

    def rows(self, rows: Sequence[int]) -> TraceTable:
        """Return the table of some of the rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, lines=[self.lines[row] for row in rows], columns=columns)

    def error(self, row: int, field: str, message: str) -> TraceError:
        """Return a TraceError at a value; ``message`` follows the column's name."""
        line, text = self.lines[row]
        name = self.name(field)
        return TraceError(f"{name} {message}", file=self.file, line=line, column=self.place(text, name))

    def values(self, field: str, kind: Any, expected: str) -> list[Any]:
        """Return a column as values of a type; raises TraceError at the first that is not of it."""
        found = self.columns[self.name(field)]
        try:
            values: list[Any] = convert(found, list[kind], strict=self.is_json)
            return values
        except ValidationError as error:
            place = re.search(r"\$\[(\d+)\]", str(error))
            assert place is not None
            row = int(place[1])
            wrong = "is missing" if found[row] is None else f"is {found[row]!r:.40}"
            raise self.error(row, field, f"{wrong}, expected {expected}") from None

    def integers(self, field: str, minimum: int = 0, empty: int | None = None) -> Integers:
        """Return integers of at least ``minimum``, with ``empty``, if given, where there is no value."""
        kind: Any = Annotated[int, Meta(ge=minimum, le=2**63 - 1)]
        found = self.values(field, kind if empty is None else kind | None, f"an integer >= {minimum}")
        return np.array([empty if value is None else value for value in found], np.int64)

    def seconds(self, field: str, *, optional: bool = False) -> Floats:
        """Return times in seconds, at least 0; NaN for a missing value of an optional column."""
        unit = "milliseconds" if self.is_json else "seconds"
        kind: Any = AtLeastZero | None if optional else AtLeastZero
        found = self.values(field, kind, f"a number of {unit} >= 0")
        return array("delay_s", found) / (1000.0 if self.is_json else 1.0)

    def labels(self, field: str) -> list[str]:
        """Return names; numbers as text, nothing where the file has no such column."""
        name = self.name(field)
        if name not in self.columns:
            return []
        found = self.values(field, str | int | None, "a string") if self.is_json else self.columns[name]
        return ["" if value is None else str(value) for value in found]

    def block_ids(self) -> list[tuple[int, ...]]:
        if not self.has("hash_ids"):
            return []
        found = self.values("hash_ids", tuple[int, ...] | None, "integers")
        return [ids or () for ids in found]


def is_timed(columns: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    """Tell whether a file with these columns has arrival times across sessions."""
    return names.get("arrival_s", "arrival_s") in columns


def requests_of(table: TraceTable, *, recorded: bool = False) -> Workload:
    """Return the requests of a table, in its order. Raises TraceError for the first malformed row.

    Rows without an arrival time have the time since their session's start, or 0. The rows of a recording
    stand in order of completion, and a rejected one may have no output length.
    """
    try:
        return _requests(table, recorded)
    except TraceError as error:
        # Columns are read one after the other: an earlier row may be wrong in a later column.
        earlier = bisect_left(table.lines, error.line, key=itemgetter(0))
        requests_of(table.rows(range(earlier)), recorded=recorded)
        raise


def _requests(table: TraceTable, recorded: bool) -> Workload:
    return Workload(
        _arrivals(table, ordered=not recorded),
        table.integers("input_tokens", 1),
        np.maximum(1, table.integers("output_tokens", empty=1 if recorded else None)),
        optional("hash_ids", table.block_ids()),
        table.integers("block_tokens", 1, MOONCAKE_BLOCK_TOKENS) if table.has("block_tokens") else None,
        optional("session_id", table.labels("session_id")),
        table.integers("turn", empty=0) if table.has("turn") else None,
        table.seconds("delay_s", optional=True) if table.has("delay_s") else None,
        optional("slo_class", table.labels("slo_class")),
        optional("client_id", table.labels("client_id")),
    )


def _arrivals(table: TraceTable, *, ordered: bool) -> Floats:
    if not is_timed(table.columns, table.names):
        return table.seconds("session_t_s") if table.has("session_t_s") else np.zeros(len(table.lines))
    name = table.name("arrival_s")
    arrival_s = _azure_times(table) if name == AZURE_TIME else table.seconds("arrival_s")
    late = np.flatnonzero(np.diff(arrival_s) < 0)
    if len(late) and ordered:
        row = int(late[0]) + 1
        message = f"is {table.columns[name][row]!r}, earlier than the row before; sort by arrival"
        raise table.error(row, "arrival_s", message)
    return arrival_s


def _azure_times(table: TraceTable) -> Floats:
    """Return seconds from the first row."""
    times = []
    for row, text in enumerate(table.columns[AZURE_TIME]):
        try:
            times.append(datetime.fromisoformat(text))
        except ValueError:
            message = f"is {text!r}, expected a date and time like '2023-11-16 18:15:46.680590'"
            raise table.error(row, "arrival_s", message) from None
    return np.array([(time - times[0]).total_seconds() for time in times], np.float64)
