"""A request from its arrival to its end, as the control plane knows it."""

from __future__ import annotations

import enum

from tidegate.core.decision import Migrate
from tidegate.core.request import Request
from tidegate.core.session import History
from tidegate.journal.schema import PredictedLength
from tidegate.signals.prefix import NO_BLOCKS, PromptBlocks


class Stage(enum.IntEnum):
    """Where a request is on its way."""

    WAITING = 0
    """Not placed: it arrived just now, is held, or waits for the fleet's word on an instance that failed."""
    PREFILL = 1
    """Its prefill is queued or running on ``prefill_on``."""
    DECODE = 2
    """It decodes on ``decode_on``, or will once its KV is there."""
    ENDED = 3


class LiveRequest:
    """What a driver hands to the plane with every event about a request; it derives its own class from this.

    The driver keeps ``generated`` (tokens so far), ``blocks`` (the prompt's, where they are known) and
    ``repeatable`` (False where a second run could say something else than what was delivered) right. All else
    is the plane's: ``stage``; ``prefill_on`` and ``decode_on``, the last placements; ``predicted_prefill_s``
    and ``predicted_cached_tokens`` of the last prefill, and ``reused_tokens``, what its engine had or read of
    the prompt; the ``deaths`` of instances under it; ``failures`` since its last token, and its ``progress``
    in tokens at the last one; ``replays`` and ``migrations``; ``predicted``, what was predicted of its length
    for the journal; ``migrate``, the migration under way; ``movable``, False once a driver said that it
    cannot move; and of its conversation the ``session`` by tenant and name, ``history``, what is held of it,
    ``told_tokens``, how much of the prompt earlier turns had, ``retells``, which answer it tells again
    (``SharedBeginning.retells``), and ``prompt_blocks``, how many of ``blocks`` name the prompt alone.
    ``named`` is False where its client is known to have named no session.
    """

    __slots__ = (
        "blocks", "deadline_s", "deaths", "decode_on", "failures", "generated", "history", "id", "migrate",
        "migrations", "movable", "named", "predicted", "predicted_cached_tokens", "predicted_prefill_s",
        "prefill_on", "progress", "prompt_blocks", "repeatable", "replays", "retells", "reused_tokens",
        "session", "stage", "told_tokens",
    )  # fmt: skip

    def __init__(
        self, request_id: str, deadline_s: float, blocks: PromptBlocks = NO_BLOCKS, *, named: bool = True
    ) -> None:
        self.id = request_id
        self.deadline_s = deadline_s
        self.blocks = blocks
        self.named = named
        self.generated = 0
        self.repeatable = True
        self.movable = True
        self.stage = Stage.WAITING
        self.prefill_on: str | None = None
        self.decode_on: str | None = None
        self.predicted_prefill_s: float | None = None
        self.predicted_cached_tokens = 0
        self.reused_tokens = 0
        self.failures = 0
        self.progress = 0
        self.deaths = 0
        self.replays = 0
        self.migrations = 0
        self.migrate: Migrate | None = None
        self.predicted: list[PredictedLength] = []
        self.session: tuple[str, str] | None = None
        self.history: History | None = None
        self.told_tokens = 0
        self.retells: tuple[int, int] | None = None
        self.prompt_blocks = 0

    def as_request(self) -> Request:
        """Return the request as placements see it: the tokens generated so far are part of its prompt."""
        raise NotImplementedError
