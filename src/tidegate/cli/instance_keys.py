"""Keys of the instances that running gateways of this user started, for verbs that ask instances directly.

Each gateway draws keys of its own for what it starts. A file that only the user can read has them while it
runs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tidegate.fleet.member import Member

log = logging.getLogger(__name__)


class InstanceKey(NamedTuple):
    """What an instance wants of callers: a bearer token, and the launch's secret."""

    api_key: str
    secret: str


def state_folder() -> Path:
    """Return where tidegate keeps what outlives a command, whether it exists or not."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tidegate"


class KeyFile:
    """The keys of this process's instances, kept until ``remove``. Does without where it cannot write."""

    def __init__(self) -> None:
        self._path = state_folder() / "instances" / f"{os.getpid()}.json"
        self._keys: dict[str, InstanceKey] = {}

    def add(self, member: Member) -> None:
        """Keep an instance's key, if the launch drew it."""
        if not member.secret:
            return
        self._keys[member.url] = InstanceKey(member.api_key, member.secret)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._keys, file)
        except OSError as error:
            log.debug("no file for the instances' keys: %s", error)

    def remove(self) -> None:
        """Forget all keys."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def shared_key(urls: Sequence[str]) -> InstanceKey | None:
    """Return the key of instances that one running gateway of this user started; None for any others."""
    keys = {_key_of(url) for url in urls}
    return keys.pop() if len(keys) == 1 else None


def _key_of(url: str) -> InstanceKey | None:
    for path in (state_folder() / "instances").glob("*.json"):
        try:
            os.kill(int(path.stem), 0)
            found = json.loads(path.read_text()).get(url.rstrip("/").removesuffix("/v1").rstrip("/"))
        except (ProcessLookupError, ValueError):
            with suppress(OSError):
                path.unlink()  # Its gateway was killed.
            continue
        except OSError:
            continue
        if found:
            return InstanceKey(*found)
    return None
