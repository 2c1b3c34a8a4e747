"""The formats of traces: what their columns are called, and how a file is told to be of one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS

UNNAMED = re.compile(r"(Unnamed: \d+)?")
"""The column of row numbers that pandas writes."""
OPTIONAL = (
    "hash_ids", "block_tokens", "client_id", "session_id", "turn", "delay_s", "slo_class", "arrival_s",
    "reason_tokens", "agent", "round", "session_t_s", "prefix_hit_tokens", "think_time_s", "api_time_s",
    "ttft_s", "model", "next",
)  # fmt: skip
"""Columns that any CSV may have, those of session files among them."""


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """What one kind of file calls the fields of ``TraceRecord``.

    ``names`` are columns by field, where they differ; ``needed`` those that the format is told by, ``others``
    what it may have beside. Fields of ``in_ms`` are in milliseconds. ``first_turn`` is a session's first.
    """

    title: str
    names: Mapping[str, str]
    needed: tuple[str, ...]
    others: Collection[str] = ()
    in_ms: frozenset[str] = frozenset()
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    first_turn: int = 0
    failed_without_answer: bool = False
    only_named: bool = False

    @property
    def known(self) -> set[str]:
        """The columns that it may have."""
        return {*self.names.values(), *self.needed, *self.others}


def _csv(title: str, arrival: str, inputs: str, outputs: str, *others: str) -> TraceFormat:
    names = {"arrival_s": arrival, "input_tokens": inputs, "output_tokens": outputs}
    return TraceFormat(title, names, (inputs, outputs), (*others, *OPTIONAL))


AZURE = _csv("Azure CSV", "TIMESTAMP", "ContextTokens", "GeneratedTokens", "NumImages")
BURSTGPT = TraceFormat(
    "BurstGPT CSV",
    {
        "arrival_s": "Timestamp",
        "session_id": "Session ID",
        "model": "Model",
        "input_tokens": "Request tokens",
        "output_tokens": "Response tokens",
        "total": "Total tokens",
        "kind": "Log Type",
    },
    ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"),
    ("Elapsed time", *OPTIONAL),
    failed_without_answer=True,
)
VIDUR = _csv(
    *("Vidur CSV", "arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    *("num_total_tokens", "pd_ratio"),
)
SPLITWISE = _csv(
    *("Splitwise CSV", "arrival_timestamp", "prompt_size", "token_size"),
    *("request_id", "request_type", "application_id", "batch_size"),
)
OWN = TraceFormat("tidegate CSV", {}, ("input_tokens", "output_tokens"), OPTIONAL)
CSV_FORMATS = (AZURE, BURSTGPT, VIDUR, SPLITWISE, OWN)

_JSON = {"arrival_s": "timestamp", "input_tokens": "input_length", "output_tokens": "output_length"}
_EXTRAS = ("hash_ids", "block_tokens", "session_id", "turn", "slo_class", "client_id")
MOONCAKE = TraceFormat(
    "Mooncake JSONL",
    {**_JSON, "delay_s": "delay_ms"},
    ("timestamp", "input_length", "output_length"),
    ("delay", "type", *_EXTRAS),
    frozenset({"arrival_s", "delay_s"}),
)
BAILIAN = TraceFormat(
    "Bailian JSONL",
    _JSON,
    ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length"),
    ("type", *_EXTRAS),
    block_tokens=16,
    first_turn=1,
)
RECORDING = TraceFormat(
    "recording of tidegate", MOONCAKE.names, MOONCAKE.needed, ("slo_class",), MOONCAKE.in_ms
)

FIELDS = {
    "arrival": "arrival_s", "arrival_ms": "arrival_s", "input": "input_tokens", "output": "output_tokens",
    "session": "session_id", "turn": "turn", "delay": "delay_s", "delay_ms": "delay_s",
    "client": "client_id", "slo_class": "slo_class", "hash_ids": "hash_ids", "block_tokens": "block_tokens",
}  # fmt: skip
"""What ``--columns`` may name, by field."""


def csv_format(header: Collection[str]) -> TraceFormat:
    """Return the format that shares most of its columns with a header; this project's where none does."""

    def shared(form: TraceFormat) -> int:
        return sum(name in header for name in {*form.needed, form.names.get("arrival_s")})

    found = max(CSV_FORMATS, key=shared)
    return found if shared(found) else OWN


def given_format(columns: str) -> TraceFormat:
    """Return the format that ``arrival=COLUMN,input=COLUMN,output=COLUMN`` describes; others are not read.

    Times are in seconds or dates, in milliseconds as ``arrival_ms`` and ``delay_ms``. Raises ConfigError.
    """
    parts = [part.partition("=") for part in columns.split(",")]
    pairs = [(key.strip(), name.strip()) for key, _, name in parts]
    names = {FIELDS[key]: name for key, name in pairs if key in FIELDS and name}
    if len(names) < len(pairs) or not {"input_tokens", "output_tokens"} <= names.keys():
        raise ConfigError(
            "--columns names the columns of a trace, as in arrival=ts,input=prompt,output=answer, each of "
            f"{', '.join(FIELDS)} once, with input and output; got {columns!r}"
        )
    in_ms = frozenset(FIELDS[key] for key, _ in pairs if key.endswith("_ms"))
    return TraceFormat("columns as given", names, tuple(names.values()), in_ms=in_ms, only_named=True)
