"""Generation requests: their choices served side by side, and their answers sent, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from tidegate.gateway.call import Call, TokenEstimate
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.gateway.served_request import ServedRequest
from tidegate.protocol.chunks import (
    AnswerHead,
    ChunkWriter,
    Json,
    Tokens,
    WholeAnswer,
    usage_object,
    whole_body,
)
from tidegate.protocol.client_stream import ClientStream
from tidegate.protocol.http_front import JSON, REQUEST_ID
from tidegate.protocol.shared_timer import SharedTimer

SERVED = web.RequestKey("served", bool)
CUT_OFF_S = 1.0
"""How long cut-off requests have to tell their clients (ours)."""


class StreamedAnswer:
    """Sends each piece of a choice to the client as it comes. Raises ClientGone."""

    __slots__ = ("_client", "writer")

    def __init__(self, writer: ChunkWriter, client: ClientStream) -> None:
        self.writer = writer
        self._client = client

    def tokens(self, tokens: Tokens) -> None:
        """Send any piece; the first one is sent with this."""
        if event := self.writer.piece(tokens):
            send = self._client.send if tokens.finish_reason is None else self._client.hold
            send(event)

    def plain(self, text: str, token_ids: list[int]) -> None:
        """Send a piece that is only text and ids."""
        self._client.send(self.writer.plain(text, token_ids))


class Answering:
    """Serves generation requests. For the control plane each choice of an answer is a request of its own."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._estimate = TokenEstimate()
        self._running: set[asyncio.Task[Any]] = set()
        self._silences: SharedTimer[ClientStream] = SharedTimer()

    async def cut_off(self) -> None:
        """End the requests that still run, each with an error that tells why."""
        self._dispatcher.stopping = True
        running = set(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=CUT_OFF_S)

    async def answer(
        self, request: web.Request, calls: Sequence[Call], model: str, arrival_s: float
    ) -> web.StreamResponse:
        """Serve the choices of one answer, and mark the HTTP request ``SERVED``."""
        request[SERVED] = True
        call = calls[0]
        head = AnswerHead(
            call.answer_id,
            call.created,
            model,
            call.chat,
            return_token_ids=call.return_token_ids,
            include_usage=call.include_usage,
            usage_so_far=call.usage_so_far,
        )
        headers = {REQUEST_ID: call.answer_id}
        if call.stream:
            client = ClientStream(request, headers, self._silences, self._dispatcher.settings.head_after_s)
            streams = [StreamedAnswer(ChunkWriter(head, one.index), client) for one in calls]
            served = [self._request(*pair, arrival_s) for pair in zip(calls, streams, strict=True)]

            async def streamed() -> bytes:
                await self._run(served)
                return streams[0].writer.end(_usage(served) if call.include_usage else {})

            return await client.carry(streamed())
        wholes = [WholeAnswer(head, one.index) for one in calls]
        served = [self._request(*pair, arrival_s) for pair in zip(calls, wholes, strict=True)]
        await self._run(served)
        choices = [w.choice(one.legs.prompt_ids) for w, one in zip(wholes, served, strict=True)]
        return web.Response(
            body=whole_body(head, choices, _usage(served)), content_type=JSON, headers=headers
        )

    def _request(self, call: Call, answer: StreamedAnswer | WholeAnswer, arrival_s: float) -> ServedRequest:
        return ServedRequest(call, self._dispatcher, self._estimate, answer, arrival_s)

    async def _run(self, served: Sequence[ServedRequest]) -> None:
        """Serve requests, which tell journal and metrics how they ended. Raises what the first of them raises
        that fails, and ends the others.

        One that ``cut_off`` ended raises the error that it recorded.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            if len(served) == 1:
                await served[0].run()
                return
            async with asyncio.TaskGroup() as group:
                for one in served:
                    group.create_task(one.run())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        except asyncio.CancelledError:
            if not self._dispatcher.stopping:
                raise
            task.uncancel()
            raise self._dispatcher.cut_off() from None
        finally:
            self._running.discard(task)


def _usage(served: Sequence[ServedRequest]) -> Json:
    """Return the usage of an answer, which has every prompt once and the tokens of all choices."""
    firsts = [one for one in served if one.call.first_of_prompt]
    return usage_object(
        sum(one.legs.prompt_tokens for one in firsts),
        sum(len(one.legs.out_ids) for one in served),
        sum(one.record.cached_tokens for one in firsts),
    )
