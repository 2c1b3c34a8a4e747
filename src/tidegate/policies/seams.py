"""The shapes of policies. A policy is pure: what it needs to remember it returns as state."""

from __future__ import annotations

import enum
from typing import Protocol

from tidegate.core.decision import Control, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot


class Signal(enum.StrEnum):
    """Inputs beyond the ledger's counts that a policy may need; a fleet lacking one is refused."""

    PROFILE = "profile"
    LENGTHS = "lengths"
    PREFIX_HITS = "prefix_hits"
    FORECAST = "forecast"


class PrefillPlacement(Protocol):
    """Chooses where a request's prefill runs, when the request arrives."""

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals without which it cannot decide."""
        ...

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Return Place, Hold or Reject. Raises NoInstance when the snapshot is empty."""
        ...


class DecodePlacement(Protocol):
    """Chooses where a request decodes, when its prefill ends."""

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals without which it cannot decide."""
        ...

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Return a Place whose ``decode_on`` is set, or Reject. ``prefill_on`` may be gone from the snapshot.

        ``request.prompt_tokens`` is the resident length: prompt plus generated.
        """
        ...


class PoolControl(Protocol):
    """Rewrites labels periodically."""

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals without which it cannot decide."""
        ...

    @property
    def tick_s(self) -> float:
        """Seconds between steps. The driver closes the ledger's window right before each."""
        ...

    def step(self, snapshot: Snapshot, state: object) -> Control:
        """Return the flips of this tick and the state for the next; ``state`` is None at first."""
        ...


class StartingRoles(Protocol):
    """Labels a fleet at start-up."""

    def __call__(self, instances: int) -> tuple[Role, ...]:
        """Return one role per instance. Raises ConfigError when the fleet is too small."""
        ...
