"""One vLLM server as the probes see it: short questions, legs of a few tokens, its counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import aiohttp
import orjson

from tidegate.check.counters import Counters, read_counters
from tidegate.check.verdict import Json
from tidegate.core.errors import EngineFault, EngineTimeout, EngineUnreachable
from tidegate.protocol.sse import SseParser

COUNTERS_LAG_S = 2.0
"""How long counters may lag behind an answer: servers write them after the step that made it."""
COUNTERS_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a server may take for a plain question, for a leg of a few tokens, and for a leg whose KV
    cannot come: vLLM waits 5 s for a peer."""

    ask_s: float = 5.0
    leg_s: float = 20.0
    dead_peer_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer. ``body`` is empty when it is no JSON object; ``skew_s`` is the server's clock minus
    ours, as far as its Date header tells (within a second)."""

    status: int
    body: Json
    text: str
    seconds: float
    skew_s: float | None

    @property
    def error(self) -> str:
        """The server's own words for an error answer."""
        error = self.body.get("error", self.body.get("message", self.text))
        words = str(error.get("message", error) if isinstance(error, dict) else error)
        return f"HTTP {self.status}: {' '.join(words.split())[:160]}"


@dataclass(frozen=True, slots=True)
class Leg:
    """The answer to a completion: the new token ids, and the handle of what was pinned, if it was."""

    token_ids: list[int]
    params: Json | None
    seconds: float
    first_s: float = 0.0
    """When the first token of a streamed one came."""


@dataclass(slots=True)
class Server:
    """Calls one server. Every call ends by its deadline.

    Calls raise EngineUnreachable, EngineTimeout or EngineFault, each naming the server; ``pinned`` is told of
    every handle that an answer brings.
    """

    id: str
    url: str
    session: aiohttp.ClientSession
    deadlines: Deadlines = field(default_factory=Deadlines)
    api_key: str = field(default="", repr=False)
    pinned: Callable[[str, Json], None] = lambda owner, params: None
    model: str = ""

    async def ask(self, path: str, body: Json | None = None, *, deadline_s: float | None = None) -> Reply:
        """GET ``path``, or POST ``body`` to it; any HTTP status is an answer."""
        began_s = time.perf_counter()
        async with self._request(path, body, deadline_s or self.deadlines.ask_s) as response:
            text = await response.text(errors="replace")
        seconds = time.perf_counter() - began_s
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError:
            parsed = {}
        skew_s = _skew_s(response.headers.get("Date"), seconds)
        return Reply(response.status, parsed if isinstance(parsed, dict) else {}, text, seconds, skew_s)

    async def counters(self) -> Counters:
        """Read ``/metrics``."""
        reply = await self.ask("/metrics")
        if reply.status != 200:
            raise EngineFault(f"/metrics answers {reply.error}", instance=self.id)
        try:
            return read_counters(reply.text)
        except ValueError as error:
            raise EngineFault(f"/metrics is not Prometheus text: {error}", instance=self.id) from None

    async def counters_once(
        self, holds: Callable[[Counters], bool], *, within_s: float = COUNTERS_LAG_S
    ) -> Counters:
        """Read ``/metrics`` until ``holds``, or until ``within_s`` have passed; return the last reading."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + within_s
        while True:
            counters = await self.counters()
            if holds(counters) or clock() >= end_s:
                return counters
            await asyncio.sleep(COUNTERS_POLL_S)

    async def send(
        self, prompt: list[int], max_tokens: int, *, kv: Json | None = None, salt: str = "", deadline_s: float
    ) -> Reply:
        """Ask for a completion in one piece, greedy and exactly as long as wanted."""
        body = self._body(prompt, max_tokens, kv, salt)
        reply = await self.ask("/v1/completions", body, deadline_s=deadline_s)
        params = reply.body.get("kv_transfer_params")
        if isinstance(params, dict) and params.get("remote_block_ids"):
            self.pinned(self.id, params)
        return reply

    async def complete(
        self, prompt: list[int], max_tokens: int, *, kv: Json | None = None, salt: str = ""
    ) -> Leg:
        """Like ``send``, and read the answer. Raises EngineFault unless it is one."""
        reply = await self.send(prompt, max_tokens, kv=kv, salt=salt, deadline_s=self.deadlines.leg_s)
        if reply.status != 200:
            raise EngineFault(reply.error, instance=self.id)
        params = reply.body.get("kv_transfer_params")
        try:
            ids = list(reply.body["choices"][0]["token_ids"])
        except (LookupError, TypeError):
            raise EngineFault("it returns no token ids (return_token_ids)", instance=self.id) from None
        return Leg(
            ids,
            params if isinstance(params, dict) and params.get("remote_block_ids") else None,
            reply.seconds,
        )

    async def stream(self, prompt: list[int], max_tokens: int, *, stop_after: int, salt: str = "") -> Leg:
        """Stream a completion, and leave once ``stop_after`` tokens came: the server aborts the rest."""
        body = {**self._body(prompt, max_tokens, None, salt), "stream": True}
        began_s = time.perf_counter()
        ids: list[int] = []
        first_s = last_s = 0.0
        async with self._request("/v1/completions", body, self.deadlines.leg_s) as response:
            if response.status != 200:
                raise EngineFault(f"HTTP {response.status} for a stream", instance=self.id)
            parser = SseParser()
            while len(ids) < stop_after and (data := await response.content.readany()):
                for payload in parser.feed(data):
                    ids += self._event_ids(payload)
                last_s = time.perf_counter() - began_s
                first_s = first_s or (last_s if ids else 0.0)
            response.close()
        if len(ids) < stop_after:
            raise EngineFault(f"a stream ended after {len(ids)} of {stop_after} tokens", instance=self.id)
        return Leg(ids, None, last_s, first_s)

    def _body(self, prompt: list[int], max_tokens: int, kv: Json | None, salt: str) -> Json:
        body: Json = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if kv is not None:
            body["kv_transfer_params"] = kv
        if salt:
            body["cache_salt"] = salt
        return body

    def _event_ids(self, payload: bytes) -> list[int]:
        if payload == b"[DONE]":
            return []
        try:
            event = orjson.loads(payload)
            if "error" in event:
                raise EngineFault(f"a stream ended with {event['error']}", instance=self.id)
            return [token for choice in event.get("choices") or () for token in choice.get("token_ids") or ()]
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            raise EngineFault(f"a malformed event: {payload[:80]!r}", instance=self.id) from None

    @asynccontextmanager
    async def _request(
        self, path: str, body: Json | None, deadline_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = orjson.dumps(body)
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        try:
            async with self.session.request(
                "GET" if body is None else "POST",
                self.url + path,
                data=data,
                headers=headers,
                timeout=timeout,
            ) as response:
                yield response
        except TimeoutError:
            raise EngineTimeout(f"{path} has no answer after {deadline_s:g} s", instance=self.id) from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or str(error)
            raise EngineUnreachable(f"no connection: {reason}", instance=self.id) from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(str(error) or type(error).__name__, instance=self.id) from None


def _skew_s(date: str | None, seconds: float) -> float | None:
    """Return how far the clock behind a Date header is ahead of ours; the header has whole seconds."""
    if date is None:
        return None
    try:
        theirs_s = parsedate_to_datetime(date).timestamp() + 0.5
    except ValueError:
        return None
    return theirs_s - (time.time() - seconds / 2)
