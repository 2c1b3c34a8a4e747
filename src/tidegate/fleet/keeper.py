"""Runs a vLLM server like an engine of ours: announced, and gone with its parent.

    python -m tidegate.fleet.keeper HEALTH_URL LOG_FILE PROGRAM ARGUMENTS...

The output of PROGRAM goes to LOG_FILE. While it starts, its last line is shown from time to time; once
HEALTH_URL answers 200, a line of JSON announces it. SIGTERM is passed on, and what still runs ``GRACE_S``
later is killed; the end of stdin kills at once. The keeper ends with PROGRAM's status, after every process
that PROGRAM started and that holds a port or a GPU. Linux and the standard library only.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

POLL_S = 0.25
ANSWER_S = 2.0
PROGRESS_S = 15.0
GRACE_S = 12.0
SHOWN_LINES = 8
TAIL_BYTES = 256 * 1024
SCRATCH = "VLLM_RPC_BASE_PATH"
"""Names a folder for vLLM's sockets, which the keeper removes."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_CAUSE = re.compile(r"(^|\s)[\w.]*(Error|Exception): ")
_libc = ctypes.CDLL(None, use_errno=True)


class Keeper:
    """One run of a program."""

    def __init__(self, command: Sequence[str], health_url: str, log: Path) -> None:
        # Orphans of the program become children of this process, where they can be found.
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._log = log
        self._log_began_at = log.stat().st_size if log.exists() else 0
        self._health = urlsplit(health_url)
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=_end_with_keeper
            )
        self._exit = os.pidfd_open(self._process.pid)

    def run(self) -> int:
        """Return how the program ended, as subprocess gives it; nothing that it started runs any more."""
        end = self._until_ready()
        if end is None:
            _print(json.dumps({"event": "ready", "pid": self._process.pid}), sys.stdout)
            end = self._wait(None)
        if end == self._woken:
            self._process.terminate()
            os.read(self._woken, 512)
            self._wait(GRACE_S)
        if end != self._exit:
            self._process.kill()
        status = self._process.wait()
        # Read before the rest is killed: what those write would stand in front of the reason.
        reason = end_of(self._log, self._log_began_at)
        kill_descendants()
        if end == self._exit:
            for line in [*reason, f"(all of it: {self._log})"]:
                _print(line, sys.stderr)
        return status

    def _until_ready(self) -> int | None:
        """Print how the start goes; None once the server is healthy, or what came before that."""
        began_s = shown_s = time.monotonic()
        while not self._is_healthy():
            if (end := self._wait(POLL_S)) is not None:
                return end
            now_s = time.monotonic()
            if now_s - shown_s >= PROGRESS_S:
                shown_s = now_s
                last = (end_of(self._log, self._log_began_at) or ["no output yet"])[-1]
                _print(f"starting for {now_s - began_s:.0f} s: {last}", sys.stdout)
        return None

    def _wait(self, timeout_s: float | None) -> int | None:
        """Return what happened first: the exit, a signal, the end of stdin; None when nothing did in time."""
        watched = (self._exit, self._woken, sys.stdin.fileno())
        happened = select.select(watched, (), (), timeout_s)[0]
        return next((one for one in watched if one in happened), None)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(self._health.netloc, timeout=ANSWER_S)
        try:
            connection.request("GET", self._health.path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _print(line: str, stream: TextIO) -> None:
    with suppress(OSError):  # nobody reads an orphan's output
        stream.write(f"{line}\n")
        stream.flush()


def _end_with_keeper() -> None:
    """Have the kernel ask the program to end should the keeper be killed itself."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def kill_descendants() -> None:
    """Kill what this process and its children have started, and wait until it is gone. Python's resource
    trackers stay: they free the shared memory of those that were killed, and then end by themselves."""
    while processes := [pid for pid in descendants(os.getpid()) if not _is_tracker(pid)]:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def descendants(ancestor: int) -> list[int]:
    """Return the processes below ``ancestor``, zombies among them, as /proc shows them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    rest = [ancestor]
    while rest:
        below = children.get(rest.pop(), [])
        found += below
        rest += below
    return found


def _is_tracker(pid: int) -> bool:
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def end_of(log: Path, began_at: int) -> list[str]:
    """Return the lines that tell why a server ended: the first error among what it wrote from the byte
    ``began_at`` on, and the last lines."""
    with log.open("rb") as text:
        text.seek(max(began_at, log.stat().st_size - TAIL_BYTES))
        written = text.read().decode("utf-8", "replace")
    lines = [line.rstrip() for line in written.splitlines() if line.strip()]
    last = lines[-SHOWN_LINES:]
    cause = next((line for line in lines if _CAUSE.search(line)), None)
    return last if cause is None or cause in last else [cause, *last[1:]]


def main() -> None:
    """Keep the program on the command line, and end as it does."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    health_url, log, *program = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="tidegate-") as scratch:
        os.environ[SCRATCH] = scratch
        try:
            status = Keeper(program, health_url, Path(log)).run()
        except OSError as error:
            sys.exit(f"cannot execute {program[0]}: {error.strerror}")
    if status < 0:
        if -status in (signal.SIGTERM, signal.SIGINT):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
