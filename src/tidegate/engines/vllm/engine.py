"""One stock vLLM server behind the engine seam."""

from __future__ import annotations

import asyncio

import orjson

from tidegate.core.errors import EngineError, EngineFault, KvLost
from tidegate.engines.dialect import DialectEngine
from tidegate.engines.seam import Json, KvHandle, Leg, LegEnd, TokensSink
from tidegate.engines.vllm.connector import MARGIN_S, Connector, refusal, refused_request
from tidegate.protocol.chunks import Tokens

DECLINE_S = 5.0
"""How long an engine may take to pass on that a handle is not wanted (ours); this runs in the background."""


class VllmEngine(DialectEngine):
    """Calls one vLLM server. ``connector`` is the way its KV moves; None when it does not. vLLM knows nothing
    of a request's earlier legs: a stream with a handle begins with exactly the tokens that the handle covers
    (see ``Nixl``), and the caller leaves out what it says again."""

    def __init__(
        self,
        instance: str,
        url: str,
        model: str,
        *,
        connect_s: float,
        stall_s: float,
        engine_id: str,
        connector: Connector | None,
        api_key: str = "",
    ) -> None:
        super().__init__(
            instance, url, model, connect_s=connect_s, stall_s=stall_s, api_key=api_key, engine_id=engine_id
        )
        self._connector = connector
        self._pulling: set[_FirstToken] = set()

    async def run(self, leg: Leg, sink: TokensSink, *, deadline_s: float) -> LegEnd:
        """Raises KvLost, too, when the KV of the leg's handle could not be had, or not in time:
        a pull that waits in the engine's queue until after the lease would load other KV."""
        if leg.handle is None:
            return await super().run(leg, sink, deadline_s=deadline_s)
        watched = _FirstToken(sink, leg.handle.owner)
        self._pulling.add(watched)
        try:
            async with asyncio.timeout_at(leg.handle.expires_s - MARGIN_S) as lease:
                watched.lease = lease
                return await super().run(leg, watched, deadline_s=deadline_s)
        except TimeoutError:
            raise KvLost("the KV's lease ran out before it was pulled", instance=self.instance) from None
        except EngineFault as error:
            if watched.lease is None:
                raise
            raise KvLost(f"the leg that pulls KV failed: {error.message}", instance=self.instance) from error
        finally:
            self._pulling.discard(watched)

    async def tokenise(
        self, prompt: list[int] | str | None, messages: list[Json] | None, sampling: Json
    ) -> list[int] | None:
        """vLLM renders a request without running it."""
        body: Json = {**sampling, "model": self.model}
        body |= {"prompt": prompt} if messages is None else {"messages": messages}
        path = "/v1/completions/render" if messages is None else "/v1/chat/completions/render"
        return await self._tokens_of(path, body, "token_ids")

    def owner_gone(self, owner: str) -> None:
        """vLLM itself notices only after seconds."""
        now = asyncio.get_running_loop().time()
        for watched in self._pulling:
            if watched.owner == owner and watched.lease is not None:
                watched.lease.reschedule(now)

    def refuses(self, handle: KvHandle) -> str | None:
        return refusal(handle, self.engine_id, asyncio.get_running_loop().time())

    async def release(self, handle: KvHandle) -> None:
        """vLLM has no way to be asked; another engine declines the handle."""

    async def release_request(self, request_id: str) -> None:
        """The lease ends it."""

    async def decline(self, handle: KvHandle) -> None:
        """A request that cannot be served makes vLLM notify the handle's owner."""
        if self._connector is None or self.refuses(handle):
            return
        params = self._connector.load(handle, handle.tokens, pin=False)
        body = {"model": self.model} | refused_request(params)
        try:
            await self._wire.exchange("POST", "/v1/completions", orjson.dumps(body), deadline_s=DECLINE_S)
        except EngineError:
            return

    def _kv_params(self, leg: Leg) -> Json:
        if self._connector is None:
            return {}
        if leg.handle is not None:
            assert isinstance(leg.prompt, list)
            return self._connector.load(leg.handle, len(leg.prompt), pin=leg.pin)
        return self._connector.export(leg.request_id) if leg.pin else {}

    def _handle(self, params: Json | None, leg: Leg, prompt_tokens: int, tokens: Tokens) -> KvHandle | None:
        if self._connector is None:
            return None
        # A stop string is found behind the engine, which has ended by length: such a leg brings one token.
        capped = tokens.finish_reason == "length" or isinstance(tokens.stop_reason, str)
        now = asyncio.get_running_loop().time()
        return self._connector.handle(params, leg.request_id, self.engine_id, prompt_tokens, now, capped)


class _FirstToken:
    """Passes everything on, and lifts the lease's deadline with the first token."""

    __slots__ = ("_sink", "lease", "owner")

    def __init__(self, sink: TokensSink, owner: str) -> None:
        self._sink = sink
        self.owner = owner
        self.lease: asyncio.Timeout | None = None

    def tokens(self, tokens: Tokens) -> bool | None:
        if tokens.token_ids or tokens.finish_reason is not None:
            self._end_wait()
        return self._sink.tokens(tokens)

    def plain(self, text: str, token_ids: list[int]) -> bool | None:
        if self.lease is not None:
            self._end_wait()
        return self._sink.plain(text, token_ids)

    def _end_wait(self) -> None:
        if self.lease is not None:
            self.lease.reschedule(None)
            self.lease = None
