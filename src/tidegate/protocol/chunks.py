"""Answers of completions and chat: pieces, the chunks of a stream, bodies that are sent whole, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import msgspec
import orjson

from tidegate.core.errors import TidegateError, status_of

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
MIGRATED = "migrated"
"""The finish reason of a leg whose decode another instance has taken over; no client sees it."""


class MovedDecode(msgspec.Struct, frozen=True):
    """How a running decode came to another instance: behind ``generated`` output tokens of all legs, in
    ``stages`` copies, the last of which it paused for, with ``moved_bytes`` of KV."""

    generated: int
    stages: int
    moved_bytes: int


class Tokens(msgspec.Struct):
    """New tokens of an answer. The last piece has ``finish_reason``. ``logprobs`` are in the form of the
    endpoint: OpenAI's for completions or for chat. ``prompt_token_ids`` is for the first piece."""

    text: str
    token_ids: list[int]
    logprobs: Json | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None
    delta: Json | None = None
    """What a chat's message has beside its content: tool calls, reasoning."""
    prompt_logprobs: list[Any] | None = None
    """One item for each token of the prompt, for the last piece of an answer that is sent whole."""
    forecast: tuple[int, float] | None = None
    """What the engine predicts: so many output tokens of all legs, and how many follow. Never sent on."""
    moved: MovedDecode | None = None
    """Of the first piece of a leg that took a running decode over. Never sent on."""


class AnswerHead(msgspec.Struct, frozen=True):
    """What does not change in an answer, and what its client wants in it. ``created`` is in Unix seconds.
    With ``usage_so_far`` every chunk tells the usage of its choice up to there."""

    id: str
    created: int
    model: str
    chat: bool
    return_token_ids: bool = False
    include_usage: bool = False
    usage_so_far: bool = False


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    """Return OpenAI ``usage``."""
    counts = _counts(prompt_tokens, completion_tokens)
    return counts | {"prompt_tokens_details": {"cached_tokens": cached_tokens}}


def _counts(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class ChunkWriter:
    """Writes the events of one choice of a streamed answer; what does not change in them is encoded once.

    A chat's piece that shows nothing has no event: a parser of tool calls reads many tokens in silence.

    With ``return_token_ids`` the prompt's ids come where vLLM has them: in a completion's first choice,
    beside the choices of a chat's first chunk.
    """

    __slots__ = (
        *("_after_ids", "_after_text", "_before", "_chars", "_chat", "_generated", "_head", "_ids", "_index"),
        *("_opened", "_prompt_tokens", "_so_far", "_tail", "_usage"),
    )

    def __init__(self, head: AnswerHead, index: int = 0) -> None:
        self._index, self._so_far = index, head.usage_so_far
        self._prompt_tokens = self._generated = 0
        self._chat, self._ids, self._usage = head.chat, head.return_token_ids, head.include_usage
        kind = "chat.completion.chunk" if head.chat else "text_completion"
        fields = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
        self._head = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['
        self._tail = (b',"usage":null' if head.include_usage else b"") + b"}\n\n"
        text_of = b'"delta":{"content":' if head.chat else b'"text":'
        self._before = self._head + b'{"index":%d,' % index + text_of
        self._after_ids = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._after_text = b"}" if head.chat else b""
        self._after_text += b',"token_ids":' if self._ids else self._after_ids
        self._opened = False
        self._chars = 0

    def plain(self, text: str, token_ids: list[int]) -> bytes:
        """Return the event of a piece that is only text and ids, and not the first one."""
        if self._so_far:
            return self.piece(Tokens(text, token_ids))
        data = self._before + orjson.dumps(text) + self._after_text
        return data + orjson.dumps(token_ids) + self._after_ids if self._ids else data

    def piece(self, tokens: Tokens, more: Json | None = None) -> bytes:
        """Return the event of any piece, behind that of the role if it is a chat's first; ``more`` is put
        beside its choices."""
        opening, extras = b"", tokens.delta or {}
        prompt_ids = None if self._opened or not self._ids else tokens.prompt_token_ids
        self._prompt_tokens = self._prompt_tokens or len(tokens.prompt_token_ids or ())
        if self._chat and not self._opened:
            role = {"role": "assistant", "content": ""}
            choice: Json = {"index": self._index, "delta": role, "logprobs": None, "finish_reason": None}
            opening = self._event(choice, None if prompt_ids is None else {"prompt_token_ids": prompt_ids})
            prompt_ids = None
        self._opened = True
        self._generated += len(tokens.token_ids)
        if (
            tokens.finish_reason is None
            and tokens.logprobs is None
            and more is None
            and prompt_ids is None
            and not extras
        ):
            if self._chat and not tokens.text and not self._ids:
                return opening
            if not self._so_far:
                return opening + self.plain(tokens.text, tokens.token_ids)
        choice = {"index": self._index}
        if self._chat:
            goes_on = tokens.finish_reason is None and not extras
            delta = ({"content": tokens.text} if tokens.text or goes_on else {}) | extras
            choice |= {"delta": delta, "logprobs": tokens.logprobs}
        else:
            choice |= {"text": tokens.text, "logprobs": self._placed(tokens.logprobs)}
        choice["finish_reason"] = tokens.finish_reason
        if tokens.finish_reason is not None:
            choice["stop_reason"] = tokens.stop_reason
        if self._ids:
            choice["token_ids"] = tokens.token_ids
        if prompt_ids is not None:
            choice["prompt_token_ids"] = prompt_ids
        return opening + self._event(choice, more)

    def end(self, usage: Json) -> bytes:
        """Return the closing events."""
        if not self._usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n" + DONE

    def _placed(self, logprobs: Json | None) -> Json | None:
        """Return a completion's logprobs with offsets, in characters, from the start of the answer."""
        if logprobs is None:
            return None
        placed = _with_offsets(logprobs, self._chars)
        self._chars += sum(map(len, logprobs.get("tokens") or []))
        return placed

    def _event(self, choice: Json, more: Json | None) -> bytes:
        beside, tail = b"" if more is None else b"," + orjson.dumps(more)[1:-1], self._tail
        if self._so_far:
            tail = b',"usage":' + orjson.dumps(_counts(self._prompt_tokens, self._generated)) + b"}\n\n"
        return self._head + orjson.dumps(choice) + b"]" + beside + tail


class WholeAnswer:
    """Gathers the pieces of one choice of an answer that is sent whole. ``token_ids`` are those that came so
    far."""

    __slots__ = ("_extras", "_head", "_index", "_last", "_logprobs", "_texts", "token_ids")

    def __init__(self, head: AnswerHead, index: int = 0) -> None:
        self.token_ids: list[int] = []
        self._head, self._index = head, index
        self._extras: Json = {}
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._last = Tokens("", [])

    def tokens(self, tokens: Tokens) -> None:
        """Take any piece."""
        self.plain(tokens.text, tokens.token_ids)
        if tokens.logprobs:
            self._logprobs.append(tokens.logprobs)
        for name, value in (tokens.delta or {}).items():
            self._extras[name] = joined_delta(self._extras.get(name), value)
        self._last = tokens

    def plain(self, text: str, token_ids: list[int]) -> None:
        """Take a piece that is only text and ids."""
        self._texts.append(text)
        self.token_ids += token_ids

    def body(self, usage: Json, prompt_ids: list[int] | None, more: Json | None = None) -> bytes:
        """Encode an answer of this choice alone; ``more`` is put beside its choices."""
        return whole_body(self._head, [self.choice(prompt_ids)], usage, more)

    def choice(self, prompt_ids: list[int] | None) -> Json:
        """Return the choice as it ended with the last piece."""
        head, text = self._head, "".join(self._texts)
        choice: Json = {"index": self._index}
        if head.chat:
            content = text if text or not self._extras else None
            choice["message"] = {"role": "assistant", "content": content, **self._extras}
            for call in self._extras.get("tool_calls") or ():
                call.pop("index", None)
        else:
            choice["text"] = text
        choice |= {
            "logprobs": self._all_logprobs(),
            "finish_reason": self._last.finish_reason,
            "stop_reason": self._last.stop_reason,
        }
        if self._last.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._last.prompt_logprobs
        if head.return_token_ids:
            choice |= {"token_ids": self.token_ids, "prompt_token_ids": prompt_ids}
        return choice

    def _all_logprobs(self) -> Json | None:
        if not self._logprobs:
            return None
        names = ("content",) if self._head.chat else ("tokens", "token_logprobs", "top_logprobs")
        rows: Json = {name: [r for part in self._logprobs for r in part.get(name) or []] for name in names}
        return rows if self._head.chat else _with_offsets(rows, 0)


def whole_body(head: AnswerHead, choices: Sequence[Json], usage: Json, more: Json | None = None) -> bytes:
    """Encode an answer; ``more`` is put beside its choices. A chat has what is its prompt's there, too."""
    answer: Json = {
        "id": head.id,
        "object": "chat.completion" if head.chat else "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage,
        **(more or {}),
    }
    for name in ("prompt_token_ids", "prompt_logprobs") if head.chat else ():
        if name in choices[0]:
            answer[name], *_ = [choice.pop(name, None) for choice in choices]
    return orjson.dumps(answer)


def _with_offsets(logprobs: Json, start: int) -> Json:
    """Return a completion's logprobs with where each token's text begins, the first one's at ``start``."""
    lengths = list(map(len, logprobs.get("tokens") or []))
    return logprobs | {"text_offset": list(accumulate(lengths[:-1], initial=start)) if lengths else []}


def joined_delta(so_far: Any, more: Any) -> Any:
    """Return a streamed message's field with the part of another delta: text is appended, tool calls are put
    together by their index, anything else is replaced."""
    if isinstance(so_far, str) and isinstance(more, str):
        return so_far + more
    if isinstance(more, list) and all(isinstance(item, dict) and "index" in item for item in more):
        calls: list[Json] = list(so_far or [])
        for item in more:
            at = next((i for i, call in enumerate(calls) if call.get("index") == item["index"]), None)
            if at is None:
                calls.append(item)
            else:
                calls[at] = joined_delta(calls[at], item)
        return calls
    if isinstance(so_far, dict) and isinstance(more, dict):
        kept = ("id", "type", "name", "index")
        return so_far | {
            name: value if name in kept else joined_delta(so_far.get(name), value)
            for name, value in more.items()
            if value is not None
        }
    return more


def error_body(error: TidegateError) -> bytes:
    """Encode ``{"error": {message, type, param, code}}`` for ``error``."""
    row = status_of(error)
    fields = {"message": error.message, "type": row.type, "param": error.param, "code": row.code}
    return orjson.dumps({"error": fields})


def error_text(answer: Mapping[str, Any], otherwise: str = "no message") -> str:
    """Return the words of an error answer in OpenAI's form, or nearly so; ``otherwise`` when it has none."""
    error = answer.get("error") or answer.get("message") or otherwise
    return str((error.get("message") or otherwise) if isinstance(error, dict) else error)


def event(payload: bytes) -> bytes:
    """Frame one JSON payload as an event."""
    return b"data: " + payload + b"\n\n"


def http_chunk(data: bytes) -> bytes:
    """Frame bytes as a chunk of an HTTP/1.1 body with chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class SseParser:
    """Cuts a byte stream into the payloads of its ``data:`` lines. Accepts LF and CRLF line ends and ignores
    comments and other fields. One data line per event, as every OpenAI-style server sends. ``feed`` keeps an
    incomplete last line for the next call."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads completed by ``data``, in order; ``b"[DONE]"`` is returned as such."""
        if self._rest:
            data = self._rest + data
        elif data.startswith(b"data: ") and data.endswith(b"\n\n"):
            if data.find(b"\n") == len(data) - 2:
                return [data[6:-2]]  # One event and nothing else: nearly every read of a token stream.
            found = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(found) and b"\r" not in data:
                return found
        lines = data.split(b"\n")
        self._rest = lines.pop()
        found = []
        for line in lines:
            if line.startswith(b"data:"):
                found.append(line[5:].strip())
        return found
