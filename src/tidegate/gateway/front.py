"""The HTTP front: OpenAI routes in, requests out."""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakSet

from aiohttp import web

from tidegate.core.errors import (
    NoInstance,
    ShuttingDown,
    TidegateError,
    UnknownModel,
    status_of,
)
from tidegate.gateway.answers import StreamedAnswer
from tidegate.gateway.call import Call, read_call
from tidegate.gateway.dispatcher import RETRY_AFTER_S, Dispatcher
from tidegate.gateway.operations import add_instance, drain_instance, undrain_instance
from tidegate.gateway.served_request import ServedRequest
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.state import models_object, state_object
from tidegate.gateway.token_estimate import TokenEstimate
from tidegate.protocol.chunks import AnswerHead, ChunkWriter, WholeAnswer, usage_object
from tidegate.protocol.client_stream import ClientStream
from tidegate.protocol.http_front import (
    JSON,
    Handler,
    answering_errors,
    check_bearer,
    header_texts,
    json_answer,
    read_object,
)

GUARDED = ("/v1/", "/tidegate/")
CALL_HEADERS = ("x-tenant-id", "x-session-id", "x-slo-ttft-ms", "x-slo-tpot-ms")
CUT_OFF_S = 1.0
"""How long cut-off requests have to tell their clients (ours)."""


class Front:
    """Handles every route of the gateway."""

    def __init__(self, settings: GatewaySettings, dispatcher: Dispatcher) -> None:
        self._settings = settings
        self._dispatcher = dispatcher
        self._estimate = TokenEstimate()
        self._flying: set[asyncio.Task[Any]] = set()
        self._flown: WeakSet[asyncio.Task[Any]] = WeakSet()
        self.draining = False

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        limit = self._settings.max_body_bytes
        app = web.Application(
            client_max_size=limit, middlewares=[answering_errors(limit, self._count), self._check_key]
        )
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat_completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ready", self.ready)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/tidegate/state", self.state)
        app.router.add_post("/tidegate/instances", self.add_instance)
        app.router.add_post("/tidegate/instances/{id}/drain", self.drain_instance)
        app.router.add_post("/tidegate/instances/{id}/undrain", self.undrain_instance)
        return app

    async def cut_off(self) -> None:
        """End the requests that still run, each with an error that tells why."""
        self.draining = self._dispatcher.stopping = True
        running = set(self._flying)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=CUT_OFF_S)

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._settings.api_key and request.path.startswith(GUARDED):
            check_bearer(request, self._settings.api_key)
        return await handler(request)

    def _count(self, request: web.Request, error: TidegateError) -> None:
        """Count a request that was refused before it was served, which counts its own outcome."""
        # aiohttp handles each request in a task of its own, so the task stands for the request.
        flown = asyncio.current_task() in self._flown
        if request.method == "POST" and request.path.startswith("/v1/") and not flown:
            self._dispatcher.metrics.requests.labels(status_of(error).label).inc()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._serve(request, chat=False)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._serve(request, chat=True)

    async def _serve(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        arrival_s = self._dispatcher.clock.now()
        headers = header_texts(request, *CALL_HEADERS)
        call = read_call(await read_object(request), headers, chat=chat, slo=self._settings.slo)
        model = self._model(call)
        if self.draining:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=RETRY_AFTER_S)
        head = AnswerHead(call.id, call.created, model, call.chat, call.return_token_ids, call.include_usage)
        if call.stream:
            client, writer = ClientStream(request, {"x-request-id": call.id}), ChunkWriter(head)
            answer = StreamedAnswer(writer, client)
            served = ServedRequest(call, self._dispatcher, self._estimate, answer, arrival_s)

            async def streamed() -> bytes:
                await self._fly(served)
                return writer.end(_usage(served))

            return await client.carry(streamed())
        whole = WholeAnswer(head)
        served = ServedRequest(call, self._dispatcher, self._estimate, whole, arrival_s)
        await self._fly(served)
        body = whole.body(_usage(served), served.legs.prompt_ids)
        return web.Response(body=body, content_type=JSON, headers={"x-request-id": call.id})

    async def _fly(self, served: ServedRequest) -> None:
        """Serve a request, which tells journal and metrics how it ended. Raises what it raises.

        A request that ``cut_off`` ended raises the error that it recorded.
        """
        task = asyncio.current_task()
        assert task is not None
        self._flying.add(task)
        self._flown.add(task)
        try:
            await served.run()
        except asyncio.CancelledError:
            if not self._dispatcher.stopping:
                raise
            task.uncancel()
            raise self._dispatcher.cut_off() from None
        finally:
            self._flying.discard(task)

    def _model(self, call: Call) -> str:
        """Return the name of the model that answers. Raises UnknownModel for one that is not served.

        With no instance up any name passes: the request finds that out, and records it.
        """
        models = {u.member.model for u in self._dispatcher.upstreams.values()}
        if not models or call.model in models:
            return call.model or ""
        if call.model is None:
            return min(models)
        raise UnknownModel(
            f"model {call.model!r} is not served here; served: {', '.join(sorted(models))}", param="model"
        )

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return json_answer(models_object(self._dispatcher))

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: the gateway process answers."""
        return json_answer({"status": "draining" if self.draining else "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: at least one instance is up and requests are taken."""
        if self.draining or not self._dispatcher.upstreams:
            raise NoInstance("not ready", retry_after_s=RETRY_AFTER_S)
        return json_answer({"status": "ready", "instances": len(self._dispatcher.upstreams)})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus text."""
        return web.Response(
            body=self._dispatcher.metrics.render(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def state(self, request: web.Request) -> web.Response:
        """GET /tidegate/state: the cluster as the control plane sees it."""
        return json_answer(state_object(self._dispatcher))

    async def add_instance(self, request: web.Request) -> web.Response:
        """POST /tidegate/instances: start one more instance."""
        return json_answer(add_instance(self._dispatcher, await _optional_object(request)))

    async def drain_instance(self, request: web.Request) -> web.Response:
        """POST /tidegate/instances/{id}/drain: give an instance nothing more to do."""
        body = await _optional_object(request)
        return json_answer(drain_instance(self._dispatcher, request.match_info["id"], body))

    async def undrain_instance(self, request: web.Request) -> web.Response:
        """POST /tidegate/instances/{id}/undrain: have a drained instance get work again."""
        return json_answer(undrain_instance(self._dispatcher, request.match_info["id"]))


async def _optional_object(request: web.Request) -> dict[str, Any]:
    return await read_object(request) if request.can_read_body else {}


def _usage(served: ServedRequest) -> dict[str, Any]:
    return usage_object(served.legs.prompt_tokens, len(served.legs.out_ids), served.record.cached_tokens)
