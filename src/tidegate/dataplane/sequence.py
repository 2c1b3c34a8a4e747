"""One leg of a request inside a simulated instance."""

from __future__ import annotations

from typing import Final

from tidegate.dataplane.prefix import Shared
from tidegate.policies.order import Ticket

NEW: Final = 0
"""Not with an instance yet."""
WAITING: Final = 1
"""In an instance's queue."""
LOADING: Final = 2
"""Admitted; its KV is on the way."""
CHUNKING: Final = 3
"""Its prompt, or what a preemption lost, is being computed."""
READY: Final = 4
"""Its KV is here; it joins the next step."""
DECODING: Final = 5
"""Gets a token per step."""
PAUSED: Final = 6
"""Out of the batch while the last of its KV moves to another instance."""
ENDED: Final = 7
"""Has its last token, or was aborted."""

HASH_BLOCK_TOKENS = 512
"""Tokens that one block id names unless told otherwise: those of the Mooncake traces."""


class Pin:
    """KV of ``tokens`` tokens that waits in ``blocks`` blocks of instance ``on`` for a decode to take it.

    ``shared`` tells which of the blocks are found by others, too. ``taken``: a decode owns or pulls it.
    ``gone``: its lease ended before that.
    """

    __slots__ = ("blocks", "gone", "on", "shared", "taken", "tokens")

    def __init__(self, on: int, blocks: int, tokens: int, shared: Shared | None = None) -> None:
        self.on = on
        self.blocks = blocks
        self.tokens = tokens
        self.shared = shared
        self.taken = False
        self.gone = False


class SimSequence:
    """State of a leg from its submission to its end.

    ``tokens`` is the prompt plus what was generated; ``computed`` of them have KV. While a sequence is in a
    ``DecodeBatch`` they grow there, ``base`` is ``computed`` less the batch's ticks, and ``turn`` tells when
    it joined. ``last_token`` is the length at which the leg ends; with ``hand_over`` its KV is then ``pin``.
    ``source`` is the KV that the leg starts from. ``block_ids`` name its tokens, and all before them, in
    blocks of ``hash_block_tokens``, as far as they can be found again; ``ticket`` is what its queue's order
    knows.

    ``state`` is one of this module's; ``on`` numbers the instance it was submitted to. ``chunk`` tokens are
    computed in the step that runs, and while a prompt is computed ``blocks`` are held. ``cached_tokens``
    were found here at its first admission; ``moving``: a migration copies its KV.
    """

    __slots__ = (
        "admitted_s",
        "base",
        "block_ids",
        "blocks",
        "cached_tokens",
        "chunk",
        "computed",
        "hand_over",
        "hash_block_tokens",
        "last_token",
        "loaded_s",
        "moving",
        "on",
        "pin",
        "preemptions",
        "prompt",
        "request",
        "shared",
        "source",
        "state",
        "ticket",
        "tokens",
        "turn",
    )  # fmt: skip

    def __init__(
        self,
        request: int,
        prompt: int,
        last_token: int,
        hand_over: bool,
        source: Pin | None = None,
        block_ids: tuple[int, ...] = (),
        hash_block_tokens: int = HASH_BLOCK_TOKENS,
        ticket: Ticket | None = None,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.last_token = last_token
        self.hand_over = hand_over
        self.source = source
        self.block_ids = block_ids
        self.hash_block_tokens = hash_block_tokens
        self.ticket = ticket
        self.pin: Pin | None = None
        self.shared: Shared | None = None
        self.state: int = NEW
        self.on = -1
        self.tokens = prompt
        self.computed = 0
        self.blocks = 0
        self.chunk = 0
        self.base = 0
        self.turn = 0
        self.preemptions = 0
        self.cached_tokens = 0
        self.moving = False
        self.admitted_s: float | None = None
        self.loaded_s: float | None = None
