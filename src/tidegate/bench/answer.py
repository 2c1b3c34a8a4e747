"""An answer as its client sees it: when each token came, and with what."""

from __future__ import annotations

from array import array
from typing import Any

import orjson

from tidegate.protocol.chunks import DONE, error_text

_DONE = DONE.removeprefix(b"data:").strip()


class BrokenAnswer(Exception):
    """The stream carried an error, was not what it should be, or ended before its end."""


class TimedAnswer:
    """Reads the payloads of a completions or chat stream as they arrive.

    A chunk counts as tokens when it has text, reasoning, tool calls or token ids; in completions
    also when it is empty but not the last (a token that does not complete a character). It counts as
    one, or as many as its usage or its token ids say, which then share the gap. Times are whatever
    clock the caller passes to ``take``. With ``keep`` the answer itself is kept, too: ``text``, and ``ids``
    where the endpoint sends them.
    """

    __slots__ = (
        "_keep", "_pieces", "chat", "chunks", "completion_tokens", "finish_reason", "finish_s", "first_s",
        "gaps_s", "ids", "last_s", "prompt_tokens",
    )  # fmt: skip

    def __init__(self, *, chat: bool, keep: bool = False) -> None:
        self.chat = chat
        self.ids: list[int] = []
        self._keep = keep
        self._pieces: list[str] = []
        self.first_s: float | None = None
        self.last_s = 0.0
        self.gaps_s = array("d")
        self.chunks = 0
        self.finish_reason: str | None = None
        self.finish_s = 0.0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None

    def take(self, payload: bytes, at_s: float) -> None:
        """Account for one payload received at ``at_s``; raises BrokenAnswer."""
        if payload == _DONE:
            return
        try:
            chunk = orjson.loads(payload)
            self._take_chunk(chunk, at_s)
        except (orjson.JSONDecodeError, AttributeError, KeyError, IndexError, TypeError):
            raise BrokenAnswer(f"not a completion chunk: {payload[:120].decode(errors='replace')}") from None

    def _take_chunk(self, chunk: dict[str, Any], at_s: float) -> None:
        error = chunk.get("error")
        if error:
            raise BrokenAnswer(error_text(chunk)[:300])
        before, usage = self.completion_tokens or 0, chunk.get("usage")
        if usage:
            self.prompt_tokens = usage.get("prompt_tokens")
            self.completion_tokens = usage.get("completion_tokens")
        choices = chunk.get("choices")
        if not choices:
            return
        choice = choices[0]
        finish_reason = choice.get("finish_reason")
        if self._keep:
            self.ids += choice.get("token_ids") or ()
            self._pieces.append((choice.get("delta") or {}).get("content") or choice.get("text") or "")
        if self._has_token(choice, finish_reason):
            # Usage that comes with the last event only is that of the whole answer.
            running = usage and before == self.chunks
            told = (self.completion_tokens or 0) - before if running else len(choice.get("token_ids") or ())
            self._token(at_s, max(1, told))
        if finish_reason:
            self.finish_reason, self.finish_s = finish_reason, at_s

    def _has_token(self, choice: dict[str, Any], finish_reason: str | None) -> bool:
        if choice.get("token_ids"):
            return True
        if not self.chat:
            return bool(choice.get("text")) or finish_reason is None
        delta = choice.get("delta") or {}
        return any(delta.get(k) for k in ("content", "reasoning_content", "reasoning", "tool_calls"))

    def _token(self, at_s: float, tokens: int = 1) -> None:
        if self.first_s is None:
            self.first_s = at_s
        else:
            self.gaps_s.extend([(at_s - self.last_s) / tokens] * tokens)
        self.last_s = at_s
        self.chunks += tokens

    def close(self) -> None:
        """Check that the answer is complete, once the stream has ended; raises BrokenAnswer.

        An empty closing chunk stands for a token (the end-of-sequence one) when the server counts
        more tokens than it sent chunks.
        """
        if self.finish_reason is None:
            raise BrokenAnswer("the stream ended without a finish_reason")
        if self.finish_s > self.last_s and (self.completion_tokens or 0) > self.chunks:
            self._token(self.finish_s)
        if self.first_s is None:
            raise BrokenAnswer("the answer holds no token")

    @property
    def text(self) -> str:
        """Return the text that was kept."""
        return "".join(self._pieces)

    @property
    def output_tokens(self) -> int:
        """Return the server's count of tokens, else the number of chunks that carried some."""
        return self.chunks if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot_s(self) -> float | None:
        """Return (last - first)/(tokens - 1), None for one token or none."""
        tokens = self.output_tokens
        return None if self.first_s is None or tokens < 2 else (self.last_s - self.first_s) / (tokens - 1)
