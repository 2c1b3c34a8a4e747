"""The client's end of a streamed answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping

from aiohttp import HttpVersion11, web

from tidegate.core.errors import ClientGone, InternalError, TidegateError
from tidegate.protocol.chunks import error_body, event, http_chunk

log = logging.getLogger(__name__)

UNREAD_BYTES = 4 * 2**20
"""A client that leaves this much unread is dropped: its backlog would grow without bound (ours)."""
LEAVE_S = 30.0
"""How long a client may take to read what is left of a finished answer (ours)."""
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class ClientStream:
    """Sends events to the client from inside the callback that brings them, without a task switch per chunk.

    The answer's head is sent with the first event, so that a failure before it still has its own HTTP status.
    Then events go straight to the connection's transport, each as one HTTP chunk (to an HTTP/1.0 client as
    they are, until the connection closes).
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self._request = request
        self.response = web.StreamResponse(headers={**HEADERS, **headers})
        self._chunked = request.version >= HttpVersion11
        self._transport: asyncio.WriteTransport | None = None
        self._pending: list[bytes] = []
        self._opening: asyncio.Task[None] | None = None

    def send(self, data: bytes) -> None:
        """Send events. Raises ClientGone when the client has left or reads too slowly."""
        transport = self._transport
        if transport is None:
            self._pending.append(data)
            if self._opening is None:
                self._opening = asyncio.create_task(self._open())
                # Its failure may go unseen: a handler that is cancelled has nobody to tell.
                self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
            return
        transport.write(http_chunk(data) if self._chunked else data)
        if transport.is_closing():
            raise ClientGone("the client closed the connection")
        if transport.get_write_buffer_size() > UNREAD_BYTES:
            transport.abort()
            raise ClientGone(f"the client left {UNREAD_BYTES} bytes unread")

    async def carry(self, work: Awaitable[bytes]) -> web.StreamResponse:
        """Await ``work``, which sends events and returns the closing ones, and end the answer with them. What
        it raises before the first event is raised here, and so is ClientGone. A later error ends the answer
        with an error event and without ``[DONE]``: it is visibly incomplete."""
        try:
            end = await work
        except Exception as failure:
            if self._opening is None or isinstance(failure, ClientGone):
                raise
            error = failure
            if not isinstance(error, TidegateError):
                log.exception("a stream failed inside the server")
                error = InternalError("internal error")
            end = event(error_body(error))
        except BaseException:
            if self._opening is not None:
                self._opening.cancel()
            raise
        return await self._finish(end)

    async def _finish(self, data: bytes) -> web.StreamResponse:
        """Send the last events and end the answer. Raises ClientGone when they are not taken."""
        self.send(data)
        assert self._opening is not None
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._opening
                await self.response.write_eof()
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGone(f"the client did not take the end of its answer within {LEAVE_S:g} s") from None
        return self.response

    async def _open(self) -> None:
        """Send the head with all that came before it was out."""
        if self._chunked:
            self.response.enable_chunked_encoding()
        await self.response.prepare(self._request)
        data = b"".join(self._pending)
        self._pending.clear()
        await self.response.write(data)
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client closed the connection")
        # What arrived while the head was being sent goes out before the direct path opens.
        self._transport = transport
        if self._pending:
            self.send(b"".join(self._pending))
            self._pending.clear()
