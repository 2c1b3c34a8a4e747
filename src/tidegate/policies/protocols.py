"""The protocols of policies. A policy is pure: no I/O, no clock, no randomness of its own.

Placements answer per request, controllers at a period of their own, observers hear what happened. The control
plane calls all of them, for the gateway and the simulator alike.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol, TypeVar

from tidegate.core.decision import ControlDecision, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot

S = TypeVar("S")


class Signal(enum.StrEnum):
    """Inputs beyond the ledger's counts that a policy may need (``System.check_signals``).

    PROFILE: the instances have measured or named profiles (``Snapshot.costs``). PREFIX_HITS: it is known what
    each instance has cached of a prompt (``Request.cached``). LENGTHS: what is left to generate is predicted
    (``Request.remaining``, and the columns ``remaining_*`` of ``Snapshot.requests``). FORECAST: the load of
    the next periods is forecast (``Snapshot.forecast``). HISTORY: conversations are recognised by their
    prefix where they name no session (``Request.history``; of named sessions it is always known).
    """

    PROFILE = "profile"
    PREFIX_HITS = "prefix_hits"
    LENGTHS = "lengths"
    FORECAST = "forecast"
    HISTORY = "history"


class Policy(Protocol):
    """What every policy declares."""

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals without which it cannot decide."""
        ...


class PrefillPlacement(Policy, Protocol):
    """Chooses where a request's prefill runs, when the request arrives."""

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Return Place, Hold or Reject. Raises NoInstance when the snapshot is empty."""
        ...


class DecodePlacement(Policy, Protocol):
    """Chooses where a request decodes, when its prefill ends."""

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Return a Place whose ``decode_on`` is set, or Reject. ``prefill_on`` may be gone from the snapshot.

        A Hold is refused like a Reject: the first token is out, and its KV does not stay for long.
        ``request.prompt_tokens`` is the resident length: prompt plus generated.
        """
        ...


class Controller(Policy, Protocol[S]):
    """Acts on the fleet once per period: flips, migrations, targets, additions, drains.

    A system may have several, each at a period of its own. At one time they decide in the order of the
    composition, each on a snapshot that shows what those before it did.
    """

    @property
    def name(self) -> str:
        """The name in the journal's ``control`` lines; unique within a system."""
        ...

    @property
    def period_s(self) -> float:
        """Seconds between two decisions."""
        ...

    def initial(self) -> S:
        """Return the state for the first decision."""
        ...

    def decide(self, snapshot: Snapshot, state: S) -> ControlDecision[S]:
        """Return the actions of this period and the state for the next."""
        ...


class AnswerLengths(NamedTuple):
    """A request that was answered in full: the tokens of its prompt, those of them that the engine did not
    compute because it had them or read them, and the tokens of its answer."""

    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int


class Observer(Protocol):
    """Hears of answers: for statistics of lengths, say. Decides nothing.

    No snapshot carries what it learns. A controller or a placement reads it if the system's factory gives the
    same object to both. Such a system serves one run: what it learnt in one must not decide the next.
    """

    def answered(self, answer: AnswerLengths, now: float) -> None:
        """A request was answered in full."""
        ...


class Admission(Protocol):
    """Decides whether a request is taken where the deployment bounds that (``ControlSettings.admission``)."""

    def __call__(self, verdict: Verdict, request: Request, snapshot: Snapshot, multiple: float) -> Verdict:
        """Return the verdict on a prefill, or in its place one that rejects. ``multiple`` is the setting."""
        ...


class ReadBack(Protocol):
    """Decides whether a prefill begins with KV of its session's earlier turns."""

    def __call__(self, request: Request, snapshot: Snapshot, prefill_on: str) -> bool:
        """Tell whether ``prefill_on`` is to read what ``request.history`` tells of, rather than compute what
        its own cache lacks. Asked where both are up and apart."""
        ...


class StartingRoles(Protocol):
    """Labels a fleet at start-up."""

    def __call__(self, instances: int) -> tuple[Role, ...]:
        """Return one role per instance. Raises ConfigError when the fleet is too small."""
        ...
