"""The client's end of a streamed answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from contextlib import nullcontext, suppress

from aiohttp import HttpVersion11, web
from aiohttp.http import StreamWriter

from tidegate.core.errors import ClientGone, InternalError, TidegateError
from tidegate.protocol.chunks import error_body, event, http_chunk
from tidegate.protocol.shared_timer import SharedTimer

log = logging.getLogger(__name__)

UNREAD_BYTES = 4 * 2**20
"""A client that leaves this much unread is dropped: its backlog would grow without bound (ours)."""
LEAVE_S = 30.0
"""How long a client may take to read what is left of a finished answer (ours)."""
COMMENT_S = 5.0
"""How long an open stream is silent before a comment keeps it alive (ours): proxies cut after some ten."""
COMMENT = b": no token yet\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class _EventStream(web.StreamResponse):
    """A streamed answer whose head leaves in one write with the first events, not in a write of its own."""

    _send_headers_immediately = False


class ClientStream:
    """Sends events to the client from inside the callback that brings them, without a task switch per chunk.

    The answer's head is sent with the first event, so that a failure before it still has its own HTTP status,
    or after ``head_after_s`` if that is sooner. From then on comments fill silences. Without ``silences``,
    the timer that finds them, neither is done. Events go straight to the connection's transport, each as one
    HTTP chunk (to an HTTP/1.0 client as they are, until the connection closes).
    """

    def __init__(
        self,
        request: web.Request,
        headers: Mapping[str, str],
        silences: SharedTimer[ClientStream] | None = None,
        head_after_s: float = COMMENT_S,
    ) -> None:
        self._spoke = False
        self._held = b""
        self._silences = silences
        if silences is not None:
            silences.add(self, time.monotonic() + head_after_s)
        self._request = request
        self._response = _EventStream(headers={**HEADERS, **headers})
        self._chunked = request.version >= HttpVersion11
        self._transport: asyncio.WriteTransport | None = None

    def send(self, data: bytes) -> None:
        """Send events. Raises ClientGone when the client has left or reads too slowly."""
        self._spoke = True
        if self._held:
            data, self._held = self._held + data, b""
        transport = self._transport
        if transport is None:
            self._open(data)
            return
        transport.write(http_chunk(data) if self._chunked else data)
        if transport.is_closing():
            raise ClientGone("the client closed the connection")
        if transport.get_write_buffer_size() > UNREAD_BYTES:
            transport.abort()
            raise ClientGone(f"the client left {UNREAD_BYTES} bytes unread")

    def hold(self, data: bytes) -> None:
        """Send events in one write with what follows them at once, as the end does, or else two turns of the
        event loop later. A write costs more than all else that is done for an event."""
        self._held += data
        loop = asyncio.get_running_loop()
        # The end of the read that brought them wakes the request in the next turn.
        loop.call_soon(loop.call_soon, self._send_held)

    def _send_held(self) -> None:
        if self._held:
            with suppress(ClientGone):  # The end finds out, too.
                self.send(b"")

    async def carry(self, work: Awaitable[bytes]) -> web.StreamResponse:
        """Await ``work``, which sends events and returns the closing ones, and end the answer with them. What
        it raises before the first event is raised here, and so is ClientGone. A later error ends the answer
        with an error event and without ``[DONE]``: it is visibly incomplete."""
        try:
            end = await self._watched(work)
        except Exception as failure:
            if self._transport is None or isinstance(failure, ClientGone):
                raise
            error = failure
            if not isinstance(error, TidegateError):
                log.exception("a stream failed inside the server")
                error = InternalError("internal error")
            end = event(error_body(error))
        return await self._finish(end)

    async def _watched(self, work: Awaitable[bytes]) -> bytes:
        try:
            return await work
        finally:
            if self._silences is not None:
                self._silences.discard(self)

    def due(self, now_s: float) -> float | None:
        """See ``Due.due``: send a comment unless there were events since the last look."""
        try:
            if not self._spoke:
                self.send(COMMENT)
        except ClientGone:
            return None  # The next event finds out, too.
        self._spoke = False
        return now_s + COMMENT_S

    async def _finish(self, data: bytes) -> web.StreamResponse:
        """Send the last events and end the answer. Raises ClientGone when they are not taken."""
        data, self._held = self._held + data, b""
        if self._transport is None:
            self._open(b"")
        try:
            async with nullcontext() if self._read_so_far() else asyncio.timeout(LEAVE_S):
                await self._response.write_eof(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGone(f"the client did not take the end of its answer within {LEAVE_S:g} s") from None
        except ConnectionError:
            raise ClientGone("the client closed the connection") from None
        return self._response

    def _read_so_far(self) -> bool:
        """Whether nothing is left unread, so that the end is written without waiting. Timers cost too much to
        have one with every answer."""
        return self._transport is not None and not self._transport.get_write_buffer_size()

    def _open(self, data: bytes) -> None:
        """Send the head with the first events, here: a task would wait for all that is due before it."""
        opening = self._send_head(data)
        try:
            opening.send(None)
        except StopIteration:
            self._transport = self._request.transport
        except ConnectionError:
            raise ClientGone("the client closed the connection") from None
        else:
            opening.close()
            raise InternalError("the head of an answer could not be sent at once")

    async def _send_head(self, data: bytes) -> None:
        """Write to the transport; aiohttp's coroutines for that wait for nothing."""
        if self._chunked:
            self._response.enable_chunked_encoding()
        writer = await self._response.prepare(self._request)
        assert isinstance(writer, StreamWriter)
        if data:
            await writer.write(data, drain=False)
