"""The HTTP front: OpenAI routes in, flights out."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from tidegate.core.errors import (
    BadRequest,
    BodyTooLarge,
    ClientGone,
    InternalError,
    NoInstance,
    TidegateError,
    Unauthorized,
    UnknownModel,
    UnknownRoute,
    status_of,
)
from tidegate.gateway.answers import Collected, Streamed, usage_object
from tidegate.gateway.call import Call, read_call
from tidegate.gateway.client_stream import ClientStream
from tidegate.gateway.flight import Flight, TokenEstimate
from tidegate.gateway.scheduler import RETRY_AFTER_S, Scheduler
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.state import models_object, state_object
from tidegate.protocol.bodies import parse_object
from tidegate.protocol.errors import error_body, error_headers

log = logging.getLogger("tidegate.gateway")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
GUARDED = ("/v1/", "/tidegate/")


class Front:
    """Handles every route of the gateway."""

    def __init__(self, settings: GatewaySettings, scheduler: Scheduler) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._estimate = TokenEstimate()
        self.draining = False

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(client_max_size=self._settings.max_body_bytes, middlewares=[self._guard])
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat_completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ready", self.ready)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/tidegate/state", self.state)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the API key and turn every failure into the OpenAI error schema."""
        try:
            if self._settings.api_key and request.path.startswith(GUARDED):
                self._check_key(request.headers.get("Authorization", ""))
            return await handler(request)
        except TidegateError as error:
            return self._error(error)
        except web.HTTPRequestEntityTooLarge:
            limit = self._settings.max_body_bytes
            response = self._error(BodyTooLarge(f"the body exceeds {limit} bytes"))
            response.force_close()
            return response
        except web.HTTPNotFound:
            return self._error(UnknownRoute(f"no route {request.method} {request.path}"))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            response = self._error(UnknownRoute(f"{request.path} takes {allowed}, not {request.method}"))
            response.set_status(405)
            response.headers["Allow"] = allowed
            return response
        except web.HTTPException as error:
            response = self._error(BadRequest(error.text or error.reason))
            response.set_status(error.status)
            return response
        except ConnectionError:
            return self._error(ClientGone("the client closed the connection"))
        except Exception:
            log.exception("a request failed inside the gateway")
            return self._error(InternalError("the gateway failed; see its log"))

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        given = key.encode() if scheme.lower() == "bearer" else b""
        if not hmac.compare_digest(given, self._settings.api_key.encode()):
            raise Unauthorized("a valid API key is needed: Authorization: Bearer KEY")

    @staticmethod
    def _error(error: TidegateError) -> web.Response:
        return web.Response(
            status=status_of(error).http,
            body=error_body(error),
            content_type="application/json",
            headers=error_headers(error),
        )

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._serve(request, chat=False)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._serve(request, chat=True)

    async def _serve(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        arrival_s = self._scheduler.clock.now()
        raw = await request.read()
        call = read_call(parse_object(raw), request.headers, chat=chat, slo=self._settings.slo)
        model = self._model(call)
        if self.draining:
            raise NoInstance("the gateway is shutting down", retry_after_s=RETRY_AFTER_S)
        if call.stream:
            return await self._stream(request, call, model, arrival_s)
        collected = Collected()
        flight = Flight(call, self._scheduler, self._estimate, collected, arrival_s)
        await flight.run()
        body = collected.body(
            call,
            model,
            finish_reason=flight.finish_reason,
            stop_reason=flight.stop_reason,
            usage=_usage(flight),
            token_ids=flight.out_ids,
            prompt_ids=flight.prompt_ids,
        )
        return web.Response(body=body, content_type="application/json", headers={"x-request-id": call.id})

    async def _stream(
        self, request: web.Request, call: Call, model: str, arrival_s: float
    ) -> web.StreamResponse:
        client = ClientStream(request, {"x-request-id": call.id})
        answer = Streamed(call, model, client)
        flight = Flight(call, self._scheduler, self._estimate, answer, arrival_s)
        try:
            await flight.run()
        except TidegateError as error:
            if not client.started or isinstance(error, ClientGone):
                raise
            return await client.fail(error)
        except BaseException:
            client.discard()
            raise
        return await answer.finish(_usage(flight))

    def _model(self, call: Call) -> str:
        """Return the served model's name. Raises UnknownModel for another, NoInstance with none up."""
        served = {u.member.model for u in self._scheduler.upstreams.values()}
        if not served:
            raise NoInstance("no instance is up", retry_after_s=RETRY_AFTER_S)
        if call.model is None or call.model in served:
            return call.model or next(iter(served))
        raise UnknownModel(
            f"model {call.model!r} is not served here; served: {', '.join(sorted(served))}", param="model"
        )

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return _json(models_object(self._scheduler))

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: the gateway process answers."""
        return _json({"status": "draining" if self.draining else "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: at least one instance is up and requests are taken."""
        if self.draining or not self._scheduler.upstreams:
            raise NoInstance("not ready", retry_after_s=RETRY_AFTER_S)
        return _json({"status": "ready", "instances": len(self._scheduler.upstreams)})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus text."""
        return web.Response(
            body=self._scheduler.metrics.render(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def state(self, request: web.Request) -> web.Response:
        """GET /tidegate/state: the cluster as the scheduler sees it."""
        return _json(state_object(self._scheduler))


def _usage(flight: Flight) -> dict[str, Any]:
    return usage_object(flight.prompt_tokens, len(flight.out_ids), flight.story.cached_tokens)


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
