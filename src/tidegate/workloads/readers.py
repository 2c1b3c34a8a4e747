"""Read a trace of any supported format.

CSV: Azure/AzurePublicDataset (2023 to 2025), HPMLL/BurstGPT release 1.1 and later (with or without
``Session ID`` and ``Elapsed time``), microsoft/vidur, Mutinifni/splitwise-sim, this project's own, session
files and bare lengths. JSONL: gateway journals, bench results, kvcache-ai/Mooncake's FAST'25 traces, with
``timestamp`` in milliseconds and ``hash_ids`` of blocks of 512 tokens, and
alibaba-edu/qwen-bailian-usagetraces-anon, in seconds and blocks of 16; ``session_id``, ``turn``,
``delay_ms``, ``slo_class``, ``client_id`` and ``block_tokens`` are this project's additions. ``formats``
has their columns.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.core.errors import TraceError
from tidegate.workloads.formats import (
    BAILIAN,
    CSV_FORMATS,
    MOONCAKE,
    OPTIONAL,
    OWN,
    RECORDING,
    UNNAMED,
    TraceFormat,
    csv_format,
    given_format,
)
from tidegate.workloads.likes import has_sessions, is_like, make_like
from tidegate.workloads.sessions import with_pauses, with_prefixes
from tidegate.workloads.source import SAMPLE_PREFIX, parse_object, read_lines
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_table import TraceTable, requests_of

RECORDED_KINDS = ("outcome", "request")
"""Lines of a recording that stand for one offered request."""
RECORDED = ("header", "bench", "inputs", *RECORDED_KINDS)
"""What the first line of a recording may be."""


OTHERWISE = "For any other trace: --columns arrival=...,input=...,output=..."

_log = logging.getLogger(__name__)


def read_trace(source: str | Path, columns: str = "") -> Workload:
    """Return the requests of a trace in order of arrival.

    ``source`` is a file, plain or gzipped, ``sample:NAME`` or ``like:NAME`` (``likes``); the format is told
    from the first line, or given as ``columns`` (see ``formats.given_format``). An output length of 0 is
    raised to 1. Raises TraceError with file, line and column for malformed input, and for a file that has no
    arrival times.
    """
    timed, workload = open_trace(source, columns)
    if not timed:
        raise TraceError(
            "the file has no arrival times; choose an arrival process for it: --poisson RPS, "
            "--gamma RPS --cv X or --bursts RPS:S,RPS:S (each session starts at one arrival)",
            file=str(source), line=1,
        )  # fmt: skip
    return workload


def read_untimed(source: str | Path, columns: str = "") -> Workload:
    """Return the requests of any trace in file order, for use with an arrival process of one's own.

    In a session file ``arrival_s`` is the time since the session's start, in a file of lengths 0.
    Raises TraceError as ``read_trace`` does.
    """
    return open_trace(source, columns)[1]


def has_arrivals(source: str | Path, columns: str = "") -> bool:
    """Tell from its first line whether a trace has arrival times across sessions. Raises TraceError."""
    file = str(source)
    if is_like(file):
        return not has_sessions(file)
    number, first = _first_line(file, (line for line in read_lines(source) if line[1].strip()))
    if _is_json(first):
        form, value = _json_format(file, number, first, columns)
        return _is_timed(form, value)
    form, header = _header(file, number, first, columns)
    return _is_timed(form, header)


def open_trace(source: str | Path, columns: str = "") -> tuple[bool, Workload]:
    """Return whether the trace is timed, and its requests as ``read_untimed`` returns them.

    The log says in a line what a file was taken for, and what of it was left out.
    """
    file = str(source)
    if is_like(file):
        return not has_sessions(file), make_like(file)
    lines = [line for line in read_lines(source) if line[1].strip()]
    number, first = _first_line(file, iter(lines))
    notes: list[str] = []
    if _is_json(first):
        form, value = _json_format(file, number, first, columns)
        timed = _is_timed(form, value)
        workload = _read_jsonl(file, form, timed, lines)
    else:
        form, header = _header(file, number, first, columns)
        timed = _is_timed(form, header)
        workload, notes = _read_csv(file, form, header, lines[1:])
    if not timed:
        # Turns of a session stand next to each other: a start is given to all of them.
        workload = workload[workload.units().argsort(kind="stable")]
    elif (np.diff(workload.arrival_s) < 0).any():
        # Lines of a recording stand in order of completion; turns with a pause come later than their line.
        workload = workload[workload.arrival_s.argsort(kind="stable")]
    if not file.startswith(SAMPLE_PREFIX):
        notes = [f"read as {form.title}", f"{len(workload):,} requests", *notes]
        _log.info("%s: %s", file, "; ".join([", ".join(notes[:2]), *notes[2:]]))
    return timed, workload


def _first_line(file: str, lines: Iterator[tuple[int, str]]) -> tuple[int, str]:
    first = next(lines, None)
    if first is None:
        raise TraceError("the file is empty", file=file)
    return first


def _is_json(line: str) -> bool:
    return line.lstrip().startswith(("{", "["))


def _is_timed(form: TraceFormat, columns: Collection[str]) -> bool:
    """Tell whether a file with these columns has arrival times across sessions."""
    return form.names.get("arrival_s", "arrival_s") in columns


def _read_csv(
    file: str, form: TraceFormat, header: list[str], lines: list[tuple[int, str]]
) -> tuple[Workload, list[str]]:
    """Return the requests of a CSV, and what was left out.

    The prompts of a file with ``prefix_hit_tokens`` share as much as it says (``sessions.with_prefixes``).
    """
    table, broken = csv_table(file, header, lines, form)
    notes = []
    if form.failed_without_answer:
        done = (table.integers("input_tokens") > 0) & (table.integers("output_tokens") > 0)
        if not done.all():
            notes.append(f"{np.count_nonzero(~done):,} failed requests (0 tokens) left out")
            table = table.rows(np.flatnonzero(done).tolist())
    if "NumImages" in header:
        notes.append("NumImages is not used")
    workload = requests_of(table)
    if broken is not None:
        raise broken
    if table.has("session_id") and table.has("prefix_hit_tokens") and not table.has("hash_ids"):
        workload = _with_sessions(table, workload)
    return workload, notes


def csv_table(
    file: str, header: list[str], lines: list[tuple[int, str]], form: TraceFormat
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
        name: [fields[index].strip() or None for fields in rows]
        for index, name in enumerate(header)
        if not form.only_named or name in form.known
    }
    ids_in = form.names.get("hash_ids", "hash_ids")
    if ids_in in columns:
        columns[ids_in] = [ids and ids.split("|") for ids in columns[ids_in]]
    if "agent" in columns and "session_id" in columns:
        agents = zip(columns["session_id"], columns["agent"], strict=True)
        columns["session_id"] = [f"{session}/{agent}" if agent else session for session, agent in agents]

    def place(text: str, name: str) -> int:
        return _starts(text, split(text))[header.index(name)]

    return TraceTable(file, lines[: len(rows)], columns, form, place), broken


def _header(file: str, line: int, text: str, given: str) -> tuple[TraceFormat, list[str]]:
    """Return a CSV's format and the names of its columns.

    Raises TraceError for an unknown, repeated or missing column.
    """
    fields = split(text)
    header = [name.strip() for name in fields]
    form = given_format(given) if given else csv_format(header)
    for index, (name, start) in enumerate(zip(header, _starts(text, fields), strict=True)):
        if name in header[:index] and not UNNAMED.fullmatch(name):
            raise TraceError(f"column {name!r} appears twice", file=file, line=line, column=start)
        if not (form.only_named or name in form.known or UNNAMED.fullmatch(name)):
            known = "; ".join(f"{each.title}: {','.join(each.needed)}" for each in CSV_FORMATS)
            raise TraceError(
                f"unknown column {name!r} in what looks like {form.title}; known are {known}, with "
                f"{', '.join(OPTIONAL[:8])}. {OTHERWISE}",
                file=file, line=line, column=start,
            )  # fmt: skip
    missing = [name for name in form.needed if name not in header]
    if missing:
        raise TraceError(
            f"{form.title}: the header lacks {', '.join(map(repr, missing))}", file=file, line=line
        )
    if form is OWN:
        others = {"turn": "round", "delay_s": "think_time_s"}
        form = replace(OWN, names={name: other for name, other in others.items() if name not in header})
    return form, header


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


def _json_format(file: str, number: int, text: str, given: str) -> tuple[TraceFormat, dict[str, Any]]:
    """Return the format of a JSONL trace, and its first line."""
    value = parse_object(file, number, text)
    if given:
        return given_format(given), value
    if value.get("type") in RECORDED:
        return RECORDING, {**value, "timestamp": 0}
    if {"chat_id", "parent_chat_id"} <= value.keys():
        return BAILIAN, value
    return MOONCAKE, value


def _read_jsonl(file: str, form: TraceFormat, timed: bool, lines: list[tuple[int, str]]) -> Workload:
    found: list[tuple[int, str]] = []
    objects: list[dict[str, Any]] = []
    broken: TraceError | None = None
    for number, text in lines:
        try:
            objects.append(parse_object(file, number, text))
        except TraceError as error:
            # A killed writer leaves half a last line; anywhere else it is damage.
            broken = None if form is RECORDING and number == lines[-1][0] else error
            break
        found.append((number, text))
    workload = _from_objects(file, form, timed, found, objects)
    if broken is not None:
        raise broken
    if form is RECORDING and not workload:
        raise TraceError("the recording holds no request outcomes to replay", file=file)
    return workload


def _from_objects(
    file: str, form: TraceFormat, timed: bool, lines: list[tuple[int, str]], objects: list[dict[str, Any]]
) -> Workload:
    if form is MOONCAKE and any("delay" in value for value in objects):
        form = replace(MOONCAKE, names={**MOONCAKE.names, "delay_s": "delay"})
    keys = {name for name in form.known if any(name in value for value in objects)} | set(form.needed)
    if not timed:
        keys.discard(form.names.get("arrival_s", "arrival_s"))
    columns: dict[str, list[Any]] = {key: [value.get(key) for value in objects] for key in keys}
    if form is BAILIAN:
        columns["session_id"] = _chats(columns["chat_id"], columns["parent_chat_id"])
    table = TraceTable(file, lines, columns, form, _place_of_key, is_json=True)
    if form is RECORDING:
        kept = [row for row, value in enumerate(objects) if _is_request(value)]
        return requests_of(table.rows(kept), recorded=True)
    strangers = (row for row, value in enumerate(objects) if not value.keys() <= form.known)
    unknown = None if form.only_named else next(strangers, None)
    workload = requests_of(table if unknown is None else table.rows(range(unknown)))
    if unknown is not None:
        key = min(objects[unknown].keys() - form.known)
        message = (
            f"is an unknown key of {form.title}; known are {', '.join(sorted(form.known))}; for any other"
        )
        raise table.error(unknown, key, f"{message} trace: --columns arrival=...,input=...,output=...")
    return workload


def _chats(chats: Sequence[Any], parents: Sequence[Any]) -> list[str]:
    """Return the session of every turn: the chat that its conversation began with."""
    root: dict[Any, Any] = {}
    for chat, parent in zip(chats, parents, strict=True):
        root[chat] = chat if parent in (-1, None) else root.get(parent, parent)
    return [str(root[chat]) for chat in chats]


def _is_request(value: dict[str, Any]) -> bool:
    """Tell whether a recorded line can be replayed: a request of known length that was not malformed."""
    status = value.get("status")
    refused = isinstance(status, int) and 400 <= status < 429
    return value.get("type") in RECORDED_KINDS and bool(value.get("input_length")) and not refused


def _place_of_key(text: str, key: str) -> int:
    found = re.search(rf"{re.escape(json.dumps(key))}\s*:\s*", text)
    return found.end() + 1 if found else 0
