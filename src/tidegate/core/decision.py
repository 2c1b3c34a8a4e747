"""What a policy decides. Small immutable types, matched exhaustively; no in-band sentinels.

Those that every placement makes are msgspec structs, which take a tenth of the time of a frozen dataclass.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import msgspec
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


class Place(msgspec.Struct, frozen=True, gc=False):
    """Run the prefill on ``prefill_on`` and the decode on ``decode_on``.

    ``decode_on`` is None while the decode placement is left for the end of the prefill. ``read_from`` names
    the instance whose KV of the prompt's beginning the prefill instance reads before it computes the rest;
    None: it computes whatever its own cache lacks. ``chunk_tokens``, where given, bounds how many tokens of
    prompts a step computes beside its decodes while this prefill runs.
    """

    prefill_on: str
    decode_on: str | None
    path: Path
    read_from: str | None = None
    chunk_tokens: int | None = None


class Hold(NamedTuple):
    """Keep the request waiting at the control plane, in the system's order, and ask again when something may
    have changed: at a tick, when an instance comes or goes, when another request or its prefill ends.

    For prefills only. A decode cannot wait: its first token is out, and the KV is pinned for a while only.
    ``with_all_behind``: until this one is placed, none that the order serves later is asked for. It keeps
    its place in the order then, and asking takes no time for those behind.
    """

    reason: str
    with_all_behind: bool = False


class Reject(NamedTuple):
    """End the request with ``Overloaded``: its client is told ``reason``, and to retry after
    ``retry_after_s``."""

    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Flip:
    """Relabel ``instance`` as ``to``.

    ``reason`` is one of inline, monitor, target, repair, forced; ``why`` says it to a person and tells no two
    flips apart. A function is called only when the flip is carried out, before anything else changes.
    """

    instance: str
    to: Role
    reason: str
    why: str | Callable[[], str] = field(default="", compare=False)

    def sentence(self) -> str:
        """Return ``why`` as text."""
        return self.why if isinstance(self.why, str) else self.why()


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move a running decode and its KV from ``src`` to ``dst``."""

    request: str
    src: str
    dst: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SetTarget:
    """Have ``n_prefill`` instances labelled for prefill and ``n_decode`` for decode.

    The control plane flips, adds and drains what the fleet lacks or has too much of, once: a target that
    holds is asked for again. What decodes on an instance that becomes one for prefill moves away.
    """

    n_prefill: int
    n_decode: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SetSize:
    """Have ``instances`` serve, whatever their labels, which another controller owns.

    The control plane takes drains of an earlier size or target back, adds instances that do both, or drains,
    once: a size that holds is asked for again.
    """

    instances: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AddInstance:
    """Start one more instance; it joins under ``role`` once it is up."""

    role: Role
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Place nothing more on ``instance``, move its decodes away, and with ``remove`` stop it once empty.

    This holds until the instance is removed or an ``Undrain``, also when it dies and returns meanwhile. Where
    every instance that is up drains, requests are placed on them all the same.
    """

    instance: str
    remove: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Undrain:
    """Place work on a drained ``instance`` again."""

    instance: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Remove:
    """Stop ``instance`` now; what still runs there is replayed elsewhere."""

    instance: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rescale:
    """Predict that prefills and decode steps of ``instance`` take so many times as long as until now."""

    instance: str
    prefill: float
    step: float
    reason: str = ""


Action = Flip | Migrate | SetTarget | SetSize | AddInstance | Drain | Undrain | Remove | Rescale
"""What a controller may ask for. ``tidegate.control.actions`` executes every one of them."""

Placement = Place | Hold | Reject


class Alternatives(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The instances a placement compared, with the named terms of each one's cost.

    ``terms`` returns, by name (unit in the name), one value per entry of ``ids``; it is only called when a
    journal asks. ``candidates`` holds the positions of the instances that were compared (None: all of them).
    """

    ids: Sequence[str]
    terms: Callable[[], Mapping[str, NDArray[np.float64]]]
    candidates: Sequence[int] | NDArray[np.intp] | None = None

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


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """A placement, the flips that come with it, and why: what the journal records."""

    decision: Placement
    flips: tuple[Flip, ...] = ()
    alternatives: Alternatives | None = None
    reason: str = ""


S = TypeVar("S")


class ControlDecision(NamedTuple, Generic[S]):
    """What a controller decides in one period: its state for the next one, actions, and why."""

    state: S
    actions: tuple[Action, ...] = ()
    reason: str = ""
