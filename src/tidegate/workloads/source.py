"""Numbered lines of a text file or packaged sample, plain or gzipped."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any, cast

import orjson

from tidegate.core.errors import TraceError

SAMPLE_PREFIX = "sample:"
_SAMPLE_SUFFIX = ".csv.gz"
_GZIP_MAGIC = b"\x1f\x8b"


def sample_names() -> list[str]:
    """Return the names that ``sample:NAME`` accepts: the traces shipped inside the package."""
    folder = resources.files("tidegate.workloads") / "samples"
    return sorted(
        f.name.removesuffix(_SAMPLE_SUFFIX) for f in folder.iterdir() if f.name.endswith(_SAMPLE_SUFFIX)
    )


def read_lines(source: str | Path) -> Iterator[tuple[int, str]]:
    """Yield ``(line number from 1, text without its line end)`` of a file or of ``sample:NAME``.

    Gzip is recognised by its first bytes, whatever the file is called. Raises TraceError when the
    file is missing or unreadable, is not UTF-8, or is a truncated or damaged gzip.
    """
    name, number = str(source), 0
    try:
        with _path(name).open("rb") as opened:
            raw = cast(io.BufferedReader, opened)
            compressed = raw.peek(2)[:2] == _GZIP_MAGIC
            binary = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if compressed else raw)
            with io.TextIOWrapper(binary, encoding="utf-8-sig") as text:
                for number, line in enumerate(text, start=1):
                    yield number, line.rstrip("\r\n")
    except EOFError:
        raise TraceError("the gzip file ends early; it is truncated", file=name, line=number + 1) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"damaged gzip data ({error})", file=name, line=number + 1) from None
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text ({error.reason}); a trace is CSV or JSONL, plain or gzipped"
        raise TraceError(message, file=name, line=number + 1) from None
    except OSError as error:
        raise TraceError(f"cannot read the file: {error.strerror or error}", file=name) from None


def _path(name: str) -> Path | Traversable:
    if not name.startswith(SAMPLE_PREFIX):
        return Path(name)
    known = sample_names()
    sample = name.removeprefix(SAMPLE_PREFIX)
    if sample not in known:
        raise TraceError(f"no such sample; there is {', '.join(known)}", file=name)
    return resources.files("tidegate.workloads") / "samples" / (sample + _SAMPLE_SUFFIX)


def parse_object(file: str, number: int, text: str) -> dict[str, Any]:
    """Parse one line as a JSON object; raises TraceError at the offending character."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise TraceError(f"broken JSON: {error.msg}", file=file, line=number, column=error.colno) from None
    if not isinstance(value, dict):
        raise TraceError("expected a JSON object", file=file, line=number, column=1)
    return value
