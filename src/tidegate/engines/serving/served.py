"""The engine core as the HTTP server sees it, and the facts that every answer depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tidegate.engines.serving.types import EngineStats, GenerateRequest


class ServedEngine(Protocol):
    """A running engine. Every method may be called from any thread and returns at once.

    Each submitted request ends with exactly one output that carries a ``finish_reason``, delivered
    to the engine's output sink; aborted ones end with ``abort``.
    """

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. Raises a TidegateError when it can never be served or the engine stops."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request early; an unknown or finished id is ignored."""
        ...

    def release(self, request_id: str) -> bool:
        """Drop a pin; False when there was none."""
        ...

    def stats(self) -> EngineStats:
        """Return the latest reading."""
        ...


class PromptCodec(Protocol):
    """Text to token ids and back, as the model's tokenizer has it.

    No text has fewer tokens than its characters divided by ``longest_token_chars``.
    """

    longest_token_chars: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``."""
        ...

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a rendered conversation. Raises BadRequest when the template refuses it."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of ids, special tokens included."""
        ...


@dataclass(frozen=True, slots=True)
class ServingFacts:
    """What an instance is. ``kv_host`` and ``kv_port`` are where peers pull its KV."""

    engine_id: str
    model: str
    max_model_len: int
    vocab_size: int
    block_tokens: int
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    kv_host: str
    kv_port: int
