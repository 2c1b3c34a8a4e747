"""The columns of a trace file, and the requests that they describe."""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import repeat
from operator import itemgetter
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, ValidationError, convert

from tidegate.core.errors import TraceError
from tidegate.workloads.formats import AZURE, TraceFormat
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS, Floats, Integers, Workload, array, optional

_DATE = re.compile(r"\d{4}-\d\d?-\d\d?[ T]")
_WHOLE = re.compile(r"-?\d+\.0*")
AtLeastZero = Annotated[float, Meta(ge=0, le=sys.float_info.max)]


@dataclass(frozen=True, slots=True)
class TraceTable:
    """The rows of a trace file by column.

    ``lines`` are the rows' line numbers and texts, ``columns`` their values: texts, or plain JSON data, with
    None for what a line lacks. ``form`` says what the columns are called. ``place(line's text, column)``
    returns where a value starts, from 1. JSON has numbers that are no texts.
    """

    file: str
    lines: Sequence[tuple[int, str]]
    columns: Mapping[str, Sequence[Any]]
    form: TraceFormat
    place: Callable[[str, str], int]
    is_json: bool = False

    def name(self, field: str) -> str:
        return self.form.names.get(field, field)

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
            return convert_all(found, kind, strict=self.is_json)
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
        in_ms = field in self.form.in_ms
        kind: Any = AtLeastZero | None if optional else AtLeastZero
        found = self.values(field, kind, f"a number of {'milliseconds' if in_ms else 'seconds'} >= 0")
        return array("delay_s", found) / (1000.0 if in_ms else 1.0)

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


def convert_all(found: Sequence[Any], kind: Any, *, strict: bool) -> list[Any]:
    """Return values as a type. Whole numbers may be written with a fraction of 0, as pandas does."""
    wanted: Any = list[kind]
    try:
        return list(convert(found, wanted, strict=strict))
    except ValidationError:
        return list(convert([_whole(value) for value in found], wanted, strict=strict))


def _whole(value: Any) -> Any:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return value.partition(".")[0]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def requests_of(table: TraceTable, *, recorded: bool = False) -> Workload:
    """Return the requests of a table, in its order. Raises TraceError for the first malformed row.

    Rows without an arrival time have the time since their session's start, or 0; single turns without one
    come their pause after the turn before them. The rows of a recording stand in order of completion, and a
    rejected one may have no output length.
    """
    try:
        return _requests(table, recorded)
    except TraceError as error:
        # Columns are read one after the other: an earlier row may be wrong in a later column.
        earlier = bisect_left(table.lines, error.line, key=itemgetter(0))
        requests_of(table.rows(range(earlier)), recorded=recorded)
        raise


def _requests(table: TraceTable, recorded: bool) -> Workload:
    turn = table.integers("turn", empty=0) if table.has("turn") else None
    made = Workload(
        np.zeros(len(table.lines)),
        table.integers("input_tokens", 1),
        np.maximum(1, table.integers("output_tokens", empty=1 if recorded else None)),
        optional("hash_ids", table.block_ids()),
        _block_tokens(table),
        optional("session_id", table.labels("session_id")),
        None if turn is None else np.maximum(0, turn - table.form.first_turn),
        table.seconds("delay_s", optional=True) if table.has("delay_s") else None,
        optional("slo_class", table.labels("slo_class")),
        optional("client_id", table.labels("client_id")),
    )
    _check_ids(table, made)
    return replace(made, arrival_s=_arrivals(table, made, ordered=not recorded))


def _block_tokens(table: TraceTable) -> Integers | None:
    if table.has("block_tokens"):
        return table.integers("block_tokens", 1, table.form.block_tokens)
    if table.form.block_tokens == MOONCAKE_BLOCK_TOKENS:
        return None
    return np.full(len(table.lines), table.form.block_tokens)


def _check_ids(table: TraceTable, made: Workload) -> None:
    """Raise TraceError for the first row with more block ids than its prompt and answer have blocks."""
    if made.hash_ids is None:
        return
    size, tokens = made.column("block_tokens"), made.input_tokens + made.output_tokens
    ids = np.fromiter(map(len, made.hash_ids), np.int64, len(made))
    blocks = -(-tokens // size)
    for row in np.flatnonzero(ids > blocks)[:1].tolist():
        message = (
            f"has {ids[row]} ids, but {made.input_tokens[row]} tokens of prompt and "
            f"{made.output_tokens[row]} of answer are {blocks[row]} blocks of {size[row]}; block_tokens says "
            "how long a block is"
        )
        raise table.error(row, "hash_ids", message)


def _arrivals(table: TraceTable, made: Workload, *, ordered: bool) -> Floats:
    """Return the arrival times; a turn with a pause but no time comes that long after the one before it."""
    timed = table.has("arrival_s")
    if not timed and table.has("session_t_s"):
        return table.seconds("session_t_s")
    texts = table.columns[table.name("arrival_s")] if timed else repeat(None)
    delay_s, sessions = made.column("delay_s").tolist(), made.column("session_id")
    waits = [
        text is None and bool(session) and delay == delay
        for text, session, delay in zip(texts, sessions, delay_s, strict=timed)
    ]
    known = np.flatnonzero(~np.array(waits, np.bool_))
    arrival_s = np.zeros(len(made))
    if timed:
        arrival_s[known] = _times(table if len(known) == len(made) else table.rows(known.tolist()), ordered)
    if len(known) == len(made):
        return arrival_s
    last_s: dict[str, float] = {}
    for row, session in enumerate(sessions):
        if waits[row] and timed and session not in last_s:
            raise table.error(row, "arrival_s", "is missing, and no turn of its session comes before it")
        if waits[row]:
            arrival_s[row] = last_s[session] + delay_s[row] if session in last_s else 0.0
        last_s[session] = float(arrival_s[row])
    return arrival_s


def _times(table: TraceTable, ordered: bool) -> Floats:
    """Return the arrival column, in seconds from the first row where it has dates."""
    found = table.columns[table.name("arrival_s")]
    dates = bool(found) and isinstance(found[0], str) and _DATE.match(found[0])
    arrival_s = _dates(table) if dates or table.form is AZURE else table.seconds("arrival_s")
    late = np.flatnonzero(np.diff(arrival_s) < 0)
    if len(late) and ordered:
        row = int(late[0]) + 1
        raise table.error(
            row, "arrival_s", f"is {found[row]!r}, earlier than the row before; sort by arrival"
        )
    return arrival_s


def _dates(table: TraceTable) -> Floats:
    """Return seconds from the first row; a date without a zone is taken as UTC."""
    times = []
    for row, text in enumerate(table.columns[table.name("arrival_s")]):
        try:
            time = datetime.fromisoformat(text)
        except (ValueError, TypeError):
            message = f"is {text!r}, expected a date and time like '2023-11-16 18:15:46.680590'"
            raise table.error(row, "arrival_s", message) from None
        times.append(time if time.tzinfo else time.replace(tzinfo=UTC))
    return np.array([(time - times[0]).total_seconds() for time in times], np.float64)
