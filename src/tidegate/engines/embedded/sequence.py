"""One request inside the engine: its tokens, its blocks and how far its KV reaches."""

from __future__ import annotations

import numpy as np

from tidegate.engines.embedded.blocks import root_key
from tidegate.engines.serving.assembling import TextAssembler
from tidegate.engines.serving.types import GenerateRequest


class TokenSequence:
    """Mutable state of a request from submit to finish; only the compute thread touches it.

    ``tokens`` is the prompt followed by this leg's output; ``computed`` of them have KV in
    ``blocks``. ``keys`` are the prefix-cache keys of the first full blocks, ``published`` of which
    the pool knows.
    """

    __slots__ = (
        "admitted_s",
        "blocks",
        "cached_tokens",
        "computed",
        "first_token_s",
        "keys",
        "kv_load_s",
        "loaded_tokens",
        "loading",
        "preemptions",
        "prompt_len",
        "published",
        "request",
        "root",
        "seed",
        "submitted_s",
        "table",
        "text",
        "tokens",
        "try_source",
    )

    def __init__(self, request: GenerateRequest, seed: int, text: TextAssembler, now_s: float) -> None:
        self.request = request
        self.tokens = list(request.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.seed = seed
        self.text = text
        self.blocks: list[int] = []
        self.table = np.zeros(16, dtype=np.int64)
        self.computed = 0
        self.keys: list[bytes] = []
        self.root = root_key(request.salt)
        self.published = 0
        self.try_source = request.source is not None
        self.loading = False
        self.submitted_s = now_s
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.kv_load_s = 0.0
        self.loaded_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0

    @property
    def new_tokens(self) -> int:
        """Tokens generated in this leg."""
        return len(self.tokens) - self.prompt_len

    @property
    def output_position(self) -> int:
        """Output tokens of all legs so far: the position the next sampled token takes."""
        return len(self.tokens) - self.prompt_len + self.request.generated

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

    def take_blocks(self) -> list[int]:
        """Detach and return all blocks; the sequence has no KV afterwards."""
        blocks, self.blocks = self.blocks, []
        self.computed = 0
        self.published = 0
        return blocks
