"""Lines of a trace file, plain or gzipped, with the place of each for error messages."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, cast

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
    with _opened(str(source)) as raw:
        yield from _lines(str(source), raw)


def all_lines(source: str | Path) -> list[tuple[int, str]]:
    """Return what ``read_lines`` yields, much faster."""
    with _opened(str(source)) as raw:
        data = raw.read()
    try:
        text = (gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data).decode("utf-8-sig")
    except (EOFError, OSError, zlib.error, UnicodeDecodeError):
        # The slow way knows in which line.
        return list(_lines(str(source), io.BufferedReader(io.BytesIO(data))))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return list(enumerate(text.removesuffix("\n").split("\n"), 1)) if text else []


def _lines(name: str, raw: io.BufferedReader) -> Iterator[tuple[int, str]]:
    number = 0
    compressed = raw.peek(2)[:2] == _GZIP_MAGIC
    binary = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if compressed else raw)
    try:
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


@contextmanager
def _opened(name: str) -> Iterator[io.BufferedReader]:
    path: Path | Traversable = Path(name)
    if name.startswith(SAMPLE_PREFIX):
        known = sample_names()
        sample = name.removeprefix(SAMPLE_PREFIX)
        if sample not in known:
            raise TraceError(f"no such sample; there is {', '.join(known)}", file=name)
        path = resources.files("tidegate.workloads") / "samples" / (sample + _SAMPLE_SUFFIX)
    try:
        raw = path.open("rb")
    except OSError as error:
        raise TraceError(f"cannot read the file: {error.strerror or error}", file=name) from None
    with raw:
        yield raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)  # type: ignore[arg-type]
