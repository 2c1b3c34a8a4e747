"""A proxy on an engine's KV channel that tells of every frame before it passes it on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import orjson

LENGTH_BYTES = 4

OnFrame = Callable[[str, dict[str, Any]], None]
"""Gets ``question`` (from the destination) or ``answer`` (of the source), and the frame."""


class KvProxy:
    """Passes frames between destinations and one source's KV port. Only for engines that share memory."""

    def __init__(self, port: int, on_frame: OnFrame) -> None:
        self._to = port
        self._on_frame = on_frame
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> KvProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, down = await asyncio.open_connection("127.0.0.1", self._to)
        await asyncio.gather(self._pass(reader, down, "question"), self._pass(upstream, writer, "answer"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readexactly(LENGTH_BYTES)
                body = await reader.readexactly(int.from_bytes(head, "big"))
                self._on_frame(kind, orjson.loads(body))
                writer.write(head + body)
        writer.close()
