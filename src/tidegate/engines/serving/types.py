"""What the HTTP server, an engine and its KV puller exchange: requests, outputs, KV sources, statistics."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tidegate.engines.seam import RunningLeg
from tidegate.policies.order import Ticket
from tidegate.protocol.chunks import MovedDecode


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token.
    ``seed`` None draws a fresh seed. ``logprobs`` is the number of alternatives to report per token (0: only
    the chosen token), None for no logprobs."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class KvSource:
    """Another instance's pinned blocks ``block_ids``, behind the KV channel at ``host``:``port``. In order,
    they hold the KV of the prompt's first ``num_tokens`` tokens."""

    engine_id: str
    request_id: str
    host: str
    port: int
    block_ids: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One leg of a request.

    The last ``generated`` ids of ``prompt_token_ids`` are output of earlier legs: not emitted again, but
    counted for text, stop strings, ``min_tokens`` and seeded sampling, so that the legs' texts concatenate to
    that of one unbroken leg. ``sampling.max_tokens`` counts new tokens only. ``salt`` separates tenants'
    prefix caches. With ``pin_kv`` the KV stays pinned for a peer to pull. ``ticket`` is on a clock that shows
    0 at submission; None stands for the default SLO, and no work. A leg that ``follows`` takes a running
    decode over: its prompt is what the caller knew of that one when it asked, ``sampling.max_tokens`` counts
    from there, and its outputs begin behind the source's last one.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    generated: int = 0
    salt: str = ""
    pin_kv: bool = False
    source: KvSource | None = None
    ticket: Ticket | None = None
    follows: RunningLeg | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token, and beside one that was chosen those of the ``top`` alternatives. ``text``
    is what a chosen token added to the answer: nothing where it is the first part of a character, whose last
    part adds it all. ``spelt`` are its own bytes."""

    token_id: int
    text: str
    spelt: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PinnedKv:
    """KV kept for a peer: blocks here that hold ``num_tokens`` tokens, until ``deadline_s`` (monotonic)."""

    request_id: str
    block_ids: tuple[int, ...]
    num_tokens: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Where a finished leg's time went, in seconds. Both ``kv_load*`` fields are 0 without a pull."""

    queue_s: float = 0.0
    kv_load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_loaded_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class Output:
    """New tokens of one request from one engine step. The last one carries ``finish_reason``. ``text`` may be
    empty while bytes of a character or a possible stop string are held back. ``finish_reason`` is ``stop``,
    ``length``, ``abort``, ``migrated`` (another instance goes on) or ``error`` (then ``error`` says why). The
    first one of a leg that took a running decode over has ``moved``. ``remaining_tokens``, where a new
    prediction was made, are expected behind the first ``at_token`` output tokens, which end with these."""

    request_id: str
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    pinned: PinnedKv | None = None
    times: RequestTimes | None = None
    error: str | None = None
    remaining_tokens: float | None = None
    at_token: int = 0
    moved: MovedDecode | None = None


@dataclass(slots=True)
class Counters:
    """Totals since start; tokens unless named otherwise."""

    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    pulled_prompt_tokens: int = 0
    pulled_bytes: int = 0
    pull_failures: int = 0
    steps: int = 0

    def count_prompt(self, tokens: int, cached: int, pulled: int) -> None:
        """Count a prompt of ``tokens`` when its first token comes; the rest of it was computed."""
        self.prompt_tokens += tokens
        self.cached_prompt_tokens += cached
        self.pulled_prompt_tokens += pulled
        self.computed_prompt_tokens += tokens - cached - pulled


@dataclass(slots=True, kw_only=True)
class EngineStats(Counters):
    """The state of the engine between two steps, beside the totals. ``remaining_tokens`` is what running
    requests are predicted to generate still, None without a predictor. It made ``predictions`` since the
    start, and others that were dropped as ``absurd_predictions``."""

    running: int
    waiting: int
    loading: int
    pinned: int
    free_blocks: int
    total_blocks: int
    block_tokens: int
    kv_usage: float
    remaining_tokens: float | None = None
    predictions: int = 0
    absurd_predictions: int = 0


OutputSink = Callable[[list[Output]], None]
"""Called on the compute thread after each step with everything the step produced; must return quickly."""


class ServedEngine(Protocol):
    """A running engine. Every method may be called from any thread and returns at once. Each submitted
    request ends with exactly one output that has a ``finish_reason``, delivered to the engine's output sink;
    aborted ones end with ``abort``."""

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. Raises a TidegateError when it can never be served or the engine stops."""

    def abort(self, request_id: str) -> None:
        """End a request early; an unknown or finished id is ignored."""

    def release(self, request_id: str) -> bool:
        """Drop a pin; False when there was none."""

    def stats(self) -> EngineStats:
        """Return the latest statistics."""


class PromptCodec(Protocol):
    """The model's tokenizer. No text has fewer tokens than its characters / ``longest_token_chars``."""

    longest_token_chars: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``."""

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation of texts. Raises BadRequest when the template refuses it."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of ids, special tokens included."""


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

    def announcement(self, port: int) -> dict[str, Any]:
        """Return the ready line of an instance that serves HTTP at ``port``."""
        return {
            "event": "ready",
            "port": port,
            "engine_id": self.engine_id,
            "pid": os.getpid(),
            "model": self.model,
            "max_model_len": self.max_model_len,
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "block_tokens": self.block_tokens,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }
