"""CSV traces: Azure, BurstGPT, timed files of this project, session files and bare lengths.

Sources of the column sets: Azure/AzurePublicDataset (``TIMESTAMP,ContextTokens,GeneratedTokens``),
HPMLL/BurstGPT release 1.1 and later (with or without ``Session ID`` and ``Elapsed time``).
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections.abc import Callable
from datetime import datetime
from itertools import accumulate
from typing import TypeVar

import numpy as np

from tidegate.core.errors import TraceError
from tidegate.workloads.sessions import with_pauses, with_prefixes
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS, Floats, Integers, Workload, optional

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
BURSTGPT_OPTIONAL = ("Session ID", "Elapsed time")
OURS = ("input_tokens", "output_tokens")
OURS_OPTIONAL = (
    "arrival_s", "hash_ids", "block_tokens", "client_id", "session_id", "turn", "delay_s", "slo_class",
    "reason_tokens", "agent", "round", "session_t_s", "prefix_hit_tokens", "think_time_s", "api_time_s",
    "ttft_s", "model", "next",
)  # fmt: skip
KNOWN_COLUMNS = frozenset((*AZURE, *BURSTGPT, *BURSTGPT_OPTIONAL, *OURS, *OURS_OPTIONAL))
TIMES = ("TIMESTAMP", "Timestamp", "arrival_s")

T = TypeVar("T")


class CsvTable:
    """The rows of a CSV by column name, and the means to say where a bad value stands.

    ``lines`` are the rows as they stand in the file, with their numbers there.
    """

    def __init__(self, file: str, columns: dict[str, int], lines: list[tuple[int, str]]) -> None:
        self.file, self.columns, self.lines = file, columns, lines
        self.rows = [_split(text) for _, text in lines]
        for row, fields in enumerate(self.rows):
            if len(fields) != len(columns):
                number, text = lines[row]
                longer = len(fields) > len(columns)
                at = _column_starts(text, fields)[len(columns)] if longer else len(text) + 1
                message = f"{len(fields)} fields, expected {len(columns)} as in the header"
                raise TraceError(message, file=file, line=number, column=at)

    def error(self, row: int, column: str, message: str) -> TraceError:
        """Return a TraceError at the first character of a value."""
        number, text = self.lines[row]
        at = _column_starts(text, self.rows[row])[self.columns[column]]
        return TraceError(message, file=self.file, line=number, column=at)

    def texts(self, column: str) -> list[str]:
        """Return a column's values; none where the file has no such column."""
        index = self.columns.get(column)
        if index is None:
            return []
        return [fields[index].strip() for fields in self.rows]

    def values(self, column: str, parse: Callable[[str], T], expected: str) -> list[T]:
        """Parse a column; raises TraceError for the first value that ``parse`` refuses by ValueError."""
        texts = self.texts(column)
        try:
            return list(map(parse, texts))
        except (ValueError, TypeError):
            for row, text in enumerate(texts):
                try:
                    parse(text)
                except (ValueError, TypeError):
                    raise self.error(row, column, f"{column} is {text[:40]!r}, expected {expected}") from None
            raise

    def integers(self, column: str, minimum: int = 0, empty: int | None = None) -> Integers:
        """Return integers of at least ``minimum``, with ``empty``, if given, for no text."""
        expected = f"an integer >= {minimum}"
        if empty is None:
            parsed = self.values(column, int, expected)
        else:
            parsed = self.values(column, lambda text: int(text) if text else empty, expected)
        try:
            numbers = np.array(parsed, np.int64)
        except OverflowError:
            row = next(row for row, number in enumerate(parsed) if abs(number) >= 2**63)
            raise self.error(row, column, f"{column} is {parsed[row]}, too large a number") from None
        low = np.flatnonzero(numbers < minimum)
        if len(low):
            row = int(low[0])
            raise self.error(row, column, f"{column} is {numbers[row]}, expected {expected}")
        return numbers

    def seconds(self, column: str, empty: float | None = None) -> Floats:
        """Return finite numbers of seconds, not negative, with ``empty``, if given, for no text."""

        def parse(text: str) -> float:
            if not text and empty is not None:
                return empty
            number = float(text)
            if 0 <= number < math.inf:
                return number
            raise ValueError

        if column not in self.columns and empty is not None:
            return np.full(len(self.rows), empty)
        return np.array(self.values(column, parse, "a number of seconds >= 0"), np.float64)


def parse_csv(file: str, lines: list[tuple[int, str]]) -> tuple[bool, Workload]:
    """Recognise a CSV by its header; return whether it has arrival times, and its requests.

    Untimed requests (session files, bare lengths) carry the time since their session's start as
    ``arrival_s``, or 0. A file with ``prefix_hit_tokens`` gets ids that share as much
    (``sessions.with_prefixes``). Raises TraceError for an unknown or missing column and for the first
    malformed row.
    """
    columns = check_header(file, *lines[0])
    rows = [line for line in lines[1:] if line[1].strip()]
    return has_times(columns), _parsed(file, columns, rows)


def has_times(columns: dict[str, int]) -> bool:
    """Tell whether a file with these columns has arrival times across sessions."""
    return any(name in columns for name in TIMES)


def _parsed(file: str, columns: dict[str, int], lines: list[tuple[int, str]]) -> Workload:
    try:
        return _workload(CsvTable(file, columns, lines))
    except TraceError as error:
        # Columns are read one after the other: an earlier row may be wrong in a later column.
        _parsed(file, columns, lines[: bisect_left(lines, error.line, key=lambda line: line[0])])
        raise


def _workload(table: CsvTable) -> Workload:
    names = table.columns
    lengths = AZURE[1:] if AZURE[1] in names else BURSTGPT[2:4] if BURSTGPT[2] in names else OURS
    if lengths[0] == BURSTGPT[2]:
        # BurstGPT publishes failed requests as rows of 0 tokens.
        answered = table.integers(lengths[0]) > 0
        table = CsvTable(
            table.file, names, [line for line, ok in zip(table.lines, answered, strict=True) if ok]
        )
    arrival_s = _arrivals(table)
    session = table.texts("session_id") or table.texts("Session ID")
    agents = zip(session, table.texts("agent"), strict=False)
    session = [f"{name}/{agent}" if agent else name for name, agent in agents] or session
    workload = Workload(
        arrival_s,
        table.integers(lengths[0], 1),
        np.maximum(1, table.integers(lengths[1])),
        optional("hash_ids", table.values("hash_ids", _ids, "integers joined by '|'")),
        table.integers("block_tokens", 1, MOONCAKE_BLOCK_TOKENS) if "block_tokens" in names else None,
        optional("session_id", session),
        next((table.integers(name, empty=0) for name in ("turn", "round") if name in names), None),
        _delays(table),
        optional("slo_class", table.texts("slo_class")),
        optional("client_id", table.texts("client_id")),
    )
    if {"session_id", "prefix_hit_tokens"} <= names.keys() and "hash_ids" not in names:
        return _session_file(table, workload)
    return workload


def _arrivals(table: CsvTable) -> Floats:
    column = next((name for name in TIMES if name in table.columns), None)
    if column is None:
        return table.seconds("session_t_s", None if "session_t_s" in table.columns else 0.0)
    arrival_s = _azure_times(table) if column == AZURE[0] else table.seconds(column)
    late = np.flatnonzero(np.diff(arrival_s) < 0)
    if len(late):
        row = int(late[0]) + 1
        message = f"{column} is {table.texts(column)[row]!r}, earlier than the row before; sort by arrival"
        raise table.error(row, column, message)
    return arrival_s


def _azure_times(table: CsvTable) -> Floats:
    """Return seconds from the first row."""
    expected = "a date and time like '2023-11-16 18:15:46.680590'"
    first: list[datetime] = []

    def seconds(text: str) -> float:
        at = datetime.fromisoformat(text)
        if not first:
            first.append(at)
        return (at - first[0]).total_seconds()

    return np.array(table.values(AZURE[0], seconds, expected), np.float64)


def _delays(table: CsvTable) -> Floats | None:
    given = [table.seconds(name, math.nan) for name in ("delay_s", "think_time_s") if name in table.columns]
    if len(given) == 2:
        return np.where(np.isnan(given[0]), given[1], given[0])
    return given[0] if given else None


def _session_file(table: CsvTable, workload: Workload) -> Workload:
    hits = table.integers("prefix_hit_tokens", empty=0)
    longer = np.flatnonzero(hits > workload.input_tokens)
    if len(longer):
        row = int(longer[0])
        message = f"prefix_hit_tokens is {hits[row]}, more than the {workload.input_tokens[row]} input_tokens"
        raise table.error(row, "prefix_hit_tokens", message)
    busy_s, since_s = table.seconds("api_time_s", 0.0), table.seconds("session_t_s", math.nan)
    return with_pauses(with_prefixes(workload, hits), since_s, busy_s)


def check_header(file: str, line: int, text: str) -> dict[str, int]:
    """Return the place of each column; raises TraceError for an unknown, repeated or missing one."""
    columns: dict[str, int] = {}
    starts = _column_starts(text, _split(text))
    for index, name in enumerate(map(str.strip, _split(text))):
        if name not in KNOWN_COLUMNS:
            raise TraceError(
                f"unknown column {name!r}; expected a header of Azure ({','.join(AZURE)}), BurstGPT "
                f"({','.join(BURSTGPT)}) or arrival_s,input_tokens,output_tokens with optional "
                f"{', '.join(OURS_OPTIONAL[1:8])}",
                file=file, line=line, column=starts[index],
            )  # fmt: skip
        if name in columns:
            raise TraceError(f"column {name!r} appears twice", file=file, line=line, column=starts[index])
        columns[name] = index
    for family in (AZURE, BURSTGPT, OURS):
        present = [name for name in family if name in columns]
        if present:
            missing = [name for name in family if name not in columns]
            if missing:
                message = f"the header has {present[0]!r} but lacks {', '.join(map(repr, missing))}"
                raise TraceError(message, file=file, line=line)
            return columns
    raise TraceError(f"the header lacks {', '.join(map(repr, OURS))}", file=file, line=line)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("|"))) if text else ()


def _split(text: str) -> list[str]:
    return next(csv.reader([text])) if '"' in text else text.split(",")


def _column_starts(text: str, fields: list[str]) -> list[int]:
    """Return the column (from 1) at which each field starts; approximate in rows with quotes."""
    if '"' not in text:
        return [1, *(at + 1 for at in accumulate(len(f) + 1 for f in fields))]
    starts, at = [], 0
    for field in fields:
        at = max(at, text.find(field, at))
        starts.append(at + 1)
        at += len(field)
    return [*starts, len(text) + 1]
