"""One request inside the engine: its tokens, its blocks, how far its KV reaches, and its output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tidegate.engines.embedded.blocks import extend_keys, root_key
from tidegate.engines.embedded.sampling import Choice, Draw
from tidegate.engines.embedded.tokenizer import ModelTokenizer
from tidegate.engines.serving.assembling import TextAssembler, token_output
from tidegate.engines.serving.types import GenerateRequest, Output, RequestTimes, TokenLogprob
from tidegate.protocol.chunks import MovedDecode


@dataclass(slots=True, eq=False)
class TokenSequence:
    """State of a request from submit to finish; only the compute thread touches it. ``tokens`` is the prompt
    followed by this leg's output; ``computed`` of them have KV in ``blocks`` (as an array: ``table``).
    ``remaining`` output tokens were predicted to follow the first ``predicted_at`` of all legs; none is -1.
    ``keys`` are the prefix-cache keys of the first full blocks, ``published`` of which the pool knows. A leg
    that follows a running decode has its output, too, and until the first of its own how it ``moved``."""

    request: GenerateRequest
    seed: int
    text: TextAssembler
    submitted_s: float
    tokens: list[int] = field(init=False)
    root: bytes = field(init=False)
    try_source: bool = field(init=False)
    blocks: list[int] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros(16, dtype=np.int64))
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    published: int = 0
    loading: bool = False
    admitted_s: float | None = None
    first_token_s: float | None = None
    kv_load_s: float = 0.0
    loaded_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    predicted_at: int = -1
    remaining: float = 0.0
    moved: MovedDecode | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.root = root_key(self.request.salt)
        self.try_source = self.request.source is not None

    @property
    def new_tokens(self) -> int:
        """Tokens generated in this leg."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def output_position(self) -> int:
        """Output tokens of all legs so far: the position the next sampled token takes."""
        return self.new_tokens + self.request.generated

    @property
    def remaining_now(self) -> float:
        """The newest prediction, counted down to the newest token; 0 where there is none."""
        if self.predicted_at < 0:
            return 0.0
        return max(1.0, self.remaining - (self.output_position - self.predicted_at))

    @property
    def pending(self) -> int:
        """Tokens that have no KV yet; 1 for a decoding sequence."""
        return len(self.tokens) - self.computed

    def add_blocks(self, block_ids: list[int]) -> None:
        """Append blocks to the sequence's table."""
        have = len(self.blocks)
        self.blocks.extend(block_ids)
        if len(self.blocks) > len(self.table):
            grown = np.zeros(max(2 * len(self.table), len(self.blocks)), dtype=np.int64)
            grown[:have] = self.table[:have]
            self.table = grown
        self.table[have : len(self.blocks)] = block_ids

    def follow(self, token_ids: list[int], block_tokens: int) -> None:
        """Take output of the decode that this leg follows: the text stands where it would behind them."""
        for token_id in token_ids:
            self.tokens.append(token_id)
            self.text.add(token_id, may_stop=self.output_position > self.request.sampling.min_tokens)
        extend_keys(self.keys, self.root, self.tokens, block_tokens, len(self.tokens) - 1)

    def state(self) -> dict[str, Any]:
        """Return what another instance needs beside the tokens to go on: random numbers are drawn from the
        seed and a token's position, and text, stop strings and limits follow from the ids. The newest
        prediction comes along, for the next one may be many tokens away."""
        return {"seed": self.seed, "predicted_at": self.predicted_at, "remaining": self.remaining}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what ``state`` returned. Raises KeyError."""
        self.seed = state["seed"]
        self.predicted_at, self.remaining = state["predicted_at"], state["remaining"]

    def drop_blocks(self, keep: int) -> list[int]:
        """Detach and return the blocks behind the first ``keep``."""
        dropped = self.blocks[keep:]
        del self.blocks[keep:]
        return dropped

    def take_blocks(self) -> list[int]:
        """Detach and return all blocks; the sequence has no KV afterwards."""
        blocks, self.blocks = self.blocks, []
        self.computed = 0
        self.published = 0
        return blocks


def draw_for(sequence: TokenSequence, eos_ids: frozenset[int]) -> Draw:
    """Return how the sequence's next token is to be chosen."""
    params = sequence.request.sampling
    position = sequence.output_position
    if position < params.min_tokens:
        return Draw(params, position, sequence.seed, (*eos_ids, *params.stop_token_ids))
    return Draw(params, position, sequence.seed)


def take_token(
    sequence: TokenSequence, choice: Choice, eos_ids: frozenset[int], tokenizer: ModelTokenizer
) -> Output:
    """Append the token to the sequence and return what it shows; ``finish_reason`` is set when it ends."""
    sequence.tokens.append(choice.token_id)
    output = token_output(sequence.request, choice.token_id, sequence.new_tokens, sequence.text, eos_ids)
    if sequence.predicted_at == sequence.output_position and output.finish_reason != "stop":
        output.remaining_tokens, output.at_token = sequence.remaining, sequence.predicted_at
    if choice.logprob is not None:
        said, chosen = sequence.text.said, choice.token_id
        if not said and output.finish_reason == "stop":
            said = tokenizer.piece(chosen)
        top = [
            TokenLogprob(t, said if t == chosen else tokenizer.piece(t), tokenizer.spelt(t), value)
            for t, value in choice.alternatives
        ]
        spelt = tokenizer.spelt(chosen)
        output.logprobs = [TokenLogprob(chosen, said, spelt, choice.logprob, tuple(top))]
    return output


def times_of(sequence: TokenSequence, now_s: float) -> RequestTimes:
    """Split the leg's time by stage. A leg that never got a token has no decode time."""
    admitted = now_s if sequence.admitted_s is None else sequence.admitted_s
    first = now_s if sequence.first_token_s is None else sequence.first_token_s
    return RequestTimes(
        queue_s=admitted - sequence.submitted_s,
        kv_load_s=sequence.kv_load_s,
        prefill_s=first - admitted - sequence.kv_load_s,
        decode_s=now_s - first,
        kv_loaded_tokens=sequence.loaded_tokens,
        cached_tokens=sequence.cached_tokens,
        preemptions=sequence.preemptions,
    )
