"""What crosses the seams inside the embedded engine: requests in, outputs out, KV handles.

The HTTP server (event-loop thread), the engine core (one compute thread) and the KV puller (one
transfer thread) exchange only these values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tidegate.policies.order import Ticket


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token.

    ``seed`` None draws a fresh seed. The random number of output position p depends on (seed, p)
    alone, so a continued request samples as the unbroken one would. ``logprobs`` is the number of
    alternatives to report per token (0: only the chosen token), None for no logprobs.
    """

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
    """Where a request's KV can be pulled from: another instance's pinned blocks.

    ``host``/``port`` is the owner's KV channel. ``block_ids`` are the owner's blocks in order;
    they hold the KV of the first ``num_tokens`` tokens of the prompt.
    """

    engine_id: str
    request_id: str
    host: str
    port: int
    block_ids: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One leg of a request.

    The last ``generated`` ids of ``prompt_token_ids`` are output of earlier legs: they are not
    emitted again, but they count for text assembly (a character split over two legs), stop
    strings, ``min_tokens`` and seeded sampling, so that the legs' texts concatenate to what one unbroken leg
    says. ``sampling.max_tokens`` counts this leg's new tokens only. ``salt`` separates tenants'
    prefix caches. With ``pin_kv`` the finished request's KV stays pinned for a peer to pull. ``ticket`` is
    on a clock that shows 0 when the request is submitted; None stands for the default SLO, and no work.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    generated: int = 0
    salt: str = ""
    pin_kv: bool = False
    source: KvSource | None = None
    ticket: Ticket | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the ``top`` alternatives, as (token id, text, logprob)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


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
    """New tokens of one request from one engine step. The last one carries ``finish_reason``.

    ``text`` may be empty while bytes of a character or a possible stop string are held back.
    ``finish_reason`` is ``stop``, ``length``, ``abort`` or ``error`` (then ``error`` says why).
    """

    request_id: str
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    pinned: PinnedKv | None = None
    times: RequestTimes | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A consistent reading of the engine between two steps."""

    running: int
    waiting: int
    loading: int
    pinned: int
    free_blocks: int
    total_blocks: int
    block_tokens: int
    kv_usage: float
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    computed_prompt_tokens: int
    cached_prompt_tokens: int
    pulled_prompt_tokens: int
    pulled_bytes: int
    pull_failures: int
    steps: int


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


OutputSink = Callable[[list[Output]], None]
"""Called on the compute thread after each step with everything the step produced; must return quickly."""


class KvPuller(Protocol):
    """Moves a peer's blocks into the local store in the background, beside the compute thread."""

    def submit(
        self,
        source: KvSource,
        block_ids: list[int],
        done: Callable[[str | None, int], None],
    ) -> None:
        """Copy ``source``'s first ``len(block_ids)`` blocks into the local ``block_ids``.

        ``done(error, bytes_moved)`` is called once, on the transfer thread: ``error`` None means
        that all blocks are valid and the peer has been told to release its pin.
        """
        ...
