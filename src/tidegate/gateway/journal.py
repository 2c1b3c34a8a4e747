"""The file of a gateway's journal: buffered, and never in the way of a request."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

from tidegate.core.errors import ConfigError
from tidegate.journal.writer import JournalWriter

log = logging.getLogger(__name__)

FLUSH_S = 0.25
"""How much of the journal a killed gateway may lose."""


class JournalFile(JournalWriter):
    """Writes lines to a file, at most FLUSH_S after they were made.

    Without a path it is disabled. Lines written before ``open`` wait for it. When the file cannot be written
    any more, that is logged once and the journal ends there.
    """

    def __init__(self, path: Path | None, now_s: float) -> None:
        super().__init__(None if path is None else self._take, now_s)
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

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._file is None or not self._lines:
            return
        try:
            self._file.write(b"".join(self._lines))
            self._file.flush()
        except OSError as error:
            log.error("the journal %s ends here: %s", self._path, error.strerror)
            self._end()
        self._lines.clear()

    def close(self) -> None:
        """Flush and close; later writes are dropped. Never raises."""
        self.flush()
        self._end()

    def _take(self, line: bytes) -> None:
        self._lines.append(line)
        if self._timer is None and self._file is not None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def _end(self) -> None:
        file, self._file = self._file, None
        self.enabled = False
        if file is not None:
            with suppress(OSError):  # which a flush has logged
                file.close()
