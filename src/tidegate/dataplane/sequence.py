"""One leg of a request inside a simulated instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
ENDED: Final = 6
"""Has its last token, or was aborted."""


@dataclass(slots=True, eq=False)
class Pin:
    """KV of ``tokens`` tokens that waits in ``blocks`` blocks of instance ``on`` for a decode to take it.

    ``taken``: a decode owns or pulls it. ``gone``: its lease ended before that.
    """

    on: int
    blocks: int
    tokens: int
    taken: bool = False
    gone: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """State of a leg from its arrival to its end.

    ``tokens`` is the prompt plus what was generated; ``computed`` of them have KV in ``blocks``. While a
    sequence is in a ``DecodeBatch`` they grow there, and ``base`` is ``computed`` less the batch's ticks.
    ``last_token`` is the length at which the leg ends; with ``hand_over`` its KV is then ``pin``. ``state``
    is one of this module's; from the submission on, ``on`` is the instance's number.
    """

    request: int
    prompt: int
    last_token: int
    hand_over: bool
    source: Pin | None = None
    pin: Pin | None = None
    state: int = NEW
    on: int = -1
    tokens: int = 0
    computed: int = 0
    blocks: int = 0
    base: int = 0
    end_tick: int = 0
    preemptions: int = 0
    admitted_s: float | None = None
    loaded_s: float | None = None

    def __post_init__(self) -> None:
        self.tokens = self.prompt

    @property
    def pending(self) -> int:
        """Tokens without KV."""
        return self.tokens - self.computed
