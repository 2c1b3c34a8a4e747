"""JSONL traces: Mooncake (native, with optional extra keys), gateway journals and bench results.

The Mooncake format is that of kvcache-ai/Mooncake's FAST'25 traces: ``timestamp`` in milliseconds,
``input_length``, ``output_length`` and ``hash_ids`` of 512-token blocks. The extra keys are
``session_id``, ``turn``, ``delay_ms``, ``slo_class``, ``client_id`` and ``block_tokens``.
"""

from __future__ import annotations

import json
import math
import re
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import orjson

from tidegate.core.errors import TraceError
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS, Floats, Integers, Workload, optional

MOONCAKE_KEYS = frozenset((
    "timestamp", "input_length", "output_length", "hash_ids", "block_tokens",
    "session_id", "turn", "delay_ms", "slo_class", "client_id",
))  # fmt: skip
# Line kinds of a recording that stand for one offered request.
REQUEST_KINDS = ("outcome", "request")


def parse_object(file: str, number: int, text: str) -> dict[str, Any]:
    """Parse one line as a JSON object; raises TraceError at the offending character."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise TraceError(
                f"broken JSON: {error.msg}", file=file, line=number, column=error.colno
            ) from None
        # The standard parser takes NaN and Infinity, which are not JSON.
        at = re.search(r"NaN|-?Infinity", text)
        column = at.start() + 1 if at else 0
        raise TraceError("broken JSON: NaN or Infinity", file=file, line=number, column=column) from None
    if not isinstance(value, dict):
        raise TraceError("expected a JSON object", file=file, line=number, column=1)
    return value


def parse_jsonl(file: str, lines: list[tuple[int, str]]) -> Workload:
    """Return the requests of a JSONL trace; a line with a ``type`` key first makes it a recording.

    A recording (gateway journal or bench result) is sorted by ``timestamp``, because its lines stand in
    order of completion. Raises TraceError for the first malformed line.
    """
    recorded = "type" in parse_object(file, *lines[0])
    objects: list[JsonLine] = []
    broken: TraceError | None = None
    for number, text in lines:
        if text.strip():
            if broken is not None:
                break
            try:
                objects.append(JsonLine(number, text, parse_object(file, number, text)))
            except TraceError as error:
                broken = error
    else:
        if recorded:
            broken = None  # a killed writer leaves half a last line; anywhere else it is damage
    if recorded:
        objects = [line for line in objects if _is_request(line.value)]
    workload = _workload(_JsonTable(file, objects), recorded)
    if broken is not None:
        raise broken
    if not recorded:
        return workload
    if not workload:
        raise TraceError("the recording holds no request outcomes to replay", file=file)
    return workload[workload.arrival_s.argsort(kind="stable")]


class JsonLine(NamedTuple):
    """An object with the place and the text that it was read from."""

    number: int
    text: str
    value: dict[str, Any]


def _is_request(value: dict[str, Any]) -> bool:
    """Tell whether a recorded line can be replayed: a request of known length that was not malformed."""
    status = value.get("status")
    refused = isinstance(status, int) and 400 <= status < 429
    return value.get("type") in REQUEST_KINDS and bool(value.get("input_length")) and not refused


def _workload(table: _JsonTable, recorded: bool) -> Workload:
    try:
        return table.workload(recorded)
    except TraceError as error:
        # Keys are read one after the other: an earlier line may be wrong in a later key.
        earlier = [line for line in table.lines if line.number < error.line]
        _workload(_JsonTable(table.file, earlier), recorded)
        raise


class _JsonTable:
    """Objects by key; every method raises TraceError at the first value that is not as it should be."""

    def __init__(self, file: str, lines: list[JsonLine]) -> None:
        self.file, self.lines = file, lines

    def workload(self, recorded: bool) -> Workload:
        """Return the objects as requests, in their order."""
        if not recorded:
            self._check_keys()
        delay_s = self.seconds("delay_ms", math.nan) if self.has("delay_ms") else None
        arrival_s = self.seconds("timestamp")
        workload = Workload(
            arrival_s,
            self.integers("input_length", 1),
            # A recorded request that was rejected has no answer, and perhaps a null length.
            np.maximum(1, self.integers("output_length", 0, 1 if recorded else None)),
            optional("hash_ids", self.ids()),
            self.integers("block_tokens", 1, MOONCAKE_BLOCK_TOKENS) if self.has("block_tokens") else None,
            optional("session_id", self.labels("session_id")),
            self.integers("turn", 0, 0) if self.has("turn") else None,
            delay_s,
            optional("slo_class", self.labels("slo_class")),
            optional("client_id", self.labels("client_id")),
        )
        late = np.flatnonzero(np.diff(arrival_s) < 0)
        if len(late) and not recorded:
            row = int(late[0]) + 1
            at = self.lines[row].value["timestamp"]
            message = f"timestamp is {at}, earlier than the line before; sort by arrival"
            raise self.error(row, "timestamp", message)
        return workload

    def _check_keys(self) -> None:
        for row, line in enumerate(self.lines):
            if not line.value.keys() <= MOONCAKE_KEYS:
                key = min(line.value.keys() - MOONCAKE_KEYS)
                known = ", ".join(sorted(MOONCAKE_KEYS))
                raise self.error(row, key, f"unknown key {key!r}; known are {known}")

    def has(self, key: str) -> bool:
        return any(key in line.value for line in self.lines)

    def numbers(self, key: str, kinds: set[type], expected: str, minimum: float, empty: Any) -> list[Any]:
        """Return numbers of the given kinds of at least ``minimum``, with ``empty``, if given, for null."""
        values = [line.value.get(key) for line in self.lines]
        for row, value in enumerate(values):
            if value is None and empty is not None:
                values[row] = empty
            elif value is None or type(value) not in kinds or value < minimum:
                raise self.wrong(row, key, expected)
        return values

    def integers(self, key: str, minimum: int, empty: int | None = None) -> Integers:
        return np.array(self.numbers(key, {int}, f"an integer >= {minimum}", minimum, empty), np.int64)

    def seconds(self, key: str, empty: float | None = None) -> Floats:
        """Return milliseconds in seconds."""
        values = self.numbers(key, {int, float}, "a number of milliseconds >= 0", 0, empty)
        return np.array(list(map(float, values)), np.float64) / 1000.0

    def labels(self, key: str) -> list[str]:
        values = [line.value.get(key) for line in self.lines]
        for row, value in enumerate(values):
            if type(value) not in (str, int, NoneType):
                raise self.wrong(row, key, "a string")
        return ["" if value is None else str(value) for value in values]

    def ids(self) -> list[tuple[int, ...]]:
        columns = []
        for row, line in enumerate(self.lines):
            ids = line.value.get("hash_ids")
            if ids is None:
                ids = []
            elif not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
                raise self.error(row, "hash_ids", "hash_ids holds something else than integers")
            columns.append(tuple(ids))
        return columns

    def error(self, row: int, key: str, message: str) -> TraceError:
        """Return a TraceError at a key's value."""
        number, text, _ = self.lines[row]
        found = re.search(rf"{re.escape(json.dumps(key))}\s*:\s*", text)
        return TraceError(message, file=self.file, line=number, column=found.end() + 1 if found else 0)

    def wrong(self, row: int, key: str, expected: str) -> TraceError:
        value = self.lines[row].value
        if key not in value:
            return self.error(row, key, f"the line lacks {key}, {expected}")
        return self.error(row, key, f"{key} is {value[key]!r}, expected {expected}")
