"""The fleet's end of a process that forks engines, which has done what takes longest at their start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from io import FileIO
from itertools import count
from pathlib import Path

from tidegate.core.errors import SetupError
from tidegate.fleet.child import Child

COMMAND = (sys.executable, "-m", "tidegate.engines.embedded.zygote")
MESSAGE_BYTES = 4096
UNKNOWN_STATUS = 255
"""Of an engine that ended after its zygote had."""
SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class ZygoteGone(SetupError):
    """The zygote ended before it could fork."""


class ForkedProcess:
    """An engine that a zygote forked, as ``Child`` wants a process."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.stdin: FileIO | None = None
        self.stdout, self.stderr = asyncio.StreamReader(), asyncio.StreamReader()
        self._pidfd = pidfd
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def attach(self, stdin: int, stdout: int, stderr: int) -> None:
        """Take the other ends of its pipes."""
        self.stdin = FileIO(stdin, "wb")
        loop = asyncio.get_running_loop()
        for reader, descriptor in ((self.stdout, stdout), (self.stderr, stderr)):
            protocol = asyncio.StreamReaderProtocol(reader)
            await loop.connect_read_pipe(partial(_same, protocol), FileIO(descriptor))

    async def wait(self) -> int:
        """Return the exit status once the process has ended; negative for a signal's number."""
        return await asyncio.shield(self._status)

    def send_signal(self, number: int) -> None:
        """Send a signal; without effect once the process has ended."""
        if not self._status.done():
            signal.pidfd_send_signal(self._pidfd, number)

    def ended(self, status: int) -> None:
        """Take note of the end."""
        if not self._status.done():
            self._status.set_result(status)
            os.close(self._pidfd)

    def orphaned(self) -> None:
        """Watch for the end without the zygote, which would have told."""
        if self._status.done():
            return
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            loop.remove_reader(self._pidfd)
            self.ended(UNKNOWN_STATUS)

        loop.add_reader(self._pidfd, on_end)


class Zygote:
    """Starts the process that forks with the first engine, and again when it has ended.

    Its death leaves the engines that it forked running. ``model`` is what they load, ``env`` what they have
    in common.
    """

    def __init__(self, model: Path, env: Mapping[str, str]) -> None:
        self._model = model
        self._env = {**env, **SINGLE_THREADED}
        self._starting = asyncio.Lock()
        self._child: Child[None] | None = None
        self._channel: socket.socket | None = None
        self._numbers = count()
        self._forked: dict[int, asyncio.Future[ForkedProcess]] = {}
        self._running: dict[int, ForkedProcess] = {}

    @property
    def pid(self) -> int | None:
        """The process's id; None before the first engine."""
        return self._child.pid if self._child else None

    async def fork(self, argv: Sequence[str], env: Mapping[str, str]) -> ForkedProcess:
        """Start an engine with these flags and further variables. Raises ZygoteGone when it cannot."""
        async with self._starting:
            channel = self._channel or await self._start()
        number = next(self._numbers)
        pipes = [os.pipe() for _ in range(3)]
        ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        self._forked[number] = asyncio.get_running_loop().create_future()
        order = json.dumps({"number": number, "argv": list(argv), "env": dict(env)}).encode()
        try:
            try:
                socket.send_fds(channel, [order], theirs)
            except OSError as error:
                raise ZygoteGone(f"the process that forks engines takes no order: {error}") from None
            process = await self._forked[number]
        except BaseException:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            del self._forked[number]
            for descriptor in theirs:
                os.close(descriptor)
        await process.attach(*ours)
        return process

    async def stop(self) -> None:
        """End the process; engines go on."""
        child, self._child = self._child, None
        self._close_channel()
        if child is not None:
            await child.stop(1.0)

    async def _start(self) -> socket.socket:
        await self.stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [*COMMAND, str(theirs.fileno()), str(self._model)]
            self._child = await Child.spawn(
                "zygote", argv, self._env, lambda line: None, keeper=False, pass_fds=(theirs.fileno(),)
            )
        ours.setblocking(False)
        self._channel = ours
        asyncio.get_running_loop().add_reader(ours, self._on_message, ours)
        return ours

    def _on_message(self, channel: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._close_channel()
            return
        message = json.loads(data)
        if "status" in message:
            process = self._running.pop(message["pid"], None)
            if process is not None:
                process.ended(message["status"])
            return
        process = self._running[message["pid"]] = ForkedProcess(message["pid"], descriptors[0])
        waiting = self._forked.get(message["number"])
        # Where nobody waits any more, its pipes are closed and it ends by itself.
        if waiting is not None and not waiting.done():
            waiting.set_result(process)

    def _close_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        asyncio.get_running_loop().remove_reader(channel)
        channel.close()
        for waiting in self._forked.values():
            if not waiting.done():
                waiting.set_exception(ZygoteGone("the process that forks engines has ended"))
        running, self._running = self._running, {}
        for process in running.values():
            with suppress(OSError):
                process.orphaned()


def _same(protocol: asyncio.StreamReaderProtocol) -> asyncio.StreamReaderProtocol:
    return protocol
