"""Results that outlive a killed run: one JSON line each, by the digest of all that went into it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tidegate.core.errors import ConfigError


class Store:
    """A file of finished results. One process writes it, a line at a time, so a kill loses at most a line."""

    def __init__(self, path: Path | None) -> None:
        """Read what ``path`` holds; None keeps results in memory. Raises ConfigError for an unusable file."""
        self._results: dict[str, Any] = {}
        self._file: int | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                os.write(self._file, b"\n")  # half a line of a killed writer
        except OSError as error:
            raise ConfigError(f"cannot keep results in {path}: {error.strerror or error}") from None

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                self._results[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> Any | None:
        """Return a result, or None when it is not there."""
        return self._results.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a result; it is in the file when this returns."""
        self._results[key] = value
        if self._file is not None:
            os.write(self._file, json.dumps({"key": key, "value": value}, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
