"""What the ledger remembers of one request and of one instance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tidegate.core.instance import Instance
from tidegate.core.request import Request
from tidegate.costs.profile import Profile


@dataclass(slots=True, eq=False)
class InstanceEntry:
    """An instance that is up: its column and who is on it, each kind in order of arrival.

    ``head`` is the prefill taken to be running. ``steps`` counts the tokens that each of the ``in_step``
    decodes that step together has produced, the last one at ``stepped_at_s``. The ``foreign_*`` are what no
    request of the ledger stands for.
    """

    spec: Instance
    profile: Profile
    column: int
    prefills: dict[str, RequestEntry] = field(default_factory=dict)
    decodes: dict[str, RequestEntry] = field(default_factory=dict)
    handoffs: dict[str, RequestEntry] = field(default_factory=dict)
    head: RequestEntry | None = None
    steps: int = 0
    in_step: int = 0
    stepped_at_s: float = 0.0
    foreign_requests: int = 0
    foreign_resident_tokens: int = 0
    foreign_held_tokens: int = 0


class RequestEntry:
    """A live request. Which instances are set tells its stage.

    ============  ======  ========  ============================================
    ``prefill``   set     in prefill (queued or running) there
    ``source``    set     its KV waits there for a decode placement, or is pulled from there
    ``decode``    set     decodes there, or will once the pull from ``source`` ends
    ============  ======  ========  ============================================

    ``prefill`` excludes the other two. ``seconds`` is the predicted prefill, ``hopeless`` tells
    that it was too late for it when last looked at, ``held_tokens`` the KV
    counted at ``source``, ``resident_tokens`` the KV counted at ``decode``. While ``decode`` is set and
    ``source`` is not, ``last_at_s`` is the start of the open gap, and ``generating`` tells whether that is
    a gap between two tokens of this instance. ``joined_step`` is the instance's ``steps`` when the decode
    joined them; while it is set, ``resident_tokens`` and ``last_at_s`` are those of that moment.

    ``moving_to`` names the instance to which a migration is under way, "" without one. ``left_at_s`` is set
    from a migration's commit to the first token after it: the time of the last token before it. ``slot`` is
    its place in the ledger's ``LiveTable``.
    """

    __slots__ = (
        "decode", "generating", "held_tokens", "hopeless", "joined_step", "last_at_s", "left_at_s",
        "moving_to", "prefill", "request", "resident_tokens", "seconds", "slot", "source",
    )  # fmt: skip

    def __init__(self, request: Request, prefill: InstanceEntry | None, seconds: float) -> None:
        self.request = request
        self.prefill = prefill
        self.seconds = seconds
        self.source: InstanceEntry | None = None
        self.decode: InstanceEntry | None = None
        self.held_tokens = 0
        self.resident_tokens = 0
        self.last_at_s = 0.0
        self.generating = False
        self.hopeless = False
        self.joined_step: int | None = None
        self.moving_to = ""
        self.slot = 0
        self.left_at_s: float | None = None

    @property
    def tokens_now(self) -> int:
        """``resident_tokens`` with those produced in step since."""
        if self.joined_step is None or self.decode is None:
            return self.resident_tokens
        return self.resident_tokens + self.decode.steps - self.joined_step

    @property
    def pulled_tokens(self) -> int:
        """What ``decode`` pulls from ``source``: the KV there but for what the request's placement expected
        ``decode`` to hold."""
        if self.decode is None:
            return 0
        request, on = self.request, self.decode.spec.id
        here = request.cached.get(on, 0)
        if request.history is not None and request.history.on == on:
            here = max(here, request.history.tokens)
        return max(0, self.held_tokens - here)

    @property
    def token_at_s(self) -> float:
        """``last_at_s``, with the tokens produced in step since."""
        return self.last_at_s if self.joined_step is None or self.decode is None else self.decode.stepped_at_s


class Residents(NamedTuple):
    """Request ids on one instance, each kind in order of arrival."""

    prefills: tuple[str, ...]
    handoffs: tuple[str, ...]
    decodes: tuple[str, ...]


class Booked(NamedTuple):
    """What the ledger's own requests amount to on one instance, without anything foreign.

    ``requests`` are in prefill or decode there. ``prefill_tokens`` sums the prompts of those in prefill,
    whose KV is partly computed; ``decode_tokens`` and ``handoff_tokens`` are KV.
    """

    requests: int
    prefill_tokens: int
    decode_tokens: int
    handoff_tokens: int
