"""What an operator asks of the fleet through a running gateway: add an instance, drain one, end a drain."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool

from tidegate.core.decision import AddInstance, Drain, Undrain
from tidegate.core.errors import BadRequest, UnknownRoute
from tidegate.core.instance import Role
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.protocol.bodies import parse_body

ASKED = "operator"
"""The reason that the journal gives for what is asked here."""


class AddBody(BaseModel):
    """Body of ``POST /tidegate/instances``; without a role it is the one that the fleet lacks most."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["prefill", "decode", "mixed"] | None = None


class DrainBody(BaseModel):
    """Body of ``POST /tidegate/instances/{id}/drain``."""

    model_config = ConfigDict(extra="forbid")

    remove: StrictBool = False


def add_instance(dispatcher: Dispatcher, body: dict[str, Any]) -> dict[str, Any]:
    """Have the fleet start one more instance. Raises BadRequest when it cannot start any."""
    wanted = parse_body(body, AddBody).role
    membership = dispatcher.plane.membership
    role = membership.lacking(dispatcher.clock.now()) if wanted is None else Role[wanted.upper()]
    before = membership.starting.total()
    dispatcher.act([AddInstance(role, ASKED)])
    if membership.starting.total() == before:
        raise BadRequest("this fleet cannot start another instance now")
    return {"status": "starting", "role": role.label}


def drain_instance(dispatcher: Dispatcher, instance_id: str, body: dict[str, Any]) -> dict[str, Any]:
    """Have an instance get nothing new and its decodes move away, and with ``remove`` stop it once empty.

    Raises UnknownRoute when none of that name is up.
    """
    remove = parse_body(body, DrainBody).remove
    if instance_id not in dispatcher.upstreams:
        raise UnknownRoute(f"no instance {instance_id!r} is up")
    dispatcher.act([Drain(instance_id, remove, ASKED)])
    return {"status": "draining", "id": instance_id, "remove": remove}


def undrain_instance(dispatcher: Dispatcher, instance_id: str) -> dict[str, Any]:
    """Have a drained instance, up or down, get work again.

    Raises UnknownRoute when none of that name is drained, BadRequest when it is being stopped already.
    """
    draining = dispatcher.plane.membership.draining
    if instance_id not in draining:
        raise UnknownRoute(f"no instance {instance_id!r} is drained")
    dispatcher.act([Undrain(instance_id, ASKED)])
    if instance_id in draining:
        raise BadRequest(f"instance {instance_id!r} is empty and being stopped already")
    return {"status": "undrained", "id": instance_id}
