"""Completions and chat: from an HTTP request to an engine request, and its outputs back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from aiohttp import web

from tidegate.core.errors import Forbidden, NoInstance, PromptTooLong
from tidegate.engines.serving.delivery import Delivery, OutputRouter
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.requests import (
    ServedCall,
    build_call,
    check_model,
    kv_source,
    prompt_override,
    refuse_unsupported,
)
from tidegate.engines.serving.secret import SECRET_HEADER, LaunchSecret
from tidegate.engines.serving.types import KvSource, PromptCodec, ServedEngine, ServingFacts
from tidegate.protocol.bodies import ChatBody, CompletionBody, parse_body
from tidegate.protocol.client_stream import ClientStream
from tidegate.protocol.http_front import JSON, read_object

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
        """POST /v1/completions"""
        return await self._generate(request, CompletionBody)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
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

    async def _generate(
        self, request: web.Request, kind: type[CompletionBody] | type[ChatBody]
    ) -> web.StreamResponse:
        arrived_s = time.monotonic()
        body: CompletionBody | ChatBody = parse_body(await read_object(request), kind)
        if self.draining:
            raise NoInstance("the instance is shutting down", retry_after_s=1.0)
        self._check_member(request, body)
        if body.request_id is None:
            body.request_id = request.headers.get("x-request-id")
        facts, metrics = self._parts.facts, self._parts.metrics
        source = kv_source(body.kv_transfer_params, facts)
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
        """Run the call; return what is left to be sent. Raises the engine's error, or ClientGone.

        When the client leaves before the engine ends, the call is aborted and its KV freed.
        """
        engine, request_id = self._parts.engine, call.generate.id
        with self._parts.router.receiving(request_id, delivery.receive):
            with self._releasing_if_refused(call.generate.source):
                engine.submit(call.generate)
            self._calls[request_id] = call
            try:
                return await delivery.finished
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
            if not isinstance(body.prompt, str):
                return body.prompt
            self._check_text(len(body.prompt), "prompt")
            if len(body.prompt) > LONG_TEXT_CHARS:
                return await asyncio.to_thread(codec.encode, body.prompt)
            return codec.encode(body.prompt)
        override = prompt_override(body)
        if override is not None:
            return override
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        chars = sum(len(str(message.get("content", ""))) for message in messages)
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

    def _check_member(self, request: web.Request, body: CompletionBody | ChatBody) -> None:
        params = body.kv_transfer_params
        if params is None or not (params.model_fields_set or params.model_extra):
            return
        if not self._parts.secret.admits(request.headers.get(SECRET_HEADER), request.remote):
            raise Forbidden(
                f"kv_transfer_params: reserved to members of the launch ({SECRET_HEADER} header)",
                param="kv_transfer_params",
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
