"""The instance's HTTP server: vLLM's dialect in front of one engine.

``/tidegate/*`` and requests with ``kv_transfer_params`` are for members of the launch only.
"""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import asdict
from typing import Annotated, Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field, StrictBool, StrictStr

from tidegate.core.errors import BadRequest, Forbidden, NoInstance
from tidegate.engines.serving.generation import Generation, Parts
from tidegate.engines.serving.requests import check_model
from tidegate.engines.serving.secret import SECRET_HEADER
from tidegate.protocol import MOST_BODY_BYTES
from tidegate.protocol.bodies import ChatMessage, RequestBody, TokenIds, parse_body
from tidegate.protocol.http_front import (
    FrontRunner,
    Handler,
    answering_errors,
    check_bearer,
    json_answer,
    read_object,
)

BACKLOG = 2048
MEMBERS_PREFIX = "/tidegate/"
"""Of the routes that members of a launch use among themselves."""


class TokenizeBody(RequestBody):
    """Body of ``/tokenize``: text or messages."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True


class DetokenizeBody(RequestBody):
    """Body of ``/detokenize``."""

    model: StrictStr | None = None
    tokens: TokenIds


class ReleaseBody(RequestBody):
    """Body of ``/tidegate/release``."""

    request_id: StrictStr


class AbortBody(RequestBody):
    """Body of ``/tidegate/abort``."""

    request_ids: Annotated[list[StrictStr], Field(max_length=100_000)]


class EngineServer:
    """Routes, access rules and the life of the listening socket."""

    def __init__(self, parts: Parts, *, api_key: str = "", profile_samples: list[Any] | None = None) -> None:
        self._parts = parts
        self._api_key = api_key
        self._generation = Generation(parts)
        self._profile_samples = profile_samples or []
        self._created = int(time.time())
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None

    def app(self) -> web.Application:
        """Build the aiohttp application."""
        app = web.Application(
            middlewares=[answering_errors(MOST_BODY_BYTES), self._check_access],
            client_max_size=MOST_BODY_BYTES,
        )
        app.add_routes(
            [
                web.post("/v1/completions", self._generation.completions),
                web.post("/v1/chat/completions", self._generation.chat),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.post("/tidegate/release", self.release),
                web.post("/tidegate/abort", self.abort),
                web.get("/tidegate/profile", self.profile),
                web.get("/tidegate/stats", self.stats),
            ]
        )
        return app

    async def start(self, listener: socket.socket) -> None:
        """Serve on a bound socket."""
        self._runner = FrontRunner(self.app(), shutdown_timeout_s=0.5)
        await self._runner.setup()
        self._site = web.SockSite(self._runner, listener, backlog=BACKLOG)
        await self._site.start()

    async def stop(self, within_s: float) -> None:
        """Refuse new requests, let running ones finish for at most ``within_s``, then close. Idempotent."""
        site, self._site = self._site, None
        if site is not None:
            await site.stop()
        await self._generation.drain(within_s)
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        facts = self._parts.facts
        card = {
            "id": facts.model,
            "object": "model",
            "created": self._created,
            "owned_by": "tidegate",
            "root": facts.model,
            "parent": None,
            "max_model_len": facts.max_model_len,
        }
        return json_answer({"object": "list", "data": [card]})

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 with an empty body while requests are accepted"""
        if self._generation.draining:
            raise NoInstance("the instance is shutting down")
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics"""
        return web.Response(
            body=self._parts.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize"""
        body = parse_body(await read_object(request), TokenizeBody)
        check_model(body.model, self._parts.facts)
        codec = self._parts.codec
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("prompt: give either prompt or messages", param="prompt")
        if body.prompt is not None:
            ids = await asyncio.to_thread(
                codec.encode, body.prompt, add_special_tokens=body.add_special_tokens
            )
        else:
            messages = [message.model_dump(exclude_none=True) for message in body.messages or []]
            ids = codec.encode_chat(messages, add_generation_prompt=body.add_generation_prompt)
        return json_answer(
            {"count": len(ids), "max_model_len": self._parts.facts.max_model_len, "tokens": ids}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize"""
        body = parse_body(await read_object(request), DetokenizeBody)
        check_model(body.model, self._parts.facts)
        most = self._parts.facts.vocab_size - 1
        if max(body.tokens, default=0) > most:
            raise BadRequest(f"tokens: an id is not in the vocabulary (0 to {most})", param="tokens")
        return json_answer({"prompt": self._parts.codec.decode(body.tokens)})

    async def release(self, request: web.Request) -> web.Response:
        """POST /tidegate/release: drop the pin of a finished request before its lease ends."""
        body = parse_body(await read_object(request), ReleaseBody)
        return json_answer({"released": self._parts.engine.release(body.request_id)})

    async def abort(self, request: web.Request) -> web.Response:
        """POST /tidegate/abort: end requests; they answer with what they have and ``finish_reason`` abort."""
        body = parse_body(await read_object(request), AbortBody)
        return json_answer({"aborted": self._generation.abort(body.request_ids)})

    async def profile(self, request: web.Request) -> web.Response:
        """GET /tidegate/profile: the samples of the self-profile at start-up."""
        facts = self._parts.facts
        return json_answer(
            {"engine_id": facts.engine_id, "model": facts.model, "samples": self._profile_samples}
        )

    async def stats(self, request: web.Request) -> web.Response:
        """GET /tidegate/stats: ``idle`` says that nothing is held, ``consistent`` that all is free then."""
        now = self._parts.engine.stats()
        idle = not (now.running or now.waiting or now.loading or now.pinned)
        return json_answer(
            {
                **asdict(now),
                "active_requests": self._generation.active,
                "idle": idle,
                "consistent": not idle or now.free_blocks == now.total_blocks,
            }
        )

    @web.middleware
    async def _check_access(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(MEMBERS_PREFIX):
            if not self._parts.secret.admits(request.headers.get(SECRET_HEADER), request.remote):
                raise Forbidden(f"{request.path}: reserved to members of the launch ({SECRET_HEADER} header)")
        elif self._api_key and request.path.startswith("/v1/"):
            check_bearer(request, self._api_key)
        return await handler(request)
