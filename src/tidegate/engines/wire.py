"""The HTTP/1.1 client of the relay path: pooled connections, bytes handed on as they arrive.

A response's bytes reach their consumer in the callback that read them, without a task switch per chunk.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from tidegate.core.errors import ConfigError, EngineTimeout, EngineUnreachable, NoDescriptors
from tidegate.engines.loop_time import LoopTime
from tidegate.protocol.descriptors import is_our_lack
from tidegate.protocol.shared_timer import SharedTimer

BodySink = Callable[[bytes], bool | None]
"""Called on the event loop with the body bytes of one socket read (of a 200 answer). Returns True to end the
exchange."""

WATCH_S = 0.5
"""How often silent streams are looked for; a stall is noticed at most this much late."""


class HttpAnswer(msgspec.Struct, frozen=True):
    """A complete response. ``body`` is empty when a sink took it."""

    status: int
    body: bytes


class _Deadline(NamedTuple):
    """When an exchange has to be over, on ``time.monotonic``; ``after_s`` since it began."""

    at_s: float
    after_s: float
    method: str
    path: str

    def error(self) -> EngineTimeout:
        """What an exchange fails with that is not over by then."""
        return EngineTimeout(f"{self.method} {self.path}: no complete answer within {self.after_s:g} s")


class _RelayConnection(asyncio.Protocol):
    """One keep-alive connection, carrying one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stall_s: float) -> None:
        self._loop = loop
        self._stall_s = stall_s
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.running = LoopTime.here()
        self.heard_s = self.running.ran_s
        self.answered = False
        self._parts: list[bytes] = []
        self.on_body = self._parts.append
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[HttpAnswer] | None = None
        self._deadline: _Deadline | None = None
        self._sink: BodySink | None = None
        self._status = 0
        self._complete = self._keep = False

    def begin(
        self, head_and_body: bytes, sink: BodySink | None, deadline: _Deadline
    ) -> asyncio.Future[HttpAnswer]:
        """Send a request; the future ends with the whole answer or an EngineError."""
        assert self.transport is not None and self._done is None
        self._done = self._loop.create_future()
        self._sink, self._deadline = sink, deadline
        self._parts.clear()
        self._status = 0
        self.answered = self._complete = False
        self.heard_s = self.running.ran_s
        self.transport.write(head_and_body)
        return self._done

    @property
    def reusable(self) -> bool:
        """Whether the exchange ended cleanly and the server keeps the connection."""
        return not self.closed and self._done is None

    def close(self) -> None:
        """Drop the connection at once; an exchange in progress is abandoned (the engine aborts it)."""
        self.closed = True
        self._sink = None
        if self.transport is not None:
            self.transport.abort()

    def fail(self, error: Exception) -> None:
        """End the exchange with ``error`` and drop the connection."""
        done, self._done = self._done, None
        if done is not None and not done.done():
            done.set_exception(error)
        self.close()

    def due(self, now_s: float) -> float | None:
        """See ``Due.due``: fail an exchange that takes too long, or is silent in the middle of its answer."""
        assert self._deadline is not None
        if now_s >= self._deadline.at_s:
            self.fail(self._deadline.error())
        elif self.answered and self.heard_s < self.running.ran_s - self._stall_s:
            self.fail(EngineTimeout(f"the engine was silent for {self._stall_s:g} s"))
        else:
            return min(now_s + WATCH_S, self._deadline.at_s)
        return None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.fail(EngineUnreachable(f"the connection broke: {exc or 'closed by the engine'}"))
        # The parser holds this connection's callbacks: a cycle, and the gateway collects cycles rarely.
        del self._parser

    def data_received(self, data: bytes) -> None:
        self.heard_s = self.running.ran_s
        self.answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(EngineUnreachable(f"the engine's answer is not HTTP: {error}"))
            return
        if self._sink is not None and self._parts and self._status == 200:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            try:
                ended = self._sink(body)
            except Exception as error:
                self.fail(error)
                return
            if ended and not self._complete:
                self._keep = False
                self._finish()
                return
        if self._complete:
            self._finish()

    # httptools callbacks

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep = self._parser.should_keep_alive()

    def _finish(self) -> None:
        done, self._done = self._done, None
        self._sink = None
        if not self._keep:
            self.close()
        if done is not None and not done.done():
            done.set_result(HttpAnswer(self._status, b"".join(self._parts)))


class Wire:
    """The connections to one engine: one per exchange in progress, without a ceiling.

    A silence of ``stall_s``, in which this process ran, fails an exchange once its answer has begun. Before
    that an engine may be queueing it: only the exchange's deadline counts.
    """

    def __init__(self, url: str, *, connect_s: float, stall_s: float, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"{url!r} is not an http:// URL")
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._connect_s, self._stall_s = connect_s, stall_s
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._head = f" HTTP/1.1\r\nHost: {parts.netloc}\r\n{extra}".encode("latin-1")
        self._idle: deque[_RelayConnection] = deque()
        self._busy: SharedTimer[_RelayConnection] = SharedTimer()
        self._dropped: str | None = None

    async def exchange(
        self, method: str, path: str, body: bytes = b"", *, sink: BodySink | None = None, deadline_s: float
    ) -> HttpAnswer:
        """Send one request and wait for the end of its answer.

        With a ``sink``, the body of a 200 answer goes there piece by piece. Cancelling drops the connection,
        which makes the engine abort the work, as does a sink that returns True. Raises what the sink raises,
        EngineUnreachable when the connection fails or breaks, and EngineTimeout after ``deadline_s`` or a
        silence of ``stall_s``.
        """
        request = b"".join(
            (
                f"{method} {self._prefix}{path}".encode("latin-1"),
                self._head,
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body),
                body,
            )
        )
        deadline = _Deadline(time.monotonic() + deadline_s, deadline_s, method, path)
        while self._idle:
            connection = self._idle.pop()
            if not connection.reusable:
                continue
            try:
                return await self._run(connection, request, sink, deadline)
            except EngineUnreachable:
                # A server may close an idle connection just as it is reused: nothing was answered,
                # so the request is sent again on a fresh one.
                if connection.answered or self._dropped is not None:
                    raise
        return await self._run(await self._connect(deadline), request, sink, deadline)

    def drop(self, reason: str) -> None:
        """End every exchange, now and later, with EngineUnreachable: the engine is gone for good."""
        self._dropped = reason
        for connection in self._busy.things:
            connection.fail(EngineUnreachable(reason))
        while self._idle:
            self._idle.pop().close()

    @property
    def dropped(self) -> bool:
        """Whether the engine is gone for good."""
        return self._dropped is not None

    async def _run(
        self, connection: _RelayConnection, request: bytes, sink: BodySink | None, deadline: _Deadline
    ) -> HttpAnswer:
        self._busy.add(connection, min(time.monotonic() + WATCH_S, deadline.at_s))
        try:
            answer = await connection.begin(request, sink, deadline)
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        if connection.reusable and self._dropped is None:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _connect(self, deadline: _Deadline) -> _RelayConnection:
        if self._dropped is not None:
            raise EngineUnreachable(self._dropped, refused=True)
        loop, running = asyncio.get_running_loop(), LoopTime.here()
        began = running.mark()
        try:
            async with asyncio.timeout(min(self._connect_s, deadline.at_s - time.monotonic())):
                _, connection = await loop.create_connection(
                    lambda: _RelayConnection(loop, self._stall_s), self._host, self._port
                )
        except TimeoutError:
            if time.monotonic() >= deadline.at_s:
                raise deadline.error() from None
            if running.lost_s(began):
                return await self._connect(deadline)
            raise EngineUnreachable(
                f"no connection to {self._host}:{self._port} in {self._connect_s:g} s"
            ) from None
        except OSError as error:
            if is_our_lack(error):
                raise NoDescriptors(
                    f"no connection can be opened: {error.strerror}", retry_after_s=1.0
                ) from None
            raise EngineUnreachable(
                f"no connection to {self._host}:{self._port}: {error}", refused=True
            ) from None
        return connection
