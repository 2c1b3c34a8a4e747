"""Read a trace of any supported format as a stream of records."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tidegate.core.errors import TraceError
from tidegate.workloads.csv_formats import parse_csv
from tidegate.workloads.jsonl_formats import parse_jsonl
from tidegate.workloads.source import read_lines
from tidegate.workloads.trace import TraceRecord


def read_trace(source: str | Path) -> Iterator[TraceRecord]:
    """Yield the records of a trace in order of arrival.

    ``source`` is a file or ``sample:NAME``; the format is told from the first line: Azure, BurstGPT
    or this project's CSV, Mooncake JSONL, a gateway journal or a bench result, each plain or
    gzipped. An output length of 0 is raised to 1. Raises TraceError with file, line and column for
    malformed input, and at once for a file that has no arrival times.
    """
    timed, records = _open(source)
    if not timed:
        raise TraceError(
            "the file has no arrival times; choose an arrival process for it: --poisson RPS, "
            "--gamma RPS --cv X or --bursts RPS:S,RPS:S (each session starts at one arrival)",
            file=str(source), line=1,
        )  # fmt: skip
    return records


def read_untimed(source: str | Path) -> Iterator[TraceRecord]:
    """Yield the records of any trace in file order, for use with an arrival process of one's own.

    In a session file ``arrival_s`` is the time since the session's start, in a file of lengths 0.
    Raises TraceError as ``read_trace`` does.
    """
    return _open(source)[1]


def is_timed(source: str | Path) -> bool:
    """Tell whether the trace has arrival times across sessions; raises TraceError if unreadable."""
    return _open(source)[0]


def open_trace(source: str | Path) -> tuple[bool, Iterator[TraceRecord]]:
    """Return whether the trace is timed, and its records as ``read_untimed`` yields them."""
    return _open(source)


def _open(source: str | Path) -> tuple[bool, Iterator[TraceRecord]]:
    file = str(source)
    lines = read_lines(source)
    first = next(lines, None)
    if first is None or not first[1].strip():
        raise TraceError("the file is empty or starts with an empty line", file=file, line=1 if first else 0)
    lines = chain([first], lines)
    if first[1].lstrip().startswith(("{", "[")):
        return True, parse_jsonl(file, lines)
    return parse_csv(file, lines)
