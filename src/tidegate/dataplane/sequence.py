"""One leg of a request inside a simulated instance."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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

UNBOUNDED: Final = sys.maxsize
"""The chunk bound of a sequence without one."""
HASH_BLOCK_TOKENS = 512
"""Tokens that one block id names unless told otherwise: those of the Mooncake traces."""


@dataclass(slots=True, eq=False)
class Pin:
    """KV of ``tokens`` tokens that waits in ``blocks`` blocks of instance ``on`` for a decode to take it.

    ``shared`` tells which of the blocks are found by others, too. ``taken``: a decode owns or pulls it.
    ``gone``: its lease ended before that.
    """

    on: int
    blocks: int
    tokens: int
    shared: Shared | None = None
    taken: bool = False
    gone: bool = False


@dataclass(slots=True, eq=False)
class SimSequence:
    """State of a leg from its submission to its end.

    ``last_token`` is the length at which the leg ends; with ``hand_over`` its KV is then ``pin``. ``source``
    is the KV that the leg starts from. ``block_ids`` name its tokens, and all before them, in blocks of
    ``hash_block_tokens``, as far as they can be found again; ``ticket`` is what its queue's order knows.
    ``generated`` tokens of the prompt are of the answer, whose first token went out at ``first_token_s``.

    ``state`` is one of this module's; ``on`` numbers the instance it was submitted to. ``tokens`` is the
    prompt, once it is queued, plus what was generated; ``computed`` of them have KV. While a sequence is in
    a ``DecodeBatch`` they grow there, ``base`` is ``computed`` less the batch's ticks, ``turn`` tells when it
    joined, and ``due_key`` is what its next token is filed under, if somebody waits for it (``TokenDues``).
    ``chunk`` tokens are computed in the step that runs, and while a prompt is computed ``blocks`` are held.
    ``cached_tokens`` were found here at its first admission; ``moving``: a migration copies its KV.
    """

    request: int
    prompt: int
    last_token: int
    hand_over: bool
    source: Pin | None = None
    block_ids: Sequence[int] = ()
    hash_block_tokens: float = HASH_BLOCK_TOKENS
    ticket: Ticket | None = None
    generated: int = 0
    pin: Pin | None = None
    shared: Shared | None = None
    state: int = NEW
    on: int = -1
    tokens: int = 0
    computed: int = 0
    blocks: int = 0
    chunk: int = 0
    base: int = 0
    turn: int = 0
    first_token_s: float | None = None
    due_key: int | None = None
    preemptions: int = 0
    cached_tokens: int = 0
    moving: bool = False
    admitted_s: float | None = None
    loaded_s: float | None = None

    def note_admission(self, now: float) -> None:
        """Take note that it was admitted, if that is the first time."""
        if self.admitted_s is None:
            self.admitted_s = now
            if self.shared is not None:
                self.cached_tokens = len(self.shared.held) * self.shared.unit_tokens

    @property
    def attains(self) -> bool:
        """Whether its first token was in time for its target, so that a target of TPOT is left to attain."""
        ticket, first_s = self.ticket, self.first_token_s
        return ticket is not None and first_s is not None and first_s <= ticket.deadline_s

    @property
    def extends(self) -> bool:
        """Whether its source has only the beginning of its prompt, the rest of which it computes."""
        return self.source is not None and self.source.tokens < self.prompt - 1

    @property
    def chunk_bound(self) -> int:
        """The most tokens of prompts in a step that computes some of its prompt (``Place.chunk_tokens``)."""
        bound = None if self.ticket is None else self.ticket.chunk_tokens
        return UNBOUNDED if bound is None else bound
