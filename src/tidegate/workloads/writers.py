"""Write a trace: Mooncake JSONL, this project's CSV, or the CSV forms of Azure and BurstGPT."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

from tidegate.core.errors import ConfigError
from tidegate.workloads.formats import AZURE, BURSTGPT
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS, TraceRecord, Workload


class WriteFormat(StrEnum):
    """``mooncake`` and ``csv`` hold a whole record; the others only times and lengths."""

    MOONCAKE = "mooncake"
    CSV = "csv"
    AZURE = "azure"
    BURSTGPT = "burstgpt"


AZURE_EPOCH = datetime(2023, 11, 16)
"""The date that relative times are written on: any will do, for readers count from the first row."""
_EXTRAS = ("session_id", "turn", "delay_s", "slo_class", "client_id", "hash_ids")
_LACKS = {
    WriteFormat.AZURE: _EXTRAS,
    WriteFormat.BURSTGPT: tuple(name for name in _EXTRAS if name != "session_id"),
}
"""What a format cannot hold beside arrival and lengths."""


def format_of(path: Path) -> WriteFormat:
    """Tell the format from the name: ``.jsonl`` is Mooncake, ``.csv`` ours, each also with ``.gz``.

    Raises ConfigError for any other name.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in (".jsonl", ".csv"):
        raise ConfigError(
            f"{path}: cannot tell the format; the name must end in .jsonl, .csv or these with .gz"
        )
    return WriteFormat.MOONCAKE if suffix == ".jsonl" else WriteFormat.CSV


def lost_in(form: WriteFormat, workload: Workload) -> list[str]:
    """Return the fields that some request has and the format cannot hold, in a fixed order."""
    return list(filter(workload.has, _LACKS.get(form, ())))


def write_trace(
    path: Path, workload: Workload, form: WriteFormat | None = None, *, force: bool = False
) -> None:
    """Write the requests, gzipped when the name ends in ``.gz``.

    The file appears whole or not at all. Reading it back gives the same requests as far as the format
    goes (``lost_in``), times to the microsecond. Raises ConfigError when the file exists without
    ``force``, when the format is neither given nor told by the name, when the folder cannot be written,
    or when a name cannot stand in a CSV.
    """
    text_of = _WRITERS[form or format_of(path)]
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; choose another name or add --force")
    data = text_of(workload).encode()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)  # a fixed time: the same requests give the same bytes
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write there: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _mooncake(workload: Workload) -> str:
    lines = []
    for record in workload:
        ids = _ids_of(record)
        line: dict[str, Any] = {
            "timestamp": _milliseconds(record.arrival_s),
            "input_length": record.input_tokens,
            "output_length": record.output_tokens,
        }
        if ids:
            line["hash_ids"] = ids
            if record.block_tokens != MOONCAKE_BLOCK_TOKENS:
                line["block_tokens"] = record.block_tokens
        if record.session_id:
            line |= {"session_id": record.session_id, "turn": record.turn}
        if record.delay_s is not None:
            line["delay_ms"] = _milliseconds(record.delay_s)
        if record.slo_class:
            line["slo_class"] = record.slo_class
        if record.client_id:
            line["client_id"] = record.client_id
        lines.append(orjson.dumps(line).decode() + "\n")
    return "".join(lines)


def _own(workload: Workload) -> str:
    wanted = {"arrival_s", "input_tokens", "output_tokens", *filter(workload.has, _EXTRAS)}
    if "hash_ids" in wanted and workload.has("block_tokens"):
        wanted.add("block_tokens")
    wanted.discard("turn")
    if "session_id" in wanted:
        wanted.add("turn")
    names = [name for name in TraceRecord._fields if name in wanted]
    columns = {name: workload.column(name).tolist() for name in names}
    if "hash_ids" in wanted:
        columns["hash_ids"] = list(map(_ids_of, workload))
    return _csv(names, *(map(_TEXTS.get(name, str), columns[name]) for name in names))


def _ids_of(record: TraceRecord) -> tuple[int, ...]:
    """Return the ids of a request's blocks. Rounded lengths can leave more; readers refuse these."""
    return record.hash_ids[: -(-(record.input_tokens + record.output_tokens) // record.block_tokens)]


def _azure(workload: Workload) -> str:
    since_epoch = (AZURE_EPOCH + timedelta(seconds=at_s) for at_s in workload.arrival_s.tolist())
    times = [at.isoformat(sep=" ", timespec="microseconds") for at in since_epoch]
    return _csv(AZURE.names.values(), times, workload.input_tokens.tolist(), workload.output_tokens.tolist())


def _burstgpt(workload: Workload) -> str:
    sessions = workload.column("session_id").tolist()
    return _csv(
        BURSTGPT.names.values(),
        map(_plain, workload.arrival_s.tolist()),
        sessions,
        ["unknown"] * len(workload),
        workload.input_tokens.tolist(),
        workload.output_tokens.tolist(),
        (workload.input_tokens + workload.output_tokens).tolist(),
        ["Conversation log" if session else "API log" for session in sessions],
    )


_WRITERS: dict[WriteFormat, Callable[[Workload], str]] = {
    WriteFormat.MOONCAKE: _mooncake,
    WriteFormat.CSV: _own,
    WriteFormat.AZURE: _azure,
    WriteFormat.BURSTGPT: _burstgpt,
}


def _csv(header: Iterable[str], *columns: Iterable[object]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    rows = list(zip(*columns, strict=True))
    writer.writerows(rows)
    text = file.getvalue()
    if "\r" in text or text.count("\n") > 1 + len(rows):
        raise ConfigError("a name with a line break cannot stand in a CSV; write .jsonl instead")
    return text


def _plain(seconds: float) -> str:
    """Write seconds to the nanosecond without exponent or needless zeros."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".")


def _milliseconds(seconds: float) -> float | int:
    value = round(seconds * 1000.0, 6)
    return int(value) if value.is_integer() else value


_TEXTS: dict[str, Callable[[Any], str]] = {
    "arrival_s": _plain,
    "delay_s": lambda seconds: "" if seconds != seconds else _plain(seconds),
    "hash_ids": lambda ids: "|".join(map(str, ids)),
}
"""How a column stands in this project's CSV, where that is not its text."""
