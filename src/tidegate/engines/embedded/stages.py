"""What source and destination of a running decode ask and answer, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class NotMovable(Exception):
    """The decode cannot be taken over, or not with what was copied so far."""


@dataclass(frozen=True, slots=True)
class StageQuestion:
    """What a destination asks for next of a decode: it has the first ``tokens`` ids and ``blocks`` blocks,
    has reserved ``room`` blocks in all, and has copied ``stages`` times. ``epoch`` is that of the first
    answer, None for the first question."""

    request_id: str
    tokens: int
    blocks: int
    room: int
    stages: int
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """What there is behind what the destination has: ids, and the blocks that hold the next KV, in order.

    With ``state`` the decode is paused and these are the last ones; they hold the KV of all but the last
    token. Else the blocks are full ones, and the decode goes on.
    """

    token_ids: list[int]
    block_ids: list[int]
    epoch: int
    state: dict[str, Any] | None = None


class Leaving(Protocol):
    """The decodes of an engine, as its KV channel sees them. Every method may be called from any thread."""

    def stage(self, question: StageQuestion) -> StageAnswer:
        """Answer at the next step boundary. Raises NotMovable, and TransferTimedOut without a step."""
        ...

    def commit(self, request_id: str) -> bool:
        """Give a paused decode up to its destination; False when it goes on here."""
        ...

    def stay(self, request_id: str) -> None:
        """Have a paused decode go on here."""
        ...
