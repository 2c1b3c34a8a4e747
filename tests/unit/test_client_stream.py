"""The client's end of a streamed answer, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import ClientSession, web

from tidegate.protocol.client_stream import ClientStream


@asynccontextmanager
async def served(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """Serve GET / with ``handler``; yield the URL."""
    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/"
    finally:
        await runner.cleanup()


async def test_a_held_event_goes_out_alone_when_nothing_follows_it() -> None:
    ends = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        client = ClientStream(request, {})

        async def work() -> bytes:
            client.hold(b"data: last\n\n")
            await ends.wait()
            return b"data: [DONE]\n\n"

        return await client.carry(work())

    async with served(handler) as url, ClientSession() as session, session.get(url) as answer:
        assert await answer.content.readuntil(b"\n\n") == b"data: last\n\n"
        ends.set()
        assert await answer.content.read() == b"data: [DONE]\n\n"


async def test_events_keep_their_order_around_a_held_one() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        client = ClientStream(request, {})

        async def work() -> bytes:
            client.send(b"data: 1\n\n")
            client.hold(b"data: 2\n\n")
            client.send(b"data: 3\n\n")
            client.hold(b"data: 4\n\n")
            return b"data: 5\n\n"

        return await client.carry(work())

    async with served(handler) as url, ClientSession() as session, session.get(url) as answer:
        assert await answer.content.read() == b"".join(b"data: %d\n\n" % i for i in range(1, 6))
