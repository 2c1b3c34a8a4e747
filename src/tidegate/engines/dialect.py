"""The adapter for engines that speak vLLM's HTTP dialect: the embedded engine, and vLLM itself."""

from __future__ import annotations

from typing import Any

import orjson

from tidegate.core.errors import (
    BadRequest,
    ClientError,
    EngineError,
    EngineFault,
    EngineUnreachable,
    PromptTooLong,
    UnknownModel,
)
from tidegate.engines.seam import Json, KvHandle, Leg, LegEnd, LegTimes, TokensSink
from tidegate.engines.wire import HttpAnswer, Wire
from tidegate.protocol.chunks import SseParser, Tokens, error_text

ONLY_CONTENT = {"content"}
WANT_HANDLE: Json = {"do_remote_decode": True, "do_remote_prefill": False}


class DialectEngine:
    """Calls one engine over HTTP. ``instance`` and ``model`` name it in errors and bodies."""

    def __init__(
        self,
        instance: str,
        url: str,
        model: str,
        *,
        connect_s: float,
        stall_s: float,
        secret: str = "",
        api_key: str = "",
        engine_id: str = "",
    ) -> None:
        headers = {}
        if secret:
            headers["x-tidegate-secret"] = secret
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self.instance = instance
        self.model = model
        self.engine_id = engine_id
        self._internal = bool(secret)
        self._wire = Wire(url, connect_s=connect_s, stall_s=stall_s, headers=headers)

    async def run(self, leg: Leg, sink: TokensSink, *, deadline_s: float) -> LegEnd:
        """A leg that pins is answered in one piece, any other is streamed."""
        path = "/v1/completions" if leg.messages is None else "/v1/chat/completions"
        body = orjson.dumps(self._body(leg))
        stage = "prefill" if leg.pin else "decode"
        try:
            if leg.pin:
                answer = await self._wire.exchange("POST", path, body, deadline_s=deadline_s)
                self._check(answer, leg, stage)
                return self._whole_answer(answer.body, leg, sink)
            stream = _StreamReader(leg, sink, self.instance)
            answer = await self._wire.exchange("POST", path, body, sink=stream.feed, deadline_s=deadline_s)
            self._check(answer, leg, stage)
            return stream.end()
        except EngineError as error:
            error.instance = error.instance or self.instance
            error.stage = error.stage or stage
            raise

    async def tokenise(
        self, prompt: list[int] | str | None, messages: list[Json] | None, sampling: Json
    ) -> list[int] | None:
        return None

    async def ask(self, path: str, body: bytes, *, deadline_s: float) -> bytes:
        answer = await self._wire.exchange("POST", path, body, deadline_s=deadline_s)
        if answer.status != 200:
            raise _refusal(answer, self.instance, "")
        return answer.body

    def refuses(self, handle: KvHandle) -> str | None:
        """Engines of one launch check every handle themselves."""
        return None

    def owner_gone(self, owner: str) -> None:
        """Pulls of engines of one launch notice at once."""

    async def decline(self, handle: KvHandle) -> None:
        """Engines of one launch are asked themselves, by ``release``."""

    async def release(self, handle: KvHandle) -> None:
        await self.release_request(str(handle.params.get("remote_request_id")))

    async def release_request(self, request_id: str) -> None:
        if not self._internal:
            return
        body = orjson.dumps({"request_id": request_id})
        try:
            await self._wire.exchange("POST", "/tidegate/release", body, deadline_s=2.0)
        except EngineError:
            return

    def close(self, reason: str) -> None:
        self._wire.drop(reason)

    def _body(self, leg: Leg) -> Json:
        body: Json = {
            **leg.sampling,
            "model": self.model,
            "request_id": leg.request_id,
            "return_token_ids": True,
        }
        if leg.max_tokens is not None:
            body["max_tokens"] = leg.max_tokens
        kv = self._kv_params(leg)
        if leg.messages is None:
            body["prompt"] = leg.prompt
        else:
            body["messages"] = leg.messages
            if leg.prompt is not None:
                kv["prompt_token_ids"] = leg.prompt
        if leg.salt:
            body["cache_salt"] = leg.salt
        if kv:
            body["kv_transfer_params"] = kv
        if not leg.pin:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        return body

    def _kv_params(self, leg: Leg) -> Json:
        kv: Json = {}
        if leg.handle is not None:
            kv.update(leg.handle.params)
            kv.update(do_remote_prefill=not leg.pin, do_remote_decode=leg.pin)
        elif leg.pin:
            kv.update(WANT_HANDLE)
        if leg.generated:
            kv["tidegate_generated"] = leg.generated
        if leg.ticket is not None:
            kv["tidegate_ticket"] = leg.ticket._asdict()
        return kv

    def _handle(self, params: Json | None, leg: Leg, prompt_tokens: int, tokens: Tokens) -> KvHandle | None:
        """Return the handle in the answer of a leg that pins, which brought ``tokens``."""
        return KvHandle(params, self.engine_id, prompt_tokens) if params else None

    def _check(self, answer: HttpAnswer, leg: Leg, stage: str) -> None:
        if answer.status == 200:
            return
        refusal = _refusal(answer, self.instance, stage)
        if isinstance(refusal, ClientError) and (leg.generated or leg.handle is not None):
            # The client's own request passed before: what is refused is what the gateway made of it.
            raise EngineFault(
                f"refused a continued leg: {refusal.message}", instance=self.instance, stage=stage
            )
        raise refusal

    def _whole_answer(self, raw: bytes, leg: Leg, sink: TokensSink) -> LegEnd:
        try:
            body = orjson.loads(raw)
            choice = body["choices"][0]
            tokens = _tokens(choice, leg.messages is not None)
            tokens.prompt_token_ids = body.get("prompt_token_ids") or choice.get("prompt_token_ids")
            times = _times(body)
            params = body.get("kv_transfer_params")
        except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineFault(f"the engine's answer is malformed: {error!r}") from None
        if tokens.finish_reason in ("abort", "error"):
            raise EngineUnreachable("the engine aborted the leg")
        if not tokens.token_ids or tokens.prompt_token_ids is None:
            raise EngineFault("the engine does not return token ids")
        sink.tokens(tokens)
        return LegEnd(self._handle(params, leg, len(tokens.prompt_token_ids), tokens), times)


class _StreamReader:
    """Reads a streamed answer."""

    __slots__ = ("_chat", "_facts", "_finished", "_instance", "_parser", "_sink", "_started", "_stopped")

    def __init__(self, leg: Leg, sink: TokensSink, instance: str) -> None:
        self._parser = SseParser()
        self._sink = sink
        self._chat = leg.messages is not None
        self._instance = instance
        self._started = self._finished = self._stopped = False
        self._facts: Json = {}

    def feed(self, data: bytes) -> bool:
        """Deliver the tokens in ``data``; return whether the sink ends the leg. Raises EngineFault for an
        error event or a malformed one."""
        for payload in self._parser.feed(data):
            if payload == b"[DONE]":
                continue
            try:
                event = orjson.loads(payload)
                choice: Json = event["choices"][0] if event.get("choices") else {}
                if (
                    self._started
                    and choice
                    and choice["finish_reason"] is None
                    and choice["logprobs"] is None
                    and (not self._chat or choice["delta"].keys() == ONLY_CONTENT)
                ):
                    text = choice["delta"]["content"] if self._chat else choice["text"]
                    token_ids, tokens = choice["token_ids"], None
                else:
                    token_ids, tokens = None, self._read(event, choice)
            except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError):
                raise EngineFault(
                    f"the engine sent a malformed event: {payload[:80]!r}", instance=self._instance
                ) from None
            if token_ids:
                stop = self._sink.plain(text, token_ids)
            else:
                stop = tokens is not None and self._sink.tokens(tokens)
            if stop:
                self._stopped = True
                return True
        return False

    def _read(self, event: Json, choice: Json) -> Tokens | None:
        """Read any event; None when it has nothing to deliver."""
        self._started = True
        if "error" in event:
            raise EngineFault(error_text(event), instance=self._instance)
        for name in ("metrics", "usage"):  # which may come in one event or in two
            if event.get(name):
                self._facts[name] = event[name]
        if not choice:
            return None
        tokens = _tokens(choice, self._chat)
        if tokens.prompt_token_ids is None:
            tokens.prompt_token_ids = event.get("prompt_token_ids")
        if tokens.finish_reason in ("abort", "error"):
            raise EngineUnreachable("the engine aborted the leg", instance=self._instance)
        self._finished = self._finished or tokens.finish_reason is not None
        if tokens.text and not tokens.token_ids and tokens.finish_reason is None:
            raise EngineFault("the engine sends text without token ids", instance=self._instance)
        useful = tokens.token_ids or tokens.prompt_token_ids or tokens.finish_reason is not None
        return tokens if useful else None

    def end(self) -> LegEnd:
        """Return the leg's end. Raises EngineUnreachable when the stream broke off by itself."""
        if not self._finished and not self._stopped:
            raise EngineUnreachable("the stream ended without a finish reason", instance=self._instance)
        return LegEnd(times=_times(self._facts))


def _tokens(choice: Json, chat: bool) -> Tokens:
    text, delta = choice.get("text"), None
    if chat:
        part = choice.get("delta") or choice.get("message") or {}
        text = part.get("content")
        delta = {name: value for name, value in part.items() if value and name not in ("role", "content")}
    return Tokens(
        text or "",
        choice.get("token_ids") or [],
        choice.get("logprobs"),
        choice.get("finish_reason"),
        choice.get("stop_reason"),
        choice.get("prompt_token_ids"),
        delta or None,
    )


def _times(event: Json) -> LegTimes:
    """Read an answer's times, and how much of its prompt was in a cache, from ``metrics`` and ``usage``."""
    metrics: Json = event.get("metrics") or {}
    usage: Json = event.get("usage") or {}

    def seconds(name: str) -> float | None:
        value = metrics.get(name)
        return None if value is None else float(value) / 1000.0

    cached = metrics.get("cached_tokens")
    if cached is None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return LegTimes(
        queue_s=seconds("queue_time_ms"),
        kv_load_s=seconds("kv_load_time_ms"),
        prefill_s=seconds("prefill_time_ms"),
        kv_loaded_tokens=int(metrics.get("kv_loaded_tokens") or 0),
        kv_loaded_bytes=int(metrics.get("kv_loaded_bytes") or 0),
        cached_tokens=int(cached or 0),
    )


def _refusal(answer: HttpAnswer, instance: str, stage: str) -> ClientError | EngineFault:
    """Turn an error answer into the client's error (the engine names a field) or the engine's own."""
    try:
        body = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        body = None
    body = body if isinstance(body, dict) else {}
    message = error_text(body, f"HTTP {answer.status}")
    error: Any = body.get("error")
    param = error.get("param") if isinstance(error, dict) else None
    if answer.status == 404:
        return UnknownModel(message, param=param)
    if answer.status in (400, 413, 422):
        if isinstance(error, dict) and error.get("code") == "context_length_exceeded":
            return PromptTooLong(message, param=param)
        return BadRequest(message, param=param)
    return EngineFault(f"HTTP {answer.status}: {message}", instance=instance, stage=stage)
