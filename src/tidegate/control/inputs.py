"""What a driver reports to the control plane, as journal lines.

A plane decides by its inputs alone, so the inputs of a live journal give its decisions again, to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import structs

from tidegate.control.effects import Effects
from tidegate.control.live_request import LiveRequest
from tidegate.control.plane import ControlPlane
from tidegate.core.decision import Action
from tidegate.core.errors import EngineError, EngineUnreachable, TidegateError
from tidegate.core.instance import Instance, Role
from tidegate.costs.profile import Profile
from tidegate.journal.schema import InputLine, InputRequest


class RecordingPlane(ControlPlane):
    """A control plane that journals every input that decides something, before it acts on it.

    The arguments of a line are those of the verb. A verb that takes more than plain values, or whose request
    has more to say, has a method here.
    """

    _told_s = 0.0

    def instance_up(
        self, instance: Instance, profile: Profile, now: float, *, fixed_role: Role | None = None
    ) -> Effects:
        about = {"instance": instance, "profile": profile.to_json(), "fixed_role": fixed_role}
        self.write_input("instance_up", now, None, about)
        return super().instance_up(instance, profile, now, fixed_role=fixed_role)

    def act(self, actions: Sequence[Action], now: float) -> Effects:
        given = [{"type": type(action).__name__, **msgspec.to_builtins(action)} for action in actions]
        self.write_input("act", now, None, {"actions": given})
        return super().act(actions, now)

    def arrive(self, live: LiveRequest, now: float) -> Effects:
        self.write_input("arrive", now, live, {"blocks": live.blocks, "deadline_s": live.deadline_s})
        return super().arrive(live, now)

    def failed(self, live: LiveRequest, error: EngineError, now: float) -> Effects:
        about = {"error": type(error).__name__, "instance": error.instance, "stage": error.stage}
        more = {"message": error.message, "repeatable": live.repeatable}
        if isinstance(error, EngineUnreachable):
            more["refused"] = error.refused
        self.write_input("failed", now, live, about | more)
        return super().failed(live, error, now)

    def ended(self, live: LiveRequest, error: TidegateError | None, now: float) -> Effects:
        about = {"error": None if error is None else type(error).__name__, "blocks": live.blocks}
        self.write_input("ended", now, live, about)
        return super().ended(live, error, now)

    def write_input(
        self, verb: str, now: float | None, live: LiveRequest | None, args: Mapping[str, Any]
    ) -> None:
        """Journal that ``verb`` is called with ``args``, about ``live`` if it takes a request.

        A verb that takes no time, ``now`` None, has that of the input before it.
        """
        now = self._told_s = self._told_s if now is None else now
        request = None
        if live is not None:
            at_hand = structs.asdict(live.as_request())
            del at_hand["cached"], at_hand["remaining"], at_hand["history"]
            request = InputRequest(**at_hand | {"generated": live.generated})
        t_s = self._journal.elapsed_s(now)
        self._journal.write(InputLine(t_s=t_s, verb=verb, now_s=now, request=request, args=dict(args)))


PLAIN_VERBS = (
    "start", "tick", "instance_down", "start_failed", "stop_failed", "foreign_load", "profile_scaled",
    "load_fitted", "prefill_done", "prefill_reported", "decode_began", "transfer_ended", "tokens",
    "length_reported", "migration_begun", "migration_refused", "migration_pulls", "migration_cancelled",
    "migration_done",
)  # fmt: skip
"""The other verbs: their arguments, beside the request and the time, are plain values."""


def _recorded(verb: str) -> Callable[..., Any]:
    """Return the method of ``ControlPlane`` that writes its input first."""
    act = getattr(ControlPlane, verb)
    parameters = inspect.signature(act).parameters
    names = list(parameters)[1:]
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}

    def method(self: RecordingPlane, *given: Any, **named: Any) -> Any:
        args = {**defaults, **dict(zip(names, given, strict=False)), **named}
        self.write_input(verb, args.pop("now", None), args.pop("live", None), args)
        return act(self, *given, **named)

    return method


for _verb in PLAIN_VERBS:
    setattr(RecordingPlane, _verb, _recorded(_verb))
