"""What the client reads: OpenAI bodies and chunks, built from the legs' tokens."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Protocol

import orjson
from aiohttp.web import StreamResponse

from tidegate.engines.seam import Tokens
from tidegate.gateway.call import Call
from tidegate.gateway.client_stream import ClientStream
from tidegate.protocol.sse import DONE

Json = dict[str, Any]


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    """Return OpenAI ``usage``."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def text_offsets(tokens: list[str], start: int) -> list[int]:
    """Return where each token's text begins when the first one begins at ``start`` characters."""
    return list(accumulate((len(token) for token in tokens[:-1]), initial=start)) if tokens else []


def joined(said: Any, more: Any) -> Any:
    """Return what a streamed message says of a field, with another delta's part: text appended, tool calls
    put together by their index. Anything else is replaced."""
    if isinstance(said, str) and isinstance(more, str):
        return said + more
    if isinstance(more, list) and all(isinstance(item, dict) and "index" in item for item in more):
        calls: list[Json] = list(said or [])
        for item in more:
            at = next((i for i, call in enumerate(calls) if call.get("index") == item["index"]), None)
            if at is None:
                calls.append(item)
            else:
                calls[at] = joined(calls[at], item)
        return calls
    if isinstance(said, dict) and isinstance(more, dict):
        kept = ("id", "type", "name", "index")
        return said | {
            name: value if name in kept else joined(said.get(name), value)
            for name, value in more.items()
            if value is not None
        }
    return more


class ChunkWriter:
    """Turns tokens into the SSE events of one streamed answer.

    The parts of an event that do not change are encoded once; a piece costs one string encoding.
    """

    __slots__ = ("_after", "_before", "_call", "_chars", "_head", "_opened", "_usage_null")

    def __init__(self, call: Call, model: str) -> None:
        self._call = call
        kind = "chat.completion.chunk" if call.chat else "text_completion"
        head = orjson.dumps({"id": call.id, "object": kind, "created": call.created, "model": model})[:-1]
        self._head = b"data: " + head + b',"choices":['
        self._usage_null = b',"usage":null' if call.include_usage else b""
        open_choice = b'{"index":0,"delta":{"content":' if call.chat else b'{"index":0,"text":'
        close_choice = (
            b'},"logprobs":null,"finish_reason":null}]'
            if call.chat
            else (b',"logprobs":null,"finish_reason":null}]')
        )
        self._before = self._head + open_choice
        self._after = close_choice + self._usage_null + b"}\n\n"
        self._opened = not call.chat
        self._chars = 0

    def plain(self, text: str) -> bytes:
        """Return the event of a piece that is only text. Not for the first one of a chat."""
        return self._before + orjson.dumps(text) + self._after

    def piece(self, tokens: Tokens, finish_reason: str | None, prompt_ids: list[int] | None) -> bytes:
        """Return the event(s) for ``tokens``; ``prompt_ids`` goes into the first one when asked for."""
        opening = b""
        if not self._opened:
            self._opened = True
            role = {"role": "assistant", "content": ""}
            opening = self._choice({"index": 0, "delta": role, "logprobs": None, "finish_reason": None})
        call = self._call
        extras = tokens.delta or {}
        if finish_reason is None and tokens.logprobs is None and not call.return_token_ids and not extras:
            return opening + self.plain(tokens.text)
        choice: Json = {"index": 0}
        if call.chat:
            said = {"content": tokens.text} if tokens.text or (finish_reason is None and not extras) else {}
            choice["delta"] = said | extras
            choice["logprobs"] = tokens.logprobs
        else:
            choice["text"] = tokens.text
            choice["logprobs"] = self._placed(tokens.logprobs)
        choice["finish_reason"] = finish_reason
        if finish_reason is not None:
            choice["stop_reason"] = tokens.stop_reason
        if call.return_token_ids:
            choice["token_ids"] = tokens.token_ids
            if prompt_ids is not None:
                choice["prompt_token_ids"] = prompt_ids
        return opening + self._choice(choice)

    def _placed(self, logprobs: Json | None) -> Json | None:
        """Return a completion's logprobs with offsets from the start of the answer, not of the leg."""
        if logprobs is None:
            return None
        tokens = logprobs.get("tokens") or []
        placed = logprobs | {"text_offset": text_offsets(tokens, self._chars)}
        self._chars += sum(map(len, tokens))
        return placed

    def end(self, usage: Json) -> bytes:
        """Return the closing events."""
        if not self._call.include_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n" + DONE

    def _choice(self, choice: Json) -> bytes:
        return self._head + orjson.dumps(choice) + b"]" + self._usage_null + b"}\n\n"


class Answer(Protocol):
    """What a flight delivers to."""

    def tokens(self, tokens: Tokens, finish_reason: str | None, prompt_ids: list[int] | None) -> None:
        """Take a piece; the last one comes with the request's finish reason."""
        ...

    def plain(self, text: str, token_ids: list[int]) -> None:
        """Take a piece that is only text and ids, never the first one."""
        ...


class Streamed:
    """Sends each piece to the client as it comes."""

    __slots__ = ("_client", "_ids_wanted", "_prompt_wanted", "_writer")

    def __init__(self, call: Call, model: str, client: ClientStream) -> None:
        self._writer = ChunkWriter(call, model)
        self._client = client
        self._ids_wanted = self._prompt_wanted = call.return_token_ids

    def tokens(self, tokens: Tokens, finish_reason: str | None, prompt_ids: list[int] | None) -> None:
        """See ``Answer.tokens``."""
        self._client.send(
            self._writer.piece(tokens, finish_reason, prompt_ids if self._prompt_wanted else None)
        )
        self._prompt_wanted = False

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``Answer.plain``."""
        if self._ids_wanted:
            self.tokens(Tokens(text, token_ids), None, None)
        else:
            self._client.send(self._writer.plain(text))

    async def finish(self, usage: Json) -> StreamResponse:
        """Send the closing events and end the answer."""
        return await self._client.finish(self._writer.end(usage))


class Collected:
    """Gathers the tokens of an answer that is sent in one piece."""

    __slots__ = ("_extras", "_logprobs", "_texts")

    def __init__(self) -> None:
        self._extras: Json = {}
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def tokens(self, tokens: Tokens, finish_reason: str | None, prompt_ids: list[int] | None) -> None:
        """See ``Answer.tokens``."""
        self._texts.append(tokens.text)
        if tokens.logprobs:
            self._logprobs.append(tokens.logprobs)
        for name, value in (tokens.delta or {}).items():
            self._extras[name] = joined(self._extras.get(name), value)

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``Answer.plain``."""
        self._texts.append(text)

    def body(
        self,
        call: Call,
        model: str,
        *,
        finish_reason: str | None,
        stop_reason: int | str | None,
        usage: Json,
        token_ids: list[int],
        prompt_ids: list[int] | None,
    ) -> bytes:
        """Encode the whole answer."""
        text = "".join(self._texts)
        choice: Json = {"index": 0}
        if call.chat:
            content = text if text or not self._extras else None
            choice["message"] = {"role": "assistant", "content": content, **self._extras}
            choice["logprobs"] = self._chat_logprobs()
        else:
            choice["text"] = text
            choice["logprobs"] = self._completion_logprobs()
        choice |= {"finish_reason": finish_reason, "stop_reason": stop_reason}
        if call.return_token_ids:
            choice |= {"token_ids": token_ids, "prompt_token_ids": prompt_ids}
        return orjson.dumps(
            {
                "id": call.id,
                "object": "chat.completion" if call.chat else "text_completion",
                "created": call.created,
                "model": model,
                "choices": [choice],
                "usage": usage,
            }
        )

    def _chat_logprobs(self) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [row for part in self._logprobs for row in part.get("content") or []]}

    def _completion_logprobs(self) -> Json | None:
        if not self._logprobs:
            return None
        merged: Json = {
            key: [row for part in self._logprobs for row in part.get(key) or []]
            for key in ("tokens", "token_logprobs", "top_logprobs")
        }
        return merged | {"text_offset": text_offsets(merged["tokens"], 0)}
