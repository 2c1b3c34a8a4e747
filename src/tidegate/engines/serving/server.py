"""The instance's HTTP server: vLLM's dialect in front of one engine.

``/tidegate/*`` and requests with ``kv_transfer_params`` are for members of the launch only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field, StrictBool, StrictStr

from tidegate import __version__
from tidegate.core.errors import BadRequest, ClientGone, NoInstance, PromptTooLong
from tidegate.engines.serving.delivery import Delivery, OutputRouter
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.requests import (
    ServedCall,
    build_call,
    check_model,
    flat_messages,
    kv_source,
    refuse_unsupported,
)
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.types import KvSource, PromptCodec, ServedEngine, ServingFacts
from tidegate.protocol import MOST_BODY_BYTES
from tidegate.protocol.bodies import ChatBody, ChatMessage, CompletionBody, RequestBody, TokenIds, parse_body
from tidegate.protocol.client_stream import ClientStream
from tidegate.protocol.http_front import (
    JSON,
    KEYED,
    FrontRunner,
    Handler,
    answering_errors,
    json_answer,
    name_answer,
    owner_of_key,
    read_object,
)
from tidegate.protocol.models import model_card, model_list

BACKLOG = 2048
MOST_UNWANTED = 4096
"""Releases remembered that found nothing to release."""
MEMBERS_PREFIX = "/tidegate/"
"""Of the routes that members of a launch use among themselves."""
LONG_TEXT_CHARS = 20_000
MESSAGE_CHARS = 64
"""What a chat template adds around a message, roughly: many empty messages are long, too."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the server is made of. ``release_source`` tells the owner of KV that nobody will pull it."""

    engine: ServedEngine
    codec: PromptCodec
    facts: ServingFacts
    secret: LaunchSecret
    metrics: ServerMetrics
    router: OutputRouter
    release_source: Callable[[KvSource], None]


class Generation:
    """Answers generation requests. A request whose client leaves is aborted."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._calls: dict[str, ServedCall] = {}
        self._unwanted: dict[str, None] = {}
        self.draining = False
        self._drained: asyncio.Event | None = None

    @property
    def active(self) -> int:
        """Requests being answered."""
        return len(self._calls)

    async def drain(self, within_s: float) -> None:
        """Refuse new requests and wait for the running ones, at most ``within_s``."""
        self.draining = True
        if self._calls:
            self._drained = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._drained.wait()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionBody)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatBody)

    def abort(self, ids: Iterable[str]) -> list[str]:
        """End the requests known by these ids (the engine's, the answer's or the client's); return which."""
        wanted = set(ids)
        ended = []
        for engine_id, call in list(self._calls.items()):
            if not wanted.isdisjoint((engine_id, call.head.id, call.client_id)):
                self._parts.engine.abort(engine_id)
                ended.append(engine_id)
        return ended

    def release(self, request_id: str) -> bool:
        """Drop the pin of a request whose answer is lost; False when there is none yet. Such a request is
        ended, and one that comes behind its own release is not begun."""
        if request_id in self._calls:
            self._parts.engine.abort(request_id)
        if self._parts.engine.release(request_id):
            return True
        self._unwanted[request_id] = None
        if len(self._unwanted) > MOST_UNWANTED:
            del self._unwanted[next(iter(self._unwanted))]
        return False

    async def _generate(
        self, request: web.Request, kind: type[CompletionBody] | type[ChatBody]
    ) -> web.StreamResponse:
        arrived_s = time.monotonic()
        body: CompletionBody | ChatBody = parse_body(await read_object(request), kind)
        if self.draining:
            raise NoInstance("the instance is shutting down", retry_after_s=1.0)
        params = body.kv_transfer_params
        if params is not None and (params.model_fields_set or params.model_extra):
            self._parts.secret.require(request, "kv_transfer_params", "kv_transfer_params")
        if body.request_id is None:
            body.request_id = request.headers.get("x-request-id")
        facts, metrics = self._parts.facts, self._parts.metrics
        source = kv_source(params, facts)
        with self._releasing_if_refused(source):
            check_model(body.model, facts)
            refuse_unsupported(body)
            prompt = await self._prompt_ids(body)
            call = build_call(body, prompt, facts, source)
        if call.stream:
            client = ClientStream(request, {})
            delivery = Delivery(call, facts, metrics, arrived_s, client)
            return await client.carry(self._finished(call, delivery))
        whole = await self._finished(call, Delivery(call, facts, metrics, arrived_s))
        return web.Response(body=whole, content_type=JSON)

    async def _finished(self, call: ServedCall, delivery: Delivery) -> bytes:
        """Run the call; return what is left to be sent. Raises the engine's error, or ClientGone. When the
        client leaves before the engine ends, the call is aborted and its KV freed."""
        engine, request_id = self._parts.engine, call.generate.id
        if call.generate.pin_kv and request_id in self._unwanted:
            raise ClientGone("the request was released before it came")
        with self._parts.router.receiving(request_id, delivery.receive):
            with self._releasing_if_refused(call.generate.source):
                engine.submit(call.generate)
            self._calls[request_id] = call
            try:
                whole = await delivery.finished
                if call.generate.pin_kv and request_id in self._unwanted:
                    engine.release(request_id)
                return whole
            except BaseException:
                engine.abort(request_id)
                if call.generate.pin_kv:
                    engine.release(request_id)
                raise
            finally:
                del self._calls[request_id]
                if self._drained is not None and not self._calls:
                    self._drained.set()

    async def _prompt_ids(self, body: CompletionBody | ChatBody) -> list[int]:
        codec = self._parts.codec
        if isinstance(body, CompletionBody):
            (prompt,) = body.prompts
            if not isinstance(prompt, str):
                return prompt
            self._check_text(len(prompt), "prompt")
            if len(prompt) > LONG_TEXT_CHARS:
                return await asyncio.to_thread(codec.encode, prompt)
            return codec.encode(prompt)
        if body.kv_transfer_params is not None and body.kv_transfer_params.prompt_token_ids is not None:
            return body.kv_transfer_params.prompt_token_ids
        messages = flat_messages(body.messages)
        chars = sum(len(message.get("content", "")) for message in messages)
        self._check_text(chars, "messages")
        if chars + MESSAGE_CHARS * len(messages) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(codec.encode_chat, messages)
        return codec.encode_chat(messages)

    def _check_text(self, chars: int, field: str) -> None:
        """Refuse a text that cannot fit even if all its tokens were the longest, before it is tokenised."""
        context, longest = self._parts.facts.max_model_len, self._parts.codec.longest_token_chars
        if chars > context * longest:
            raise PromptTooLong(
                f"{field}: {chars} characters leave no room in the model's context of {context} tokens",
                param=field,
            )

    @contextlib.contextmanager
    def _releasing_if_refused(self, source: KvSource | None) -> Iterator[None]:
        """Tell the owner of ``source`` to unpin when the request is refused: nobody will pull it."""
        try:
            yield
        except BaseException:
            if source is not None:
                self._parts.release_source(source)
            raise


class TokenizeBody(RequestBody):
    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True


class DetokenizeBody(RequestBody):
    model: StrictStr | None = None
    tokens: TokenIds


class ReleaseBody(RequestBody):
    request_id: StrictStr


class AbortBody(RequestBody):
    request_ids: Annotated[list[StrictStr], Field(max_length=100_000)]


class EngineServer:
    """Routes, access rules and the life of the listening socket."""

    def __init__(self, parts: Parts, *, api_key: str = "") -> None:
        self._parts = parts
        self._api_key = api_key
        self._generation = Generation(parts)
        self._created = int(time.time())
        self._served = {parts.facts.model: parts.facts.max_model_len}
        app = web.Application(
            middlewares=[answering_errors(), self._check_access],
            client_max_size=MOST_BODY_BYTES,
        )
        app.on_response_prepare.append(name_answer)
        app.add_routes(
            [
                web.post("/v1/completions", self._generation.completions),
                web.post("/v1/chat/completions", self._generation.chat),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{model:.+}", self.model),
                web.get("/version", self.version),
                web.get("/ping", self.health),
                web.post("/ping", self.health),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.post("/tidegate/release", self.release),
                web.post("/tidegate/abort", self.abort),
                web.get("/tidegate/stats", self.stats),
            ]
        )
        self._runner = FrontRunner(app, shutdown_timeout_s=0.5)

    async def start(self, listener: socket.socket) -> None:
        """Serve on a bound socket."""
        await self._runner.setup()
        await web.SockSite(self._runner, listener, backlog=BACKLOG).start()

    async def stop(self, within_s: float) -> None:
        """Refuse new requests, let running ones finish for at most ``within_s``, then close. Idempotent."""
        for site in list(self._runner.sites):
            await site.stop()
        await self._generation.drain(within_s)
        await self._runner.cleanup()

    async def models(self, request: web.Request) -> web.Response:
        return json_answer(model_list(self._served, self._created))

    async def model(self, request: web.Request) -> web.Response:
        return json_answer(model_card(self._served, self._created, request.match_info["model"]))

    async def version(self, request: web.Request) -> web.Response:
        return json_answer({"version": __version__})

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 with an empty body while requests are accepted"""
        if self._generation.draining:
            raise NoInstance("the instance is shutting down")
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._parts.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def tokenize(self, request: web.Request) -> web.Response:
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
            messages = flat_messages(body.messages or [])
            ids = codec.encode_chat(messages, add_generation_prompt=body.add_generation_prompt)
        return json_answer(
            {"count": len(ids), "max_model_len": self._parts.facts.max_model_len, "tokens": ids}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = parse_body(await read_object(request), DetokenizeBody)
        check_model(body.model, self._parts.facts)
        most = self._parts.facts.vocab_size - 1
        if max(body.tokens, default=0) > most:
            raise BadRequest(f"tokens: an id is not in the vocabulary (0 to {most})", param="tokens")
        return json_answer({"prompt": self._parts.codec.decode(body.tokens)})

    async def release(self, request: web.Request) -> web.Response:
        """POST /tidegate/release: drop the pin of a request before its lease ends."""
        body = parse_body(await read_object(request), ReleaseBody)
        return json_answer({"released": self._generation.release(body.request_id)})

    async def abort(self, request: web.Request) -> web.Response:
        """POST /tidegate/abort: end requests; they answer with what they have and ``finish_reason`` abort."""
        body = parse_body(await read_object(request), AbortBody)
        return json_answer({"aborted": self._generation.abort(body.request_ids)})

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
            self._parts.secret.require(request, request.path)
        elif self._api_key and request.path.startswith(KEYED):
            owner_of_key(request, {self._api_key.encode(): ""})
        return await handler(request)
