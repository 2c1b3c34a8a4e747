"""CSV traces: Azure, BurstGPT, timed files of this project, session files and bare lengths.

Sources of the column sets: Azure/AzurePublicDataset (``TIMESTAMP,ContextTokens,GeneratedTokens``),
HPMLL/BurstGPT release 1.1 and later (with or without ``Session ID`` and ``Elapsed time``).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate

from tidegate.core.errors import TraceError
from tidegate.workloads.sessions import SessionTurn, with_prefixes
from tidegate.workloads.trace import TraceRecord

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


@dataclass(frozen=True, slots=True)
class Row:
    """One data line: fields by column name, and the means to say where a bad one stands."""

    file: str
    line: int
    text: str
    columns: dict[str, int]
    fields: list[str]

    def get(self, column: str) -> str:
        """Return the text of a column, or the empty string where the file has no such column."""
        index = self.columns.get(column)
        return "" if index is None else self.fields[index].strip()

    def error(self, column: str, message: str) -> TraceError:
        """Return a TraceError at the first character of the column's value."""
        at = _column_starts(self.text, self.fields)[self.columns[column]]
        return TraceError(message, file=self.file, line=self.line, column=at)

    def integer(self, column: str, minimum: int = 0) -> int:
        """Read an integer of at least ``minimum``; raises TraceError."""
        value = self.get(column)
        try:
            number = int(value)
        except ValueError:
            raise self.error(column, f"{column} is {value!r}, expected an integer >= {minimum}") from None
        if number < minimum:
            raise self.error(column, f"{column} is {number}, expected an integer >= {minimum}")
        return number

    def seconds(self, column: str) -> float:
        """Read a finite number of seconds, not negative; raises TraceError."""
        value = self.get(column)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            raise self.error(column, f"{column} is {value!r}, expected a number of seconds >= 0")
        return number


def parse_csv(file: str, lines: Iterator[tuple[int, str]]) -> tuple[bool, Iterator[TraceRecord]]:
    """Recognise a CSV by its header; return ``(timed, records)``.

    Untimed records (session files, bare lengths) carry the time since their session's start as
    ``arrival_s``, or 0. A file with ``prefix_hit_tokens`` gets ids that share as much
    (``sessions.with_prefixes``). Raises TraceError for an empty file, an unknown or missing column, and,
    while iterating, for a malformed row.
    """
    number, header = next(lines, (1, ""))
    names = [name.strip() for name in _split(header)]
    columns = _check_header(file, number, header, names)
    rows = _rows(file, lines, columns, len(names))
    has_prefixes = {"session_id", "prefix_hit_tokens"} <= columns.keys() and "hash_ids" not in columns
    if set(AZURE) <= columns.keys():
        return True, _bare(_in_order(rows, "TIMESTAMP", _azure_clock(), AZURE[1:]))
    if "Request tokens" in columns:
        clock = _seconds_of("Timestamp")
        return True, _bare(_in_order(rows, "Timestamp", clock, BURSTGPT[2:4], skip_failed=True))
    if "arrival_s" in columns:
        ordered = _in_order(rows, "arrival_s", _seconds_of("arrival_s"), OURS)
        return True, _session_file(ordered) if has_prefixes else _bare(ordered)
    untimed = ((row, _record(row, _session_time(row), OURS)) for row in rows)
    return False, _session_file(untimed) if has_prefixes else _bare(untimed)


def _bare(pairs: Iterable[tuple[Row, TraceRecord]]) -> Iterator[TraceRecord]:
    return (record for _, record in pairs)


def _session_file(pairs: Iterable[tuple[Row, TraceRecord]]) -> Iterator[TraceRecord]:
    """Yield records with prefixes. The whole file is read first, for its size decides the block."""
    yield from with_prefixes(list(map(_turn, pairs)))


def _turn(pair: tuple[Row, TraceRecord]) -> SessionTurn:
    row, record = pair
    hit = row.integer("prefix_hit_tokens") if row.get("prefix_hit_tokens") else 0
    if hit > record.input_tokens:
        message = f"prefix_hit_tokens is {hit}, more than the {record.input_tokens} input_tokens"
        raise row.error("prefix_hit_tokens", message)
    return SessionTurn(
        record,
        hit,
        busy_s=row.seconds("api_time_s") if row.get("api_time_s") else 0.0,
        session_t_s=_session_time(row) if row.get("session_t_s") else None,
    )


def _check_header(file: str, line: int, text: str, names: list[str]) -> dict[str, int]:
    columns: dict[str, int] = {}
    starts = _column_starts(text, _split(text))
    for index, name in enumerate(names):
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


def _rows(file: str, lines: Iterable[tuple[int, str]], columns: dict[str, int], width: int) -> Iterator[Row]:
    for number, text in lines:
        if not text.strip():
            continue
        fields = _split(text)
        if len(fields) != width:
            starts = _column_starts(text, fields)
            at = starts[width] if len(fields) > width else len(text) + 1
            message = f"{len(fields)} fields, expected {width} as in the header"
            raise TraceError(message, file=file, line=number, column=at)
        yield Row(file, number, text, columns, fields)


def _in_order(
    rows: Iterator[Row],
    time_column: str,
    clock: Callable[[Row], float],
    lengths: tuple[str, ...],
    *,
    skip_failed: bool = False,
) -> Iterator[tuple[Row, TraceRecord]]:
    """Yield timed records with their rows.

    BurstGPT publishes failed requests as rows of 0 tokens: those are skipped.
    """
    last_s = -math.inf
    for row in rows:
        if skip_failed and row.integer(lengths[0]) == 0:
            continue
        arrival_s = clock(row)
        if arrival_s < last_s:
            message = (
                f"{time_column} is {row.get(time_column)!r}, earlier than the row before; sort by arrival"
            )
            raise row.error(time_column, message)
        last_s = arrival_s
        yield row, _record(row, arrival_s, lengths)


def _record(row: Row, arrival_s: float, lengths: tuple[str, ...]) -> TraceRecord:
    round_column = "turn" if "turn" in row.columns else "round"
    delay_column = "delay_s" if row.get("delay_s") else "think_time_s"
    session = row.get("session_id") or row.get("Session ID")
    agent = row.get("agent")
    return TraceRecord(
        arrival_s=arrival_s,
        input_tokens=row.integer(lengths[0], 1),
        output_tokens=max(1, row.integer(lengths[1])),
        hash_ids=_hash_ids(row),
        block_tokens=row.integer("block_tokens", 1) if row.get("block_tokens") else 512,
        session_id=f"{session}/{agent}" if agent else session,
        turn=row.integer(round_column) if row.get(round_column) else 0,
        delay_s=row.seconds(delay_column) if row.get(delay_column) else None,
        slo_class=row.get("slo_class"),
        client_id=row.get("client_id"),
    )


def _hash_ids(row: Row) -> tuple[int, ...]:
    text = row.get("hash_ids")
    if not text:
        return ()
    try:
        return tuple(map(int, text.split("|")))
    except ValueError:
        raise row.error("hash_ids", f"hash_ids is {text[:40]!r}, expected integers joined by '|'") from None


def _session_time(row: Row) -> float:
    return row.seconds("session_t_s") if "session_t_s" in row.columns else 0.0


def _seconds_of(column: str) -> Callable[[Row], float]:
    return lambda row: row.seconds(column)


def _azure_clock() -> Callable[[Row], float]:
    """Return a clock that counts seconds from the first row it is shown."""
    origin: datetime | None = None

    def clock(row: Row) -> float:
        nonlocal origin
        text = row.get("TIMESTAMP")
        try:
            at = datetime.fromisoformat(text)
            origin = origin or at
            return (at - origin).total_seconds()
        except (ValueError, TypeError):
            message = f"TIMESTAMP is {text!r}, expected a date and time like '2023-11-16 18:15:46.680590'"
            raise row.error("TIMESTAMP", message) from None

    return clock


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
