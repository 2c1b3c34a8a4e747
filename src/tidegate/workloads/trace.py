"""One request of a trace, and the native way to write it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TextIO

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """When a request arrives and how large it is; never its text.

    ``arrival_s`` counts from the start of the trace. ``hash_ids`` name the prompt's blocks of
    ``block_tokens`` tokens, the last one partial: two prompts share a prefix exactly as far as their
    leading ids agree. ``delay_s`` is the client's pause between the previous answer of the session
    and this turn, where the source publishes it. Empty strings mean "not given".
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


def to_json(record: TraceRecord) -> dict[str, Any]:
    """Return the record as an object of the native format, Mooncake JSONL with optional extra keys.

    Times become milliseconds, rounded to the nanosecond. Keys that hold their default are left out.
    """
    line: dict[str, Any] = {
        "timestamp": _milliseconds(record.arrival_s),
        "input_length": record.input_tokens,
        "output_length": record.output_tokens,
    }
    if record.hash_ids:
        line["hash_ids"] = list(record.hash_ids)
    if record.block_tokens != MOONCAKE_BLOCK_TOKENS:
        line["block_tokens"] = record.block_tokens
    if record.session_id:
        line["session_id"] = record.session_id
    if record.turn:
        line["turn"] = record.turn
    if record.delay_s is not None:
        line["delay_ms"] = _milliseconds(record.delay_s)
    if record.slo_class:
        line["slo_class"] = record.slo_class
    if record.client_id:
        line["client_id"] = record.client_id
    return line


def write_jsonl(records: Iterable[TraceRecord], out: TextIO) -> int:
    """Write records in the native format, one per line; return how many were written."""
    count = 0
    for record in records:
        out.write(json.dumps(to_json(record), separators=(",", ":")) + "\n")
        count += 1
    return count


def _milliseconds(seconds: float) -> int | float:
    ms = round(seconds * 1000.0, 6)
    return int(ms) if ms.is_integer() else ms
