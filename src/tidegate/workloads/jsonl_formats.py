"""JSONL traces: Mooncake (native, with optional extra keys), gateway journals and bench results.

The Mooncake format is that of kvcache-ai/Mooncake's FAST'25 traces: ``timestamp`` in milliseconds,
``input_length``, ``output_length`` and ``hash_ids`` of 512-token blocks. The extra keys are
``session_id``, ``turn``, ``delay_ms``, ``slo_class``, ``client_id`` and ``block_tokens``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import orjson

from tidegate.core.errors import TraceError
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS, TraceRecord

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


def parse_jsonl(file: str, lines: Iterator[tuple[int, str]]) -> Iterator[TraceRecord]:
    """Yield the records of a JSONL trace; a line with a ``type`` key first makes it a recording.

    A recording (gateway journal or bench result) is read whole and sorted by ``timestamp``, because
    its lines stand in order of completion. Raises TraceError while iterating.
    """
    first = next(lines, None)
    if first is None:
        raise TraceError("the file is empty", file=file)
    number, text = first
    lines = chain([first], lines)
    if "type" in parse_object(file, number, text):
        return iter(_recording(file, lines))
    return _mooncake(file, lines)


def _mooncake(file: str, lines: Iterator[tuple[int, str]]) -> Iterator[TraceRecord]:
    last_s = -math.inf
    for number, text in lines:
        if not text.strip():
            continue
        line = _Line(file, number, text)
        unknown = line.value.keys() - MOONCAKE_KEYS
        if unknown:
            key = min(unknown)
            raise line.error(key, f"unknown key {key!r}; known are {', '.join(sorted(MOONCAKE_KEYS))}")
        record = line.record()
        if record.arrival_s < last_s:
            message = f"timestamp is {line.value['timestamp']}, earlier than the line before; sort by arrival"
            raise line.error("timestamp", message)
        last_s = record.arrival_s
        yield record


def _recording(file: str, lines: Iterator[tuple[int, str]]) -> list[TraceRecord]:
    records: list[TraceRecord] = []
    broken: TraceError | None = None
    for number, text in lines:
        if not text.strip():
            continue
        if broken is not None:
            raise broken
        try:
            line = _Line(file, number, text)
        except TraceError as error:
            broken = error  # a killed writer leaves half a last line; anywhere else it is damage
            continue
        if line.value.get("type") in REQUEST_KINDS and line.offers_work():
            records.append(line.record())
    if not records:
        raise TraceError("the recording holds no request outcomes to replay", file=file)
    return sorted(records, key=lambda record: record.arrival_s)


class _Line:
    """One JSON object with typed access to its keys; every method raises TraceError at the key's value."""

    def __init__(self, file: str, number: int, text: str) -> None:
        self.file, self.number, self.text = file, number, text
        self.value = parse_object(file, number, text)

    def error(self, key: str, message: str) -> TraceError:
        found = re.search(rf"{re.escape(json.dumps(key))}\s*:\s*", self.text)
        column = found.end() + 1 if found else 0
        return TraceError(message, file=self.file, line=self.number, column=column)

    def wrong(self, key: str, expected: str) -> TraceError:
        if key not in self.value:
            return self.error(key, f"the line lacks {key}, {expected}")
        return self.error(key, f"{key} is {self.value[key]!r}, expected {expected}")

    def offers_work(self) -> bool:
        """Tell whether a recorded request can be replayed: its length is known and it was not malformed."""
        status = self.value.get("status")
        refused = isinstance(status, int) and 400 <= status < 429
        return bool(self.value.get("input_length")) and not refused

    def record(self) -> TraceRecord:
        value = self.value
        # A recorded request that was rejected has no answer, and perhaps a null length.
        recorded = "type" in value
        delay_ms = None if value.get("delay_ms") is None else self.milliseconds("delay_ms")
        return TraceRecord(
            arrival_s=self.milliseconds("timestamp") / 1000.0,
            input_tokens=self.integer("input_length", 1),
            output_tokens=max(1, self.integer("output_length", 0, default=1 if recorded else None)),
            hash_ids=self.hash_ids(),
            block_tokens=self.integer("block_tokens", 1, default=MOONCAKE_BLOCK_TOKENS),
            session_id=self.label("session_id"),
            turn=self.integer("turn", 0, default=0),
            delay_s=None if delay_ms is None else delay_ms / 1000.0,
            slo_class=self.label("slo_class"),
            client_id=self.label("client_id"),
        )

    def integer(self, key: str, minimum: int, default: int | None = None) -> int:
        value = self.value.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.wrong(key, f"an integer >= {minimum}")
        return value

    def milliseconds(self, key: str) -> float:
        value = self.value.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, "a number of milliseconds >= 0")
        return float(value)

    def label(self, key: str) -> str:
        value = self.value.get(key)
        if value is None:
            return ""
        if type(value) not in (str, int):
            raise self.wrong(key, "a string")
        return str(value)

    def hash_ids(self) -> tuple[int, ...]:
        ids = self.value.get("hash_ids")
        if ids is None:
            return ()
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise self.error("hash_ids", "hash_ids holds something else than integers")
        return tuple(ids)
