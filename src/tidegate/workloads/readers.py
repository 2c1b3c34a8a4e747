"""Read a trace of any supported format."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tidegate.core.errors import TraceError
from tidegate.workloads.csv_formats import check_header, has_times, parse_csv
from tidegate.workloads.jsonl_formats import parse_jsonl
from tidegate.workloads.source import all_lines, read_lines
from tidegate.workloads.trace import Workload


def read_trace(source: str | Path) -> Workload:
    """Return the requests of a trace in order of arrival.

    ``source`` is a file or ``sample:NAME``; the format is told from the first line: Azure, BurstGPT
    or this project's CSV, Mooncake JSONL, a gateway journal or a bench result, each plain or
    gzipped. An output length of 0 is raised to 1. Raises TraceError with file, line and column for
    malformed input, and for a file that has no arrival times.
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


def is_timed(source: str | Path) -> bool:
    """Tell from its first line whether a trace has arrival times across sessions. Raises TraceError."""
    file = str(source)
    first = _first_line(file, list(islice(read_lines(source), 1)))
    return _is_json(first) or has_times(check_header(file, 1, first))


def open_trace(source: str | Path) -> tuple[bool, Workload]:
    """Return whether the trace is timed, and its requests as ``read_untimed`` returns them."""
    file = str(source)
    lines = all_lines(source)
    if _is_json(_first_line(file, lines)):
        return True, parse_jsonl(file, lines)
    return parse_csv(file, lines)


def _first_line(file: str, lines: list[tuple[int, str]]) -> str:
    if not lines or not lines[0][1].strip():
        raise TraceError("the file is empty or starts with an empty line", file=file, line=len(lines[:1]))
    return lines[0][1]


def _is_json(line: str) -> bool:
    return line.lstrip().startswith(("{", "["))
