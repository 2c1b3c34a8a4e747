"""A request of a trace, and a whole workload as columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, cast, overload

import numpy as np
from numpy.typing import NDArray

MOONCAKE_BLOCK_TOKENS = 512
ROWS_AT_ONCE = 4096
"""Rows that iteration takes out of the columns at once."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Objects = NDArray[np.object_]
Rows = slice | NDArray[np.bool_] | NDArray[np.intp]


class TraceRecord(NamedTuple):
    """When a request arrives and how large it is; never its text.

    ``arrival_s`` counts from the start of the trace. ``hash_ids`` name the prompt's blocks of
    ``block_tokens`` tokens, the last one partial: two prompts share a prefix exactly as far as their
    leading ids agree. More ids than the prompt needs go on into the answer: a later prompt with these ids
    repeats the answer, too. ``turn`` counts a session's requests from 0; ``session_id`` may be
    ``SESSION/AGENT``: the agents of a session share its clock and prefixes, but each waits only for its
    own answers. ``delay_s`` is the client's pause between the previous answer and this turn, where the
    source publishes it. Empty strings mean "not given".
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    session_id: str = ""
    turn: int = 0
    delay_s: float | None = None
    slo_class: str = ""
    client_id: str = ""


DEFAULTS = TraceRecord(0.0, 0, 0)
DTYPES = {
    name: np.int64 if isinstance(value, int) else np.object_ if isinstance(value, str | tuple) else np.float64
    for name, value in DEFAULTS._asdict().items()
}
"""The type of each column; tuples and strings are objects, so that rows share them."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload(Sequence[TraceRecord]):
    """Requests as columns: one array per field of ``TraceRecord``, all of one length.

    A column that is None has the field's default in every row; ``delay_s`` is NaN where a record's is None.
    Arrays are never changed: what changes a workload returns another one, which may share columns with it.
    As a sequence it holds records; a slice, a mask or an array of row numbers selects a workload.
    """

    arrival_s: Floats
    input_tokens: Integers
    output_tokens: Integers
    hash_ids: Objects | None = None
    block_tokens: Integers | None = None
    session_id: Objects | None = None
    turn: Integers | None = None
    delay_s: Floats | None = None
    slo_class: Objects | None = None
    client_id: Objects | None = None

    @classmethod
    def of(cls, records: Iterable[TraceRecord]) -> Workload:
        """Return the records as columns; a workload as it is."""
        if isinstance(records, Workload):
            return records
        columns = zip(*records, strict=True)
        return cls(*(optional(name, list(next(columns, ()))) for name in DTYPES))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Workload]) -> Workload:
        """Put workloads one after the other as they are; without parts, return an empty one."""
        if len(parts) < 2:
            return parts[0] if parts else cls.of(())
        columns = (
            np.concatenate([part.column(name) for part in parts])
            if any(getattr(part, name) is not None for part in parts)
            else None
            for name in DTYPES
        )
        return cls(*cast("Iterator[Any]", columns))

    def column(self, name: str) -> NDArray[Any]:
        """Return a column by its field's name, with the default in every row where there is none."""
        found = getattr(self, name)
        return array(name, repeat(getattr(DEFAULTS, name), len(self))) if found is None else found

    def has(self, name: str) -> bool:
        """Tell whether some request has another value in a column than the default."""
        column = getattr(self, name)
        return column is not None and optional(name, column.tolist()) is not None

    def units(self) -> Integers:
        """Return for each row the number of its session, in order of first appearance.

        The agents of a session share its number; a row without a session has one of its own.
        """
        if self.session_id is None:
            return np.arange(len(self))
        numbers: dict[str | int, int] = {}
        sessions = (name.partition("/")[0] for name in self.session_id)
        return np.fromiter(
            (numbers.setdefault(name or row, len(numbers)) for row, name in enumerate(sessions)),
            np.int64,
            len(self),
        )

    def __len__(self) -> int:
        return len(self.arrival_s)

    @overload
    def __getitem__(self, rows: int) -> TraceRecord: ...
    @overload
    def __getitem__(self, rows: Rows) -> Workload: ...
    def __getitem__(self, rows: int | Rows) -> TraceRecord | Workload:
        if isinstance(rows, int):
            row = range(len(self))[rows]
            return next(self._records(row, row + 1))
        columns = (getattr(self, name) for name in DTYPES)
        return Workload(*cast("Iterator[Any]", (c if c is None else c[rows] for c in columns)))

    def __iter__(self) -> Iterator[TraceRecord]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self._records(start, start + ROWS_AT_ONCE)

    def _records(self, start: int, end: int) -> Iterator[TraceRecord]:
        columns: list[Iterable[Any]] = []
        for name in DTYPES:
            column = getattr(self, name)
            if column is None:
                columns.append(repeat(getattr(DEFAULTS, name)))
            elif name == "delay_s":
                columns.append(None if value != value else value for value in column[start:end].tolist())
            else:
                columns.append(column[start:end].tolist())
        return map(TraceRecord._make, zip(*columns, strict=False))


def array(name: str, values: Iterable[object]) -> NDArray[Any]:
    """Return values as the column of that name."""
    values = values if isinstance(values, list) else list(values)
    if name == "delay_s":
        values = [np.nan if value is None else value for value in values]
    return np.fromiter(cast("list[Any]", values), DTYPES[name], len(values))


def optional(name: str, values: Sequence[object]) -> NDArray[Any] | None:
    """Return values as the column of that name, or None where all are the default."""
    default = getattr(DEFAULTS, name)
    if name in TraceRecord._field_defaults and all(value == default or value != value for value in values):
        return None
    return array(name, values)
