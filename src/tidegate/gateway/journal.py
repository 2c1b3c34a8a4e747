"""The journal's writing end: JSON lines, buffered, never in the way of a request."""

from __future__ import annotations

import asyncio
import time
from io import BufferedWriter
from pathlib import Path
from typing import Any

import orjson

from tidegate.core.errors import ConfigError

FLUSH_S = 0.25
"""How much of the journal a killed gateway may lose."""
ALTERNATIVES = 8
"""How many alternatives of a placement are written."""


class Journal:
    """Appends one object per line. ``t`` is seconds since the journal began.

    Without a path every write is a no-op, so callers need not ask; ``enabled`` tells those that
    would compute something for it. The line kinds are documented with their reader, in
    ``tidegate.measure.journal``.
    """

    def __init__(self, path: Path | None, now_s: float) -> None:
        self.enabled = path is not None
        self.started_s = now_s
        self._lines: list[bytes] = []
        self._file: BufferedWriter | None = None
        self._timer: asyncio.TimerHandle | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write the journal {path}: {error.strerror}") from None

    def write(self, line: str, now_s: float, /, **row: Any) -> None:
        """Append a line of type ``line``."""
        if not self.enabled:
            return
        self._lines.append(orjson.dumps({"type": line, "t": round(now_s - self.started_s, 6), **row}))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def header(self, **row: Any) -> None:
        """Write the first line."""
        self.write("header", self.started_s, started_unix_s=time.time(), **row)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._timer = None
        if self._file is not None and self._lines:
            self._file.write(b"\n".join(self._lines) + b"\n")
            self._file.flush()
            self._lines.clear()

    def close(self) -> None:
        """Flush and close; later writes are dropped."""
        if self._timer is not None:
            self._timer.cancel()
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
        self.enabled = False
