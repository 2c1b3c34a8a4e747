"""What an engine answers in vLLM's form: a whole answer, or one event of a streamed one."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from tidegate.engines.seam import Json, LegTimes
from tidegate.protocol.chunks import MovedDecode, Tokens


class _Choice(Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    logprobs: Json | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None
    delta: Json | None = None
    message: Json | None = None


class _PromptDetails(Struct):
    cached_tokens: float | None = None


class AnswerUsage(Struct):
    """The part of ``usage`` that is read."""

    prompt_tokens_details: _PromptDetails | None = None


class AnswerMetrics(Struct):
    """Our own engines' ``metrics``."""

    queue_time_ms: float | None = None
    kv_load_time_ms: float | None = None
    prefill_time_ms: float | None = None
    kv_loaded_tokens: float | None = None
    kv_loaded_bytes: float | None = None
    cached_tokens: float | None = None


class EngineAnswer(Struct):
    """A whole answer or one event. ``error`` is UNSET where there is no such field."""

    choices: list[_Choice] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None
    kv_transfer_params: Json | None = None
    metrics: AnswerMetrics | None = None
    usage: AnswerUsage | None = None
    at_token: int | None = None
    remaining_tokens: float | None = None
    tidegate_moved: MovedDecode | None = None
    error: Any | UnsetType = UNSET

    def tokens(self, chat: bool) -> Tokens | None:
        """Return what its first choice brings; None without choices. What is the prompt's comes with it."""
        if not self.choices:
            return None
        choice, delta = self.choices[0], None
        text = choice.text
        if chat:
            part = choice.delta or choice.message or {}
            text = part.get("content")
            delta = {name: value for name, value in part.items() if value and name not in ("role", "content")}
        forecast = None
        if self.remaining_tokens is not None and self.at_token is not None:
            forecast = (self.at_token, self.remaining_tokens)
        return Tokens(
            text or "",
            choice.token_ids or [],
            choice.logprobs,
            choice.finish_reason,
            choice.stop_reason,
            self.prompt_token_ids or choice.prompt_token_ids,
            delta or None,
            self.prompt_logprobs or choice.prompt_logprobs,
            forecast,
            self.tidegate_moved,
        )


decode_answer = msgspec.json.Decoder(EngineAnswer).decode
"""Decodes a body or the payload of an event. Raises msgspec.DecodeError, and UnicodeDecodeError for other
bytes than UTF-8."""


def leg_times(metrics: AnswerMetrics | None, usage: AnswerUsage | None) -> LegTimes:
    """Return an answer's times, and how much of its prompt was in a cache."""
    details = None if usage is None else usage.prompt_tokens_details
    cached = 0.0 if details is None else details.cached_tokens
    if metrics is None:
        return LegTimes(cached_tokens=int(cached or 0))
    if metrics.cached_tokens is not None:
        cached = metrics.cached_tokens
    return LegTimes(
        _seconds(metrics.queue_time_ms),
        _seconds(metrics.kv_load_time_ms),
        _seconds(metrics.prefill_time_ms),
        int(metrics.kv_loaded_tokens or 0),
        int(metrics.kv_loaded_bytes or 0),
        int(cached or 0),
    )


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000.0
