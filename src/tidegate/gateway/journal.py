"""The file of a gateway's journal: buffered, and never in the way of a request."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from contextlib import suppress
from io import BufferedRandom, BufferedWriter
from pathlib import Path
from typing import Any

import orjson

from tidegate.core.errors import ConfigError
from tidegate.journal.writer import JournalWriter

log = logging.getLogger(__name__)

FLUSH_S = 0.25
"""How much of the journal a killed gateway may lose."""
HEADER_START = b'{"type":"header",'
"""What a journal begins with."""
TAIL_BYTES = 1 << 20
"""Where the last whole line of a journal is looked for."""


class JournalFile(JournalWriter):
    """Writes lines to a file, at most FLUSH_S after they were made.

    Without a path it is disabled. Lines written before ``open`` wait for it. When the file cannot be written
    any more, that is logged once and the journal ends there.
    """

    def __init__(self, path: Path | None, now_s: float) -> None:
        super().__init__(None if path is None else self._take, now_s)
        self._path = path
        self._lines: list[bytes] = []
        self._file: BufferedWriter | BufferedRandom | None = None
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Open the file, and write what waits.

        A journal that is there is continued: its ``t`` goes on, by the wall clock, and half a last line, as a
        killed gateway leaves it, is cut off.

        Raises ConfigError when the file cannot be written, holds anything but a journal, or is the journal of
        a gateway that runs.
        """
        path = self._path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # a device or a pipe
                self._file = path.open("wb")
            else:
                path.touch()
                file = path.open("r+b")
                self._file = file
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.started_s -= self._continued(file, path)
        except BlockingIOError:
            self._end()
            raise ConfigError(f"another gateway writes the journal {path}; name another file") from None
        except OSError as error:
            raise ConfigError(f"cannot write the journal {path}: {error.strerror}") from None
        self.flush()

    def _continued(self, file: BufferedRandom, path: Path) -> float:
        """Go to the end of the file's last whole line; return how long ago its journal began, 0 for an empty
        file. Raises ConfigError for one that holds anything else."""
        first = file.readline()
        if first == HEADER_START[: len(first)] or (first.startswith(HEADER_START) and first[-1:] != b"\n"):
            file.seek(0)
            file.truncate()  # not even its header was written
            return 0.0
        header = _parsed(first)
        if not first.startswith(HEADER_START):
            self._end()
            raise ConfigError(f"{path} exists and is no journal; name another file, or delete it")
        size = file.seek(0, 2)
        begin = max(0, size - TAIL_BYTES)
        file.seek(begin)
        whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        file.seek(begin + len(whole))
        file.truncate()
        last_s = _parsed(whole.rstrip(b"\n").rpartition(b"\n")[2]).get("t", 0.0)
        began_unix_s = header.get("started_unix_s") or time.time()
        return float(max(time.time() - began_unix_s, last_s))

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


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
