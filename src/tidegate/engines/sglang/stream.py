"""SGLang's native stream, read into tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from tidegate.core.errors import BadRequest, EngineFault, EngineUnreachable, TidegateError
from tidegate.engines.seam import Json, Leg, Tokens
from tidegate.engines.sglang.request import wants_logprobs
from tidegate.protocol.sse import SseParser


class NativeStream:
    """Reads the events of a streamed ``/generate`` and hands each one's new tokens to ``take``.

    By default an event repeats all text and ids from the start of the answer; a server started with
    ``--incremental-streaming-output`` sends what is new. ``completion_tokens`` tells the two apart.
    """

    def __init__(self, leg: Leg, take: Callable[[Tokens], None]) -> None:
        self._parser = SseParser()
        self._take = take
        self._logprobs = wants_logprobs(leg)
        self._stop_ids = frozenset(leg.sampling.get("stop_token_ids") or ())
        self._tokens = self._chars = 0

    def feed(self, data: bytes) -> None:
        """Deliver what is new in ``data``.

        Raises EngineUnreachable when the server aborted the request, BadRequest when it refused it, and
        EngineFault for what cannot be read.
        """
        for payload in self._parser.feed(data):
            if payload == b"[DONE]":
                continue
            try:
                event = orjson.loads(payload)
                tokens = None if "error" in event else self._read(event)
            except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError):
                raise EngineFault(f"the engine sent a malformed event: {payload[:80]!r}") from None
            if tokens is None:
                # A refusal comes as an event behind status 200, since the answer has begun.
                code = 500 if self._tokens else int(_error(event).get("code") or 400)
                raise refusal(code, payload)
            if tokens.finish_reason == "abort":
                raise EngineUnreachable(f"the engine aborted the request: {tokens.stop_reason}")
            if tokens.token_ids or tokens.text or tokens.finish_reason is not None:
                self._take(tokens)

    def _read(self, event: Json) -> Tokens:
        meta, ids = event["meta_info"], event["output_ids"]
        told, total = self._tokens, int(meta["completion_tokens"])
        new = total - told
        if new < 0 or len(ids) not in (new, total):
            raise EngineFault(f"the stream has a gap: {len(ids)} ids with {told} of {total} tokens read")
        text = event["text"]
        if len(ids) == total:
            text, self._chars = text[self._chars :], max(self._chars, len(text))
        self._tokens = total
        reason = meta.get("finish_reason") or {}
        matched = reason.get("matched")
        logprobs = None
        if self._logprobs and new:
            rows = meta["output_token_logprobs"][-new:]
            tops = (meta.get("output_top_logprobs") or [])[-new:]
            logprobs = {
                "tokens": [text for _, _, text in rows],
                "token_logprobs": [logprob for logprob, _, _ in rows],
                "top_logprobs": [{text: logprob for logprob, _, text in top or ()} for top in tops],
            }
        return Tokens(
            text,
            ids[len(ids) - new :],
            logprobs,
            finish_reason=reason.get("type"),
            stop_reason=reason.get("message") or (matched if self._asked_for(matched) else None),
        )

    def _asked_for(self, matched: Any) -> bool:
        """Tell a stop of the request's own from the model's end of text."""
        return isinstance(matched, str) or matched in self._stop_ids


def refusal(status: int, body: bytes) -> TidegateError:
    """Turn an error answer into the client's error (status 400) or the engine's."""
    try:
        error = _error(orjson.loads(body))
    except (orjson.JSONDecodeError, AttributeError):
        error = {}
    message = str(error.get("message") or f"HTTP {status}")
    return BadRequest(message) if status == 400 else EngineFault(f"HTTP {status}: {message}")


def _error(answer: Json) -> Json:
    """Return the object with the message, which some answers wrap and some do not."""
    error = answer.get("error", answer)
    return error if isinstance(error, dict) else {"message": error}
