"""The journal's writing end: JSON lines, buffered, never in the way of a request."""

from __future__ import annotations

import asyncio
import logging
import time
from io import BufferedWriter
from pathlib import Path
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.measure.rows import encode_row

log = logging.getLogger(__name__)

FLUSH_S = 0.25
"""How much of the journal a killed gateway may lose."""


class Journal:
    """Appends one object per line. ``t`` is seconds since the journal began.

    Without a path every write is a no-op, so callers need not ask; ``enabled`` tells those that
    would compute something for it. Lines written before ``open`` wait for it. When the file cannot be
    written any more, that is logged once and the journal ends there. The line kinds are documented
    with their reader, in ``tidegate.measure.journal``.
    """

    def __init__(self, path: Path | None, now_s: float) -> None:
        self.enabled = path is not None
        self.started_s = now_s
        self._path = path
        self._lines: list[bytes] = []
        self._file: BufferedWriter | None = None
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Create the file and write what waits. Raises ConfigError when it cannot, or has content already.

        A device or pipe may be reused; a journal of an earlier run is not overwritten.
        """
        path = self._path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.stat().st_size > 0:
                raise ConfigError(f"the journal {path} exists already; name another file, or delete it")
            self._file = path.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write the journal {path}: {error.strerror}") from None
        self.flush()

    def write(self, line: str, now_s: float, /, **row: Any) -> None:
        """Append a line of type ``line``."""
        if not self.enabled:
            return
        self._lines.append(encode_row(line, now_s - self.started_s, row))
        if self._timer is None and self._file is not None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def header(self, **row: Any) -> None:
        """Write the first line."""
        self.write("header", self.started_s, started_unix_s=time.time(), **row)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._file is None or not self._lines:
            return
        try:
            self._file.write(b"\n".join(self._lines) + b"\n")
            self._file.flush()
        except OSError as error:
            log.error("the journal %s ends here: %s", self._path, error.strerror)
            self._end()
        self._lines.clear()

    def close(self) -> None:
        """Flush and close; later writes are dropped. Never raises."""
        self.flush()
        self._end()

    def _end(self) -> None:
        file, self._file = self._file, None
        self.enabled = False
        if file is not None:
            try:
                file.close()
            except OSError:
                pass  # a flush has told of it
