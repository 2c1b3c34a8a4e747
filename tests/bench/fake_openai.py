"""An OpenAI-style server for tests: answers at once, and misbehaves on request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web
from aiohttp.test_utils import TestServer

from tidegate.bench import BenchRun, BenchSettings
from tidegate.workloads.trace import TraceRecord

Plan = Callable[[int], str]
"""From the prompt length of a streamed request to what to do with it; see ``FakeOpenAI``."""


@dataclass
class FakeOpenAI:
    """Streams ``max_tokens`` one-token chunks, then usage.

    ``plan(size)`` for a streamed request whose prompt has that many tokens is ``ok``, ``stall``
    (accept and never answer), ``reject`` (429), ``error`` (an error event after one token), ``cut``
    (close after one token) or ``unfinished`` (end without finish_reason). With ``tokens_per_word``
    text costs that many tokens a word plus ``overhead``; ids of ``vocab`` and above are refused, or
    all ids when it is 0. With ``ids`` every chunk has the id of its token.
    """

    plan: Plan = lambda size: "ok"
    vocab: int = 32000
    tokens_per_word: int = 1
    overhead: int = 0
    models: tuple[str, ...] = ("fake",)
    api_key: str = ""
    ids: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def received(self, count: int) -> None:
        """Return once ``count`` streamed requests have come in."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.bodies) >= count)

    @staticmethod
    def ids_of(body: dict[str, Any]) -> list[int]:
        """Return the ids of the answer to a prompt of ids."""
        start = sum(body["prompt"]) if isinstance(body["prompt"], list) else 0
        return [(start + 7 * k) % 1000 for k in range(body["max_tokens"])]

    async def _models(self, request: web.Request) -> web.Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        return web.json_response({"data": [{"id": m} for m in self.models]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        if isinstance(prompt, list) and max(prompt) >= self.vocab:
            return web.json_response({"error": {"message": "token id out of vocabulary"}}, status=400)
        size = len(prompt) if isinstance(prompt, list) else len(prompt.split()) * self.tokens_per_word
        usage = {
            "prompt_tokens": size + (0 if isinstance(prompt, list) else self.overhead),
            "completion_tokens": body["max_tokens"],
        }
        if not body.get("stream"):
            told = {"token_ids": self.ids_of(body)} if self.ids else {}
            return web.json_response(
                {"choices": [{"text": "x", "finish_reason": "length", **told}], "usage": usage}
            )
        async with self.arrived:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.arrived.notify_all()
        return await self._stream(request, body, usage, self.plan(size))

    async def _stream(
        self, request: web.Request, body: dict[str, Any], usage: dict[str, int], plan: str
    ) -> web.StreamResponse:
        if plan == "stall":
            await asyncio.Event().wait()
        if plan == "reject":
            return web.json_response({"error": {"message": "too busy"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        total = 1 if plan != "ok" else body["max_tokens"]
        for i in range(total):
            finish = "length" if plan == "ok" and i == total - 1 else None
            choice = _choice(" x", finish, chat="messages" in body)
            if self.ids:
                choice["token_ids"] = [self.ids_of(body)[i]]
            await response.write(_event({"choices": [choice]}))
        if plan == "cut":
            assert request.transport is not None
            request.transport.close()
            return response
        if plan == "error":
            await response.write(_event({"error": {"message": "the engine died"}}))
        await response.write(_event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def serving(fake: FakeOpenAI) -> AsyncIterator[str]:
    server = TestServer(fake.app())
    await server.start_server(shutdown_timeout=0.0)
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


def _choice(text: str, finish: str | None, *, chat: bool) -> dict[str, Any]:
    content = {"delta": {"content": text}} if chat else {"text": text}
    return {"index": 0, "finish_reason": finish, **content}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DEFAULTS = BenchSettings("http://127.0.0.1")


class Offer(Protocol):
    """Runs a bench with ``settings`` against a fake; ``stop_at`` interrupts it after so many requests."""

    async def __call__(
        self,
        fake: FakeOpenAI,
        records: Sequence[TraceRecord],
        *,
        stop_at: int | None = None,
        out: Path | None = None,
        settings: BenchSettings = DEFAULTS,
    ) -> BenchRun: ...
