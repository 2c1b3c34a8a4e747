"""What the control plane has a driver do: drivers match on the type, carry it out and report back."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from tidegate.control.live_request import LiveRequest
from tidegate.core.decision import Migrate, Place
from tidegate.core.errors import TidegateError
from tidegate.core.instance import Role
from tidegate.policies.order import Ticket


class RunPrefill(msgspec.Struct, frozen=True, gc=False):
    """Run the request's prefill, and on a colocated path all of it. It is in the ledger already.

    ``ticket`` is what the instance's queue orders by; ``alone`` tells that nothing else is there.
    """

    live: LiveRequest
    place: Place
    ticket: Ticket
    alone: bool


class RunDecode(msgspec.Struct, frozen=True, gc=False):
    """Run the request's decode on instance ``on``; its KV is on ``live.prefill_on``."""

    live: LiveRequest
    on: str


class Held(NamedTuple):
    """The request waits; a later event brings ``RunPrefill`` or ``GiveUp`` for it."""

    live: LiveRequest
    reason: str


class GiveUp(NamedTuple):
    """End the request with ``error``."""

    live: LiveRequest
    error: TidegateError


class Replay(NamedTuple):
    """A failed request is served again from what it has; ``label`` is the error's metric label."""

    live: LiveRequest
    label: str


class Suspect(NamedTuple):
    """Have the fleet look at an instance whose call failed."""

    instance: str


class WakeAt(NamedTuple):
    """Call ``ControlPlane.tick`` at ``at_s``."""

    at_s: float


class Flipped(NamedTuple):
    """An instance's label was rewritten. Nothing is to be done on the engine."""

    instance: str
    before: Role
    after: Role
    reason: str
    why: str = ""


class Drains(NamedTuple):
    """An instance gets nothing new, and is stopped once empty with ``remove``; ``ended`` tells that it does
    again. Nothing is to be done on the engine."""

    instance: str
    reason: str
    remove: bool = False
    ended: bool = False


class StartMigration(NamedTuple):
    """Move a running decode.

    Report ``migration_begun`` and then ``migration_done`` or ``migration_cancelled``; or
    ``migration_refused`` alone.
    """

    live: LiveRequest
    migrate: Migrate


class StartInstance(NamedTuple):
    """Have the fleet start one more instance. ``role`` is its label once it reports ``instance_up``."""

    role: Role
    reason: str


class StopInstance(NamedTuple):
    """Have the fleet stop an instance for good; it reports ``instance_down``."""

    instance: str
    reason: str


Effects = list[
    RunPrefill | RunDecode | Held | GiveUp | Replay | Suspect | WakeAt | Flipped | Drains | StartMigration
    | StartInstance | StopInstance
]  # fmt: skip
