"""The adapter for engines that speak vLLM's HTTP dialect: the embedded engine, and vLLM itself."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import orjson
from msgspec import UNSET

from tidegate.core.errors import (
    STATUS,
    BadRequest,
    ClientError,
    EngineBusy,
    EngineError,
    EngineFault,
    EngineUnreachable,
    NoDescriptors,
    PromptTooLong,
    UnknownModel,
)
from tidegate.engines.answers import AnswerMetrics, AnswerUsage, decode_answer, leg_times
from tidegate.engines.seam import Json, KvHandle, Leg, LegEnd, TokensSink
from tidegate.engines.wire import HttpAnswer, Wire
from tidegate.protocol.chunks import SseParser, Tokens, error_text


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    content: str


class _PlainCompletion(msgspec.Struct):
    text: str
    token_ids: list[int]
    finish_reason: None
    logprobs: None


class _PlainChat(msgspec.Struct):
    delta: _Content
    token_ids: list[int]
    finish_reason: None
    logprobs: None


class _CompletionEvent(msgspec.Struct):
    choices: tuple[_PlainCompletion]
    remaining_tokens: None = None


class _ChatEvent(msgspec.Struct):
    choices: tuple[_PlainChat]
    remaining_tokens: None = None


# Of events that are only text and ids, as nearly all are; msgspec makes no objects of the other fields.
_PLAIN: dict[bool, msgspec.json.Decoder[Any]] = {
    chat: msgspec.json.Decoder(kind) for chat, kind in ((False, _CompletionEvent), (True, _ChatEvent))
}
REFUSED = (400, 404, 413, 422, 501)
"""Statuses that are about the request; 501 is what vLLM says of a field that a server does not support."""
BUSY = (429, 503)
BUSY_S = 1.0
"""What a client is told to wait when every engine is busy (ours)."""
TOKENISE_S = 2.0
"""How long an engine may take to tokenise a prompt (ours)."""
RELEASE_S = 30.0
"""How long a release is tried (ours): a busy engine takes seconds to answer, and then leases end."""
RELEASE_RETRY_S = 0.5
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
        path = "/v1/completions" if leg.messages is None else "/v1/chat/completions"
        body = orjson.dumps(self._body(leg))
        stage = "prefill" if leg.pin else "decode"
        try:
            if leg.whole:
                answer = await self._wire.exchange("POST", path, body, deadline_s=deadline_s)
                self._check(answer, leg)
                return self._whole_answer(answer.body, leg, sink)
            stream = _StreamReader(leg, sink, self.instance)
            answer = await self._wire.exchange("POST", path, body, sink=stream.feed, deadline_s=deadline_s)
            self._check(answer, leg)
            return stream.end()
        except EngineError as error:
            error.instance = error.instance or self.instance
            error.stage = error.stage or stage
            raise

    async def tokenise(
        self, prompt: list[int] | str | None, messages: list[Json] | None, sampling: Json
    ) -> list[int] | None:
        asked = {"prompt": prompt} if messages is None else {"messages": messages}
        return await self._tokens_of("/tokenize", {"model": self.model, **asked}, "tokens")

    async def _tokens_of(self, path: str, body: Json, field: str) -> list[int] | None:
        """Return the ids in ``field`` of a question's answer, or of its first item; None without."""
        answer = await self._wire.exchange("POST", path, orjson.dumps(body), deadline_s=TOKENISE_S)
        if answer.status != 200:
            return None
        try:
            told = orjson.loads(answer.body)
            ids: list[int] = (told[0] if isinstance(told, list) else told)[field]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            return None
        return ids

    async def ask(self, path: str, body: bytes, *, deadline_s: float) -> bytes:
        answer = await self._wire.exchange("POST", path, body, deadline_s=deadline_s)
        if answer.status != 200:
            raise refusal(_error_body(answer), None, answer.status)
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
        clock = asyncio.get_running_loop().time
        until_s = clock() + RELEASE_S
        while not self._wire.dropped and (left_s := until_s - clock()) > 0:
            try:
                await self._wire.exchange("POST", "/tidegate/release", body, deadline_s=left_s)
                return
            except (EngineError, NoDescriptors):
                await asyncio.sleep(RELEASE_RETRY_S)

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
        if not leg.whole:
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
            known, unsaid = leg.ticket._asdict().items(), leg.ticket._field_defaults
            kv["tidegate_ticket"] = {name: given for name, given in known if given != unsaid.get(name)}
        if leg.movable:
            kv["tidegate_movable"] = True
        if leg.follows is not None:
            kv["tidegate_follows"] = msgspec.structs.asdict(leg.follows)
        return kv

    def _handle(self, params: Json | None, leg: Leg, prompt_tokens: int, tokens: Tokens) -> KvHandle | None:
        """Return the handle in the answer of a leg that pins, which brought ``tokens``."""
        return KvHandle(params, self.engine_id, prompt_tokens) if params else None

    def _check(self, answer: HttpAnswer, leg: Leg) -> None:
        if answer.status == 200:
            return
        raise refusal(_error_body(answer), leg, answer.status)

    def _whole_answer(self, raw: bytes, leg: Leg, sink: TokensSink) -> LegEnd:
        try:
            answer = decode_answer(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EngineFault(f"the engine's answer is malformed: {error}") from None
        if answer.error:
            raise refusal(orjson.loads(raw), leg)
        tokens = answer.tokens(leg.messages is not None)
        if tokens is None:
            raise EngineFault("the engine's answer is malformed: it has no choices")
        if tokens.finish_reason in ("abort", "error"):
            raise EngineUnreachable("the engine aborted the leg")
        if not tokens.token_ids or tokens.prompt_token_ids is None:
            raise EngineFault("the engine does not return token ids")
        sink.tokens(tokens)
        length, handle = len(tokens.prompt_token_ids), None
        if leg.pin:
            handle = self._handle(answer.kv_transfer_params, leg, length, tokens)
        return LegEnd(handle, leg_times(answer.metrics, answer.usage))


class _StreamReader:
    """Reads a streamed answer."""

    __slots__ = (
        *("_chat", "_finished", "_instance", "_leg", "_logprobs", "_metrics", "_parser", "_plain", "_sink"),
        *("_started", "_stopped", "_usage"),
    )

    def __init__(self, leg: Leg, sink: TokensSink, instance: str) -> None:
        self._parser = SseParser()
        self._sink = sink
        self._leg = leg
        self._chat = leg.messages is not None
        self._plain = _PLAIN[self._chat].decode
        self._logprobs = bool(leg.sampling.get("logprobs"))
        self._instance = instance
        self._started = self._finished = self._stopped = False
        self._metrics: AnswerMetrics | None = None
        self._usage: AnswerUsage | None = None

    def feed(self, data: bytes) -> bool:
        """Deliver the tokens in ``data``; return whether the sink ends the leg. Raises what ``refusal`` makes
        of an error event, and EngineFault for a malformed one."""
        for payload in self._parser.feed(data):
            if payload == b"[DONE]":
                continue
            if self._started and not self._logprobs:
                try:
                    (choice,) = self._plain(payload).choices
                except (msgspec.DecodeError, ValueError):
                    pass
                else:
                    text = choice.delta.content if self._chat else choice.text
                    if choice.token_ids and self._sink.plain(text, choice.token_ids):
                        self._stopped = True
                        return True
                    continue
            tokens = self._read(payload)
            if tokens is not None and self._sink.tokens(tokens):
                self._stopped = True
                return True
        return False

    def _read(self, payload: bytes) -> Tokens | None:
        """Read any event; None when it has nothing to deliver."""
        try:
            event = decode_answer(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise EngineFault(
                f"the engine sent a malformed event: {payload[:80]!r}", instance=self._instance
            ) from None
        self._started = True
        if event.error is not UNSET:
            raise refusal(orjson.loads(payload), self._leg)
        # Both may come in one event or in two.
        self._metrics, self._usage = event.metrics or self._metrics, event.usage or self._usage
        tokens = event.tokens(self._chat)
        if tokens is None:
            return None
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
        return LegEnd(None, leg_times(self._metrics, self._usage))


def _error_body(answer: HttpAnswer) -> Json:
    try:
        body = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def refusal(
    answer: Json, leg: Leg | None, status: int | None = None
) -> ClientError | EngineFault | EngineBusy:
    """Turn an error answer, or an error event, into the client's error or the engine's own.

    vLLM checks some fields only after it has begun a stream, and then says in an event what it would have
    said with a status. What refuses a leg that goes on is the engine's error where it is about what
    the gateway put there: that leg's prompt and handle, instead of fields of the client.
    """
    error: Any = answer.get("error")
    error = error if isinstance(error, dict) else {}
    code, param = error.get("code"), error.get("param")
    if status is None:
        own = (row.http for row in STATUS.values() if row.code == code)
        status = code if isinstance(code, int) else next(own, 500)
    message = error_text(answer, f"HTTP {status}")
    if status in BUSY:
        busy = EngineBusy(message)
        busy.retry_after_s = BUSY_S
        return busy
    if status not in REFUSED:
        return EngineFault(f"HTTP {status}: {message}")
    too_long = code == STATUS[PromptTooLong].code or "maximum context length" in message
    if leg is not None and (leg.generated or leg.handle is not None):
        ours = param and str(param).split(".")[0] not in leg.sampling
        if too_long or status == 404 or ours:
            return EngineFault(f"refused a continued leg: {message}")
    if status == 404:
        return UnknownModel(message, param=param)
    return PromptTooLong(message, param=param) if too_long else BadRequest(message, param=param)
