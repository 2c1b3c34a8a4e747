"""The client for all that is asked of a vLLM server beside the legs of requests (``engines/dialect.py``):
what it is, how it is, what it counts, and short probes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import orjson

from tidegate.core.errors import EngineFault, EngineTimeout, EngineUnreachable, NoDescriptors, SetupError
from tidegate.engines.seam import Json
from tidegate.engines.vllm.connector import refused_request
from tidegate.engines.vllm.metrics import VllmMetrics, read_metrics
from tidegate.protocol.chunks import SseParser, error_text
from tidegate.protocol.descriptors import is_our_lack

ASK_S = 5.0
"""How long a plain question may take unless the caller says otherwise (ours)."""
COMPLETION_S = 60.0
"""How long a probe's completion may take unless the caller says otherwise (ours)."""
BLOCK_TOKENS = 16
"""vLLM's default block size, for a server that shows no metrics."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer of ``instance``. ``body`` is empty when it is no JSON object; ``clock_skew_s`` is the
    server's clock minus ours, as far as its Date header tells (within a second)."""

    instance: str
    status: int
    body: Json
    text: str
    seconds: float
    clock_skew_s: float | None

    @property
    def error(self) -> str:
        """The status and the server's own words for an error."""
        return f"HTTP {self.status}: {' '.join(error_text(self.body, self.text).split())[:160]}"

    @property
    def kv_params(self) -> Json | None:
        """NixlConnector's handle in the answer to a completion; None when it pinned nothing."""
        params = self.body.get("kv_transfer_params")
        return params if isinstance(params, dict) and params.get("remote_block_ids") else None

    def new_tokens(self) -> list[int]:
        """Return the ids in the answer to a completion. Raises EngineFault for an error, or without ids."""
        if self.status != 200:
            raise EngineFault(self.error, instance=self.instance)
        try:
            return list(self.body["choices"][0]["token_ids"])
        except (LookupError, TypeError):
            raise EngineFault("it returns no token ids (return_token_ids)", instance=self.instance) from None


@dataclass(frozen=True, slots=True)
class TimedTokens:
    """The first tokens of a stream, seconds until the first and until the last of them."""

    token_ids: list[int]
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The models a server lists, the context length of the first one, and its metrics, empty without any."""

    models: tuple[str, ...]
    max_model_len: int
    metrics: VllmMetrics = field(default_factory=VllmMetrics)

    @property
    def model(self) -> str:
        """The name that requests use: the first one listed."""
        return self.models[0]

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV block; vLLM's default where the server does not tell."""
        return self.metrics.block_tokens or BLOCK_TOKENS

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of the KV cache: at least ``max_model_len``, which vLLM guarantees at its start."""
        return max(self.metrics.kv_capacity_tokens or 0, self.max_model_len)


class VllmClient:
    """Asks one server that speaks vLLM's HTTP dialect. Every call ends by its deadline.

    Calls raise EngineUnreachable, EngineTimeout or EngineFault, each naming ``instance``. ``deadline_s`` is
    for plain questions, ``completion_s`` for completions; ``headers`` are sent with each. ``model`` is what
    completions name, to be set before the first one.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        instance: str = "",
        api_key: str = "",
        deadline_s: float = ASK_S,
        completion_s: float = COMPLETION_S,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.url = url
        self.instance = instance or url
        self.model = ""
        self.deadline_s = deadline_s
        self.completion_s = completion_s
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers |= headers or {}

    async def ask(self, path: str, body: Json | None = None, *, deadline_s: float | None = None) -> Reply:
        """GET ``path``, or POST ``body`` to it; any HTTP status is an answer."""
        began_s = time.perf_counter()
        async with self._request(path, body, deadline_s or self.deadline_s) as response:
            text = (await response.read()).decode(errors="replace")
        seconds = time.perf_counter() - began_s
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError:
            parsed = {}
        return Reply(
            self.instance,
            response.status,
            parsed if isinstance(parsed, dict) else {},
            text,
            seconds,
            _clock_skew_s(response.headers.get("Date"), seconds),
        )

    async def healthy(self) -> bool:
        """Ask ``/health`` once."""
        return (await self.ask("/health")).status == 200

    async def metrics(self) -> VllmMetrics:
        """Read ``/metrics``. Raises EngineFault when there are none that can be read."""
        reply = await self.ask("/metrics")
        if reply.status != 200:
            raise EngineFault(f"/metrics answers {reply.error}", instance=self.instance)
        try:
            return read_metrics(reply.text)
        except ValueError as error:
            raise EngineFault(f"/metrics is not Prometheus text: {error}", instance=self.instance) from None

    async def version(self) -> str:
        """Return vLLM's version; empty when the server does not tell."""
        reply = await self.ask("/version")
        version = reply.body.get("version") if reply.status == 200 else None
        return version if isinstance(version, str) else ""

    async def facts(self) -> ServerFacts:
        """Ask ``/v1/models`` and ``/metrics``. Raises SetupError when the server can never be described, an
        EngineError when asking again later may succeed."""
        reply = await self.ask("/v1/models")
        if reply.status in (401, 403):
            raise SetupError(
                f"{self.url} answers /v1/models with {reply.status}: it wants an API key; set "
                "TIDEGATE_VLLM_API_KEY, or give --api-key (check, profile) or fleet.vllm_api_key (serve)"
            )
        if reply.status == 404:
            raise SetupError(f"{self.url} has no /v1/models: it is not an OpenAI-compatible server")
        if reply.status != 200:
            raise EngineFault(f"/v1/models answers {reply.status}", instance=self.instance)
        try:
            listed: list[dict[str, Any]] = reply.body["data"]
            names = tuple(str(model["id"]) for model in listed)
            length = listed[0].get("max_model_len")
        except (LookupError, TypeError, AttributeError):
            raise SetupError(f"{self.url}/v1/models lists no model") from None
        if not isinstance(length, int) or length <= 0:
            raise SetupError(
                f"{self.url}/v1/models gives no max_model_len for {names[0]}: "
                "tidegate needs vLLM's own server"
            )
        try:
            return ServerFacts(names, length, await self.metrics())
        except EngineFault:
            return ServerFacts(names, length)

    async def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text`` without special tokens. Raises EngineFault when it does not tell."""
        reply = await self.ask(
            "/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False}
        )
        ids = reply.body.get("tokens")
        if reply.status != 200 or not isinstance(ids, list):
            raise EngineFault(f"/tokenize answers {reply.error}", instance=self.instance)
        return ids

    async def complete(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        kv: Json | None = None,
        salt: str = "",
        deadline_s: float | None = None,
    ) -> Reply:
        """Ask for a completion in one piece, greedy and exactly as long as wanted; ``kv`` are its
        ``kv_transfer_params``, ``salt`` the key under which its KV is found again."""
        body = self._completion(prompt, max_tokens, kv, salt)
        return await self.ask("/v1/completions", body, deadline_s=deadline_s or self.completion_s)

    async def stream(
        self, prompt: list[int], max_tokens: int, *, stop_after: int, salt: str = ""
    ) -> TimedTokens:
        """Stream such a completion, and leave once ``stop_after`` tokens came: the server aborts the rest."""
        body = {**self._completion(prompt, max_tokens, None, salt), "stream": True}
        began_s = time.perf_counter()
        ids: list[int] = []
        first_s = last_s = 0.0
        async with self._request("/v1/completions", body, self.completion_s) as response:
            if response.status != 200:
                raise EngineFault(f"HTTP {response.status} for a stream", instance=self.instance)
            parser = SseParser()
            while len(ids) < stop_after and (data := await response.content.readany()):
                for payload in parser.feed(data):
                    ids += self._event_ids(payload)
                last_s = time.perf_counter() - began_s
                first_s = first_s or (last_s if ids else 0.0)
            response.close()
        if len(ids) < stop_after:
            raise EngineFault(
                f"a stream ended after {len(ids)} of {stop_after} tokens", instance=self.instance
            )
        return TimedTokens(ids, first_s, last_s)

    async def decline(self, kv: Json, *, deadline_s: float | None = None) -> bool:
        """Have the owner of the KV that ``kv`` would load, another server, free it: see ``refused_request``.
        Tell whether the request was refused, as it has to be."""
        body = {"model": self.model} | refused_request(kv)
        reply = await self.ask("/v1/completions", body, deadline_s=deadline_s or self.completion_s)
        return 400 <= reply.status < 500

    def _completion(self, prompt: list[int], max_tokens: int, kv: Json | None, salt: str) -> Json:
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
                raise EngineFault(f"a stream ended with {error_text(event)}", instance=self.instance)
            return [token for choice in event.get("choices") or () for token in choice.get("token_ids") or ()]
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            raise EngineFault(f"a malformed event: {payload[:80]!r}", instance=self.instance) from None

    @asynccontextmanager
    async def _request(
        self, path: str, body: Json | None, deadline_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers, data = self._headers, None
        if body is not None:
            headers, data = {"Content-Type": "application/json", **headers}, orjson.dumps(body)
        try:
            async with self._session.request(
                "GET" if body is None else "POST",
                self.url + path,
                data=data,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=deadline_s),
            ) as response:
                yield response
        except TimeoutError:
            raise EngineTimeout(
                f"{path} has no answer after {deadline_s:g} s", instance=self.instance
            ) from None
        except aiohttp.ClientSSLError as error:  # a connector's error, too, but not always with an OSError
            raise EngineUnreachable(f"no TLS: {error}", instance=self.instance) from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or str(error)
            if is_our_lack(error.os_error):
                raise NoDescriptors(f"no connection can be opened: {reason}") from None
            raise EngineUnreachable(
                f"no connection: {reason}", instance=self.instance, refused=True
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(str(error) or type(error).__name__, instance=self.instance) from None


def _clock_skew_s(date: str | None, seconds: float) -> float | None:
    """Return how far the clock behind a Date header is ahead of ours; the header has whole seconds."""
    if date is None:
        return None
    try:
        theirs_s = parsedate_to_datetime(date).timestamp() + 0.5
    except ValueError:
        return None
    return theirs_s - (time.time() - seconds / 2)
