"""Write a trace: Mooncake JSONL, this project's CSV, or the CSV forms of Azure and BurstGPT."""

from __future__ import annotations

import csv
import gzip
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import orjson

from tidegate.core.errors import ConfigError
from tidegate.workloads.csv_formats import AZURE, BURSTGPT
from tidegate.workloads.trace import MOONCAKE_BLOCK_TOKENS, TraceRecord


class WriteFormat(StrEnum):
    """``mooncake`` and ``csv`` hold a whole record; the others only times and lengths."""

    MOONCAKE = "mooncake"
    CSV = "csv"
    AZURE = "azure"
    BURSTGPT = "burstgpt"


AZURE_EPOCH = datetime(2023, 11, 16)
"""The date that relative times are written on: any will do, for readers count from the first row."""
_EXTRAS = ("session_id", "turn", "delay_s", "slo_class", "client_id", "hash_ids")
HOLDS: dict[WriteFormat, frozenset[str]] = {
    WriteFormat.MOONCAKE: frozenset(_EXTRAS),
    WriteFormat.CSV: frozenset(_EXTRAS),
    WriteFormat.AZURE: frozenset(),
    WriteFormat.BURSTGPT: frozenset({"session_id"}),
}
"""What each format can hold beside arrival and lengths."""


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


def lost_in(form: WriteFormat, records: Iterable[TraceRecord]) -> list[str]:
    """Return the fields that some record has and the format cannot hold, in a fixed order."""
    candidates = [name for name in _EXTRAS if name not in HOLDS[form]]
    if not candidates:
        return []
    lost: set[str] = set()
    for record in records:
        lost.update(name for name in candidates if getattr(record, name) not in ("", None, 0, ()))
    return [name for name in candidates if name in lost]


def write_trace(
    path: Path, records: Iterable[TraceRecord], form: WriteFormat | None = None, *, force: bool = False
) -> int:
    """Write the records, gzipped when the name ends in ``.gz``; return how many there were.

    The file appears whole or not at all. Reading it back gives the same records as far as the format
    goes (``lost_in``), times to the microsecond. Raises ConfigError when the file exists without
    ``force``, when the format is neither given nor told by the name, when the folder cannot be written,
    or when a name cannot stand in a CSV.
    """
    lines = _WRITERS[form or format_of(path)]
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; choose another name or add --force")
    written = 0

    def counted() -> Iterator[TraceRecord]:
        nonlocal written
        for record in records:
            written += 1
            yield record

    with _replacing(path) as binary, _text(binary, compressed=path.name.endswith(".gz")) as text:
        text.writelines(lines(counted()))
    return written


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write there: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as binary:
            yield binary
        # mkstemp makes private files; a trace is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _text(binary: IO[bytes], *, compressed: bool) -> Iterator[IO[str]]:
    if not compressed:
        with io.TextIOWrapper(binary, encoding="utf-8", newline="") as text:
            yield text
        return
    # A fixed time and no name: the same records give the same bytes.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=binary, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        yield text


def _mooncake(records: Iterable[TraceRecord]) -> Iterator[str]:
    for record in records:
        line: dict[str, Any] = {
            "timestamp": _milliseconds(record.arrival_s),
            "input_length": record.input_tokens,
            "output_length": record.output_tokens,
        }
        if record.hash_ids:
            line["hash_ids"] = record.hash_ids
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
        yield orjson.dumps(line).decode() + "\n"


def _own(records: Iterable[TraceRecord]) -> Iterator[str]:
    trace = list(records)
    columns: list[tuple[str, Callable[[TraceRecord], object]]] = [
        ("arrival_s", lambda r: _plain(r.arrival_s)),
        ("input_tokens", lambda r: r.input_tokens),
        ("output_tokens", lambda r: r.output_tokens),
    ]
    if any(r.hash_ids for r in trace):
        columns.append(("hash_ids", lambda r: "|".join(map(str, r.hash_ids))))
    if any(r.hash_ids and r.block_tokens != MOONCAKE_BLOCK_TOKENS for r in trace):
        columns.append(("block_tokens", lambda r: r.block_tokens))
    if any(r.session_id for r in trace):
        columns += [("session_id", lambda r: r.session_id), ("turn", lambda r: r.turn)]
    if any(r.delay_s is not None for r in trace):
        columns.append(("delay_s", lambda r: "" if r.delay_s is None else _plain(r.delay_s)))
    if any(r.slo_class for r in trace):
        columns.append(("slo_class", lambda r: r.slo_class))
    if any(r.client_id for r in trace):
        columns.append(("client_id", lambda r: r.client_id))
    yield _csv_line(name for name, _ in columns)
    for record in trace:
        yield _csv_line(value(record) for _, value in columns)


def _azure(records: Iterable[TraceRecord]) -> Iterator[str]:
    yield _csv_line(AZURE)
    for record in records:
        at = AZURE_EPOCH + timedelta(seconds=record.arrival_s)
        yield _csv_line(
            (at.isoformat(sep=" ", timespec="microseconds"), record.input_tokens, record.output_tokens)
        )


def _burstgpt(records: Iterable[TraceRecord]) -> Iterator[str]:
    head, *rest = BURSTGPT
    yield _csv_line((head, "Session ID", *rest))
    for r in records:
        total = r.input_tokens + r.output_tokens
        kind = "Conversation log" if r.session_id else "API log"
        yield _csv_line(
            (_plain(r.arrival_s), r.session_id, "unknown", r.input_tokens, r.output_tokens, total, kind)
        )


_WRITERS: dict[WriteFormat, Callable[[Iterable[TraceRecord]], Iterator[str]]] = {
    WriteFormat.MOONCAKE: _mooncake,
    WriteFormat.CSV: _own,
    WriteFormat.AZURE: _azure,
    WriteFormat.BURSTGPT: _burstgpt,
}


def _csv_line(values: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(list(values))
    text = line.getvalue()
    if "\n" in text or "\r" in text:
        raise ConfigError(f"a name with a line break cannot stand in a CSV: {text!r}; write .jsonl instead")
    return text + "\n"


def _plain(seconds: float) -> str:
    """Write seconds to the nanosecond without exponent or needless zeros."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".")


def _milliseconds(seconds: float) -> float | int:
    value = round(seconds * 1000.0, 6)
    return int(value) if value.is_integer() else value
