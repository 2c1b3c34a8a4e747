"""One engine process: started, listened to, stopped and always reaped."""

from __future__ import annotations

import asyncio
import logging
import signal
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from tidegate.core.errors import ConfigError, SetupError
from tidegate.engines.seam import STAGE_MARK

log = logging.getLogger(__name__)

Announced = TypeVar("Announced")
Parse = Callable[[str], Announced | None]
"""Reads one line of output: the announcement, or None. Raises ConfigError for a malformed one."""

TAIL_LINES = 10
READ_BYTES = 8192
LINE_BYTES = 512 * 1024
"""A longer line of output is logged in pieces, so that a child cannot grow the parent's memory."""
DRAIN_S = 1.0
"""How long output is still read after the exit; a grandchild may hold the pipe open for ever."""


class EngineStartFailed(SetupError):
    """An engine process did not become ready; the message ends with its last lines of stderr."""


class Closable(Protocol):
    """The parent's end of a pipe."""

    def close(self) -> None: ...


class RunningProcess(Protocol):
    """What a child needs of its process."""

    @property
    def pid(self) -> int: ...

    @property
    def stdin(self) -> Closable | None: ...

    @property
    def stdout(self) -> asyncio.StreamReader | None: ...

    @property
    def stderr(self) -> asyncio.StreamReader | None: ...

    async def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


class Child(Generic[Announced]):
    """An engine process whose output goes to the log under ``name``, but for what ``parse`` recognises.

    The child's stdin is a pipe that only this object holds: an engine started with
    ``--exit-with-parent`` ends when the pipe closes, however the parent dies. A ``keeper`` has processes
    of its own, which it kills when the pipe closes; killed itself, it would leave them behind.
    """

    def __init__(self, name: str, process: RunningProcess, parse: Parse[Announced], *, keeper: bool) -> None:
        self.name = name
        self.pid = process.pid
        self.stage = ""
        """What it says it is doing until it is ready."""
        self._keeper = keeper
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = process
        self._parse = parse
        self._heard_s = asyncio.get_running_loop().time()
        self._ready: asyncio.Future[Announced] = asyncio.get_running_loop().create_future()
        self.exited = asyncio.create_task(process.wait(), name=f"{name}: exit")
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._stdin = process.stdin
        self._pumps = [
            asyncio.create_task(_pump(process.stdout, self._on_stdout), name=f"{name}: stdout"),
            asyncio.create_task(_pump(process.stderr, self._on_stderr), name=f"{name}: stderr"),
        ]

    @classmethod
    async def spawn(
        cls,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        parse: Parse[Announced],
        *,
        keeper: bool,
        pass_fds: Sequence[int] = (),
    ) -> Child[Announced]:
        """Start ``argv`` in a session of its own, so that the terminal's Ctrl-C reaches only the parent.
        Raises EngineStartFailed when the program cannot be executed."""
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=dict(env),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            raise EngineStartFailed(f"cannot execute {argv[0]}: {error.strerror}") from None
        return cls(name, process, parse, keeper=keeper)

    async def ready(self, deadline_s: float) -> Announced:
        """Wait for the announcement. Raises EngineStartFailed on exit, nonsense, or when ``deadline_s`` pass
        without another stage of the start."""
        either: set[asyncio.Future[Any]] = {self._ready, self.exited}
        clock = asyncio.get_running_loop().time
        while (left_s := self._heard_s + deadline_s - clock()) > 0 and not any(f.done() for f in either):
            await asyncio.wait(either, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if self._ready.done():
            try:
                return self._ready.result()
            except ConfigError as error:
                reason = error.message
        elif self.exited.done():
            await asyncio.wait(self._pumps, timeout=DRAIN_S)
            reason = self.exit_reason()
        else:
            reason = f"was not ready within {deadline_s:g} s"
        raise EngineStartFailed("\n".join([reason, *(f"    {line}" for line in self._tail)]))

    def exit_reason(self) -> str:
        """Say how the process ended. Only after ``exited``."""
        status = self.exited.result()
        if status >= 0:
            return f"exited with status {status}"
        names = {each.value: each.name for each in signal.Signals}
        return f"was killed by {names.get(-status, f'signal {-status}')}"

    def kill(self) -> None:
        """Kill the process if it still runs; a keeper kills what it keeps once its stdin is closed."""
        if self._keeper:
            self._stdin.close()
        else:
            self._send(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, after ``grace_s`` or a cancellation SIGKILL; returns once it is reaped. Idempotent."""
        try:
            self._send(signal.SIGTERM)
            await asyncio.wait({self.exited}, timeout=grace_s)
        finally:
            self.kill()
            await asyncio.wait({self.exited})
            await asyncio.wait(self._pumps, timeout=DRAIN_S)
            for pump in self._pumps:
                pump.cancel()
            self._stdin.close()
            if not self._ready.cancel() and not self._ready.cancelled():
                self._ready.exception()  # mark it as seen: nobody may have waited for it

    def _send(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with suppress(ProcessLookupError):  # it ended between the check and the signal
                self._process.send_signal(number)

    def _on_stdout(self, line: str) -> None:
        if not self._ready.done():
            if line.startswith(STAGE_MARK):
                self.stage = line.removeprefix(STAGE_MARK)
                self._heard_s = asyncio.get_running_loop().time()
                return
            try:
                ready = self._parse(line)
            except ConfigError as error:
                self._ready.set_exception(error)
                return
            if ready is not None:
                self._ready.set_result(ready)
                return
        log.info("%s | %s", self.name, line)

    def _on_stderr(self, line: str) -> None:
        self._tail.append(line)
        log.warning("%s | %s", self.name, line)


async def _pump(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    """Hand every non-empty line of ``stream`` to ``on_line`` until it ends."""
    rest = b""
    ended = False
    while not ended:
        chunk = await stream.read(READ_BYTES)
        ended = not chunk
        *lines, rest = (rest + chunk).split(b"\n")
        if ended or len(rest) >= LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                on_line(text)
