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


def lost_in(form: WriteFormat, workload: Workload) -> list[str]:
    """Return the fields that some request has and the format cannot hold, in a fixed order."""
    return [name for name in _EXTRAS if name not in HOLDS[form] and workload.has(name)]


def write_trace(
    path: Path, workload: Workload, form: WriteFormat | None = None, *, force: bool = False
) -> None:
    """Write the requests, gzipped when the name ends in ``.gz``.

    The file appears whole or not at all. Reading it back gives the same requests as far as the format
    goes (``lost_in``), times to the microsecond. Raises ConfigError when the file exists without
    ``force``, when the format is neither given nor told by the name, when the folder cannot be written,
    or when a name cannot stand in a CSV.
    """
    lines = _WRITERS[form or format_of(path)]
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; choose another name or add --force")
    with _replacing(path) as binary, _text(binary, compressed=path.name.endswith(".gz")) as text:
        text.writelines(lines(workload))


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


def _mooncake(workload: Workload) -> Iterator[str]:
    for record in workload:
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


def _own(workload: Workload) -> Iterator[str]:
    wanted = {"arrival_s", "input_tokens", "output_tokens", *filter(workload.has, _EXTRAS)}
    if "hash_ids" in wanted and workload.has("block_tokens"):
        wanted.add("block_tokens")
    if "session_id" in wanted:
        wanted.add("turn")
    else:
        wanted.discard("turn")
    names = [name for name in TraceRecord._fields if name in wanted]
    yield _csv_line(names)
    columns = [map(_WRITTEN.get(name, str), workload.column(name).tolist()) for name in names]
    yield from map(_csv_line, zip(*columns, strict=True))


def _azure(workload: Workload) -> Iterator[str]:
    yield _csv_line(AZURE)
    for record in workload:
        at = AZURE_EPOCH + timedelta(seconds=record.arrival_s)
        yield _csv_line(
            (at.isoformat(sep=" ", timespec="microseconds"), record.input_tokens, record.output_tokens)
        )


def _burstgpt(workload: Workload) -> Iterator[str]:
    head, *rest = BURSTGPT
    yield _csv_line((head, "Session ID", *rest))
    for r in workload:
        total = r.input_tokens + r.output_tokens
        kind = "Conversation log" if r.session_id else "API log"
        yield _csv_line(
            (_plain(r.arrival_s), r.session_id, "unknown", r.input_tokens, r.output_tokens, total, kind)
        )


_WRITERS: dict[WriteFormat, Callable[[Workload], Iterator[str]]] = {
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


_WRITTEN: dict[str, Callable[[Any], str]] = {
    "arrival_s": _plain,
    "delay_s": lambda seconds: "" if seconds != seconds else _plain(seconds),
    "hash_ids": lambda ids: "|".join(map(str, ids)),
}
"""How a column stands in this project's CSV, where that is not its text."""
