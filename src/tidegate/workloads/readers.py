"""Read a trace of any supported format.

CSV: Azure/AzurePublicDataset, HPMLL/BurstGPT release 1.1 and later (with or without ``Session ID`` and
``Elapsed time``), this project's own, session files and bare lengths. JSONL: gateway journals, bench results
and kvcache-ai/Mooncake's FAST'25 traces, with ``timestamp`` in milliseconds and ``hash_ids`` of blocks of 512
tokens; ``session_id``, ``turn``, ``delay_ms``, ``slo_class``, ``client_id`` and ``block_tokens`` are this
project's additions.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.core.errors import TraceError
from tidegate.workloads.sessions import with_pauses, with_prefixes
from tidegate.workloads.source import parse_object, read_lines
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_table import TraceTable, is_timed, requests_of

AZURE = {"arrival_s": "TIMESTAMP", "input_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
BURSTGPT = {
    "arrival_s": "Timestamp",
    "session_id": "Session ID",
    "model": "Model",
    "input_tokens": "Request tokens",
    "output_tokens": "Response tokens",
    "total": "Total tokens",
    "kind": "Log Type",
}
OWN = {"input_tokens": "input_tokens", "output_tokens": "output_tokens"}
MOONCAKE = {
    "arrival_s": "timestamp",
    "input_tokens": "input_length",
    "output_tokens": "output_length",
    "delay_s": "delay_ms",
}
"""Columns of each format by field of ``TraceRecord``."""
OPTIONAL = (
    "hash_ids", "block_tokens", "client_id", "session_id", "turn", "delay_s", "slo_class", "arrival_s",
    "reason_tokens", "agent", "round", "session_t_s", "prefix_hit_tokens", "think_time_s", "api_time_s",
    "ttft_s", "model", "next", "Session ID", "Elapsed time",
)  # fmt: skip
CSV_COLUMNS = frozenset((*AZURE.values(), *BURSTGPT.values(), *OWN, *OPTIONAL))
MOONCAKE_KEYS = frozenset((
    *MOONCAKE.values(), "hash_ids", "block_tokens", "session_id", "turn", "slo_class", "client_id",
))  # fmt: skip
RECORDED_KINDS = ("outcome", "request")
"""Lines of a recording that stand for one offered request."""


def read_trace(source: str | Path) -> Workload:
    """Return the requests of a trace in order of arrival.

    ``source`` is a file, plain or gzipped, or ``sample:NAME``; the format is told from the first line. An
    output length of 0 is raised to 1. Raises TraceError with file, line and column for malformed input, and
    for a file that has no arrival times.
    """
    timed, workload = open_trace(source)
    if not timed:
        raise TraceError(
            "the file has no arrival times; choose an arrival process for it: --poisson RPS, "
            "--gamma RPS --cv X or --bursts RPS:S,RPS:S (each session starts at one arrival)",
            file=str(source), line=1,
        )  # fmt: skip
    return workload


def read_untimed(source: str | Path) -> Workload:
    """Return the requests of any trace in file order, for use with an arrival process of one's own.

    In a session file ``arrival_s`` is the time since the session's start, in a file of lengths 0.
    Raises TraceError as ``read_trace`` does.
    """
    return open_trace(source)[1]


def has_arrivals(source: str | Path) -> bool:
    """Tell from its first line whether a trace has arrival times across sessions. Raises TraceError."""
    file = str(source)
    first = _first_line(file, list(islice(read_lines(source), 1)))
    return _is_json(first) or is_timed(*_header(file, first))


def open_trace(source: str | Path) -> tuple[bool, Workload]:
    """Return whether the trace is timed, and its requests as ``read_untimed`` returns them."""
    file = str(source)
    lines = list(read_lines(source))
    first = _first_line(file, lines)
    if _is_json(first):
        return True, _read_jsonl(file, lines)
    return _read_csv(file, first, [line for line in lines[1:] if line[1].strip()])


def _first_line(file: str, lines: list[tuple[int, str]]) -> str:
    if not lines or not lines[0][1].strip():
        raise TraceError("the file is empty or starts with an empty line", file=file, line=len(lines[:1]))
    return lines[0][1]


def _is_json(line: str) -> bool:
    return line.lstrip().startswith(("{", "["))


def _read_csv(file: str, header: str, lines: list[tuple[int, str]]) -> tuple[bool, Workload]:
    """Return whether a CSV has arrival times, and its requests.

    The prompts of a file with ``prefix_hit_tokens`` share as much as it says (``sessions.with_prefixes``).
    """
    columns, names = _header(file, header)
    table, broken = csv_table(file, list(columns), lines, names)
    if names is BURSTGPT:
        # BurstGPT publishes failed requests as rows of 0 tokens.
        table = table.rows(np.flatnonzero(table.integers("input_tokens")).tolist())
    workload = requests_of(table)
    if broken is not None:
        raise broken
    if table.has("session_id") and table.has("prefix_hit_tokens") and not table.has("hash_ids"):
        workload = _with_sessions(table, workload)
    return is_timed(columns, names), workload


def csv_table(
    file: str, header: list[str], lines: list[tuple[int, str]], names: Mapping[str, str]
) -> tuple[TraceTable, TraceError | None]:
    """Return the rows of a CSV before the first of another length than the header, and the error there."""
    rows: list[list[str]] = []
    broken = None
    for number, text in lines:
        fields = split(text)
        if len(fields) != len(header):
            at = (*_starts(text, fields), len(text) + 1)[min(len(header), len(fields))]
            message = f"{len(fields)} fields, expected {len(header)} as in the header"
            broken = TraceError(message, file=file, line=number, column=at)
            break
        rows.append(fields)
    columns: dict[str, list[Any]] = {
        name: [fields[index].strip() or None for fields in rows] for index, name in enumerate(header)
    }
    if "hash_ids" in columns:
        columns["hash_ids"] = [ids and ids.split("|") for ids in columns["hash_ids"]]
    if "agent" in columns and "session_id" in columns:
        agents = zip(columns["session_id"], columns["agent"], strict=True)
        columns["session_id"] = [f"{session}/{agent}" if agent else session for session, agent in agents]

    def place(text: str, name: str) -> int:
        return _starts(text, split(text))[header.index(name)]

    return TraceTable(file, lines[: len(rows)], columns, names, place), broken


def _header(file: str, text: str) -> tuple[dict[str, int], Mapping[str, str]]:
    """Return the places of a CSV's columns, and their names by field.

    Raises TraceError for an unknown, repeated or missing column.
    """
    columns: dict[str, int] = {}
    fields = split(text)
    for name, start in zip(map(str.strip, fields), _starts(text, fields), strict=True):
        if name not in CSV_COLUMNS:
            raise TraceError(
                f"unknown column {name!r}; expected a header of Azure ({','.join(AZURE.values())}), BurstGPT "
                f"({','.join(_required(BURSTGPT))}) or arrival_s,input_tokens,output_tokens with optional "
                f"{', '.join(OPTIONAL[:7])}",
                file=file, line=1, column=start,
            )  # fmt: skip
        if name in columns:
            raise TraceError(f"column {name!r} appears twice", file=file, line=1, column=start)
        columns[name] = start
    names = next((each for each in (AZURE, BURSTGPT) if not columns.keys().isdisjoint(_required(each))), OWN)
    missing = [name for name in _required(names) if name not in columns]
    if missing:
        raise TraceError(f"the header lacks {', '.join(map(repr, missing))}", file=file, line=1)
    others = {"turn": "round", "delay_s": "think_time_s"}
    if names is OWN:
        names = {field: other for field, other in others.items() if field not in columns}
    return columns, names


def _required(names: Mapping[str, str]) -> list[str]:
    return [name for name in names.values() if name not in OPTIONAL]


def _with_sessions(table: TraceTable, workload: Workload) -> Workload:
    hits = table.integers("prefix_hit_tokens", empty=0)
    longer = np.flatnonzero(hits > workload.input_tokens)
    if len(longer):
        row = int(longer[0])
        message = f"is {hits[row]}, more than the {workload.input_tokens[row]} input_tokens"
        raise table.error(row, "prefix_hit_tokens", message)
    unknown = np.full(len(workload), np.nan)
    since_s, busy_s = (
        table.seconds(name, optional=True) if table.has(name) else unknown
        for name in ("session_t_s", "api_time_s")
    )
    return with_pauses(with_prefixes(workload, hits), since_s, np.nan_to_num(busy_s))


def split(text: str) -> list[str]:
    """Return the fields of a line of CSV."""
    return next(csv.reader([text])) if '"' in text else text.split(",")


def _starts(text: str, fields: list[str]) -> list[int]:
    """Return where each field starts, from 1; approximate in rows with quotes."""
    if '"' not in text:
        return [1, *(end + 1 for end in accumulate(len(field) + 1 for field in fields[:-1]))]
    starts, at = [], 0
    for field in fields:
        at = max(at, text.find(field, at))
        starts.append(at + 1)
        at += len(field)
    return starts


def _read_jsonl(file: str, lines: Iterable[tuple[int, str]]) -> Workload:
    """Return the requests of a JSONL trace; a ``type`` key in its first line makes it a recording."""
    found: list[tuple[int, str]] = []
    objects: list[dict[str, Any]] = []
    broken: TraceError | None = None
    recorded = False
    for number, text in lines:
        if not text.strip():
            continue
        if broken is not None:
            break
        try:
            value = parse_object(file, number, text)
        except TraceError as error:
            broken = error
            continue
        recorded = recorded or (not found and "type" in value)
        found.append((number, text))
        objects.append(value)
    else:
        if recorded:
            broken = None  # a killed writer leaves half a last line; anywhere else it is damage
    workload = _from_objects(file, found, objects, recorded)
    if broken is not None:
        raise broken
    if not recorded:
        return workload
    if not workload:
        raise TraceError("the recording holds no request outcomes to replay", file=file)
    # Its lines stand in order of completion.
    return workload[workload.arrival_s.argsort(kind="stable")]


def _from_objects(
    file: str, lines: list[tuple[int, str]], objects: list[dict[str, Any]], recorded: bool
) -> Workload:
    keys = MOONCAKE_KEYS & set().union(*objects) | {"timestamp", "input_length", "output_length"}
    columns = {key: [value.get(key) for value in objects] for key in keys}
    table = TraceTable(file, lines, columns, MOONCAKE, _place_of_key, is_json=True)
    if recorded:
        kept = [row for row, value in enumerate(objects) if _is_request(value)]
        return requests_of(table.rows(kept), recorded=True)
    unknown = next((row for row, value in enumerate(objects) if not value.keys() <= MOONCAKE_KEYS), None)
    workload = requests_of(table if unknown is None else table.rows(range(unknown)))
    if unknown is not None:
        key = min(objects[unknown].keys() - MOONCAKE_KEYS)
        raise table.error(unknown, key, f"is an unknown key; known are {', '.join(sorted(MOONCAKE_KEYS))}")
    return workload


def _is_request(value: dict[str, Any]) -> bool:
    """Tell whether a recorded line can be replayed: a request of known length that was not malformed."""
    status = value.get("status")
    refused = isinstance(status, int) and 400 <= status < 429
    return value.get("type") in RECORDED_KINDS and bool(value.get("input_length")) and not refused


def _place_of_key(text: str, key: str) -> int:
    found = re.search(rf"{re.escape(json.dumps(key))}\s*:\s*", text)
    return found.end() + 1 if found else 0
