"""What a policy decides. Small frozen types, matched exhaustively; no in-band sentinels.

Those of every placement are named tuples, which are made in a third of the time of a frozen dataclass.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role


class Path(enum.StrEnum):
    """How a request's two phases are laid out.

    COLOCATED: one leg does both on one instance. DISAGGREGATED: two legs; the KV moves unless the
    decode placement picks the prefill instance.
    """

    COLOCATED = "colocated"
    DISAGGREGATED = "disaggregated"


class Place:
    """Run the prefill on ``prefill_on`` and the decode on ``decode_on``.

    ``decode_on`` is None while the decode placement is left for the end of the prefill.
    """

    __slots__ = ("decode_on", "path", "prefill_on")

    def __init__(self, prefill_on: str, decode_on: str | None, path: Path) -> None:
        self.prefill_on: Final = prefill_on
        self.decode_on: Final = decode_on
        self.path: Final = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return f"Place({self.prefill_on!r}, {self.decode_on!r}, {self.path!r})"

    def _all(self) -> tuple[str, str | None, Path]:
        return self.prefill_on, self.decode_on, self.path


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the request queued at the scheduler and ask again after the next event."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the request; the client may retry after ``retry_after_s``."""

    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Flip:
    """Relabel ``instance`` as ``to``. ``reason`` is one of inline, monitor, repair, forced."""

    instance: str
    to: Role
    reason: str


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move a running decode and its KV from ``src`` to ``dst``."""

    request: str
    src: str
    dst: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SetTarget:
    """Aim for this split of roles."""

    n_prefill: int
    n_decode: int


Placement = Place | Hold | Reject


class Alternatives:
    """The instances a placement compared, with the named terms of each one's cost.

    ``terms`` returns, by name (unit in the name), one value per entry of ``ids``; it is only called when a
    journal asks. ``candidates`` holds the positions of the instances that were compared (None: all of them).
    """

    __slots__ = ("candidates", "ids", "terms")

    def __init__(
        self,
        ids: Sequence[str],
        terms: Callable[[], Mapping[str, NDArray[np.float64]]],
        candidates: Sequence[int] | NDArray[np.intp] | None = None,
    ) -> None:
        self.ids: Final = ids
        self.terms: Final = terms
        self.candidates: Final = candidates

    def top(self, limit: int) -> list[dict[str, float | str]]:
        """Return the ``limit`` best candidates, ordered by the terms in turn, as plain rows."""
        everyone = self.candidates is None
        chosen = np.arange(len(self.ids)) if everyone else np.array(self.candidates, dtype=np.intp)
        terms = self.terms()
        keys = [values[chosen] for values in terms.values()]
        order = chosen[np.lexsort(keys[::-1])] if keys else chosen
        return [
            {"instance": self.ids[i], **{name: round(float(v[i]), 6) for name, v in terms.items()}}
            for i in order[:limit].tolist()
        ]


class Verdict:
    """A placement, the flips that come with it, and why: what the journal records."""

    __slots__ = ("alternatives", "decision", "flips", "reason")

    def __init__(
        self,
        decision: Placement,
        flips: tuple[Flip, ...] = (),
        alternatives: Alternatives | None = None,
        reason: str = "",
    ) -> None:
        self.decision: Final = decision
        self.flips: Final = flips
        self.alternatives: Final = alternatives
        self.reason: Final = reason


class Control:
    """What a periodic policy step decides, and the policy's state for the next step."""

    __slots__ = ("flips", "migrations", "reason", "state", "target")

    def __init__(
        self,
        flips: tuple[Flip, ...] = (),
        migrations: tuple[Migrate, ...] = (),
        target: SetTarget | None = None,
        reason: str = "",
        state: object = None,
    ) -> None:
        self.flips: Final = flips
        self.migrations: Final = migrations
        self.target: Final = target
        self.reason: Final = reason
        self.state: Final = state
