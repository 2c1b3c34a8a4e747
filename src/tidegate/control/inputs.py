"""What a driver reported to the control plane, as journal lines: one plane writes them, another replays them.

A plane decides by its inputs alone, so the inputs of a live journal give its decisions again, to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from tidegate.control.effects import Effects
from tidegate.control.live_request import LiveRequest
from tidegate.control.plane import ControlPlane
from tidegate.core import errors
from tidegate.core.decision import Action
from tidegate.core.errors import EngineError, InternalError, TidegateError
from tidegate.core.instance import Instance, Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.costs.profile import Profile
from tidegate.journal.schema import InputLine, InputRequest
from tidegate.signals.prefix import NO_BLOCKS, PromptBlocks


class RecordingPlane(ControlPlane):
    """A control plane that journals every input before it acts on it.

    The arguments of a line are those of the verb. A verb that takes more than plain values, or whose request
    has more to say, has a method here.
    """

    def instance_up(
        self, instance: Instance, profile: Profile, now: float, *, fixed_role: Role | None = None
    ) -> Effects:
        self.write_input("instance_up", now, None, {"instance": instance, "fixed_role": fixed_role})
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
        self.write_input("failed", now, live, {**about, "repeatable": live.repeatable})
        return super().failed(live, error, now)

    def ended(self, live: LiveRequest, error: TidegateError | None, now: float) -> Effects:
        self.write_input("ended", now, live, {"error": None if error is None else type(error).__name__})
        return super().ended(live, error, now)

    def write_input(self, verb: str, now: float, live: LiveRequest | None, args: Mapping[str, Any]) -> None:
        """Journal that ``verb`` is called with ``args``, about ``live`` if it takes a request."""
        request = None
        if live is not None:
            at_hand = live.resident()._asdict()
            del at_hand["cached"]
            request = InputRequest(generated=live.generated, **at_hand)
        t_s = self._journal.elapsed_s(now)
        self._journal.write(InputLine(t_s=t_s, verb=verb, now_s=now, request=request, args=dict(args)))


PLAIN_VERBS = (
    "start", "tick", "instance_down", "start_failed", "stop_failed", "foreign_load", "prefill_done",
    "decode_began", "transfer_ended", "tokens", "migration_begun", "migration_refused", "migration_cancelled",
    "migration_done",
)  # fmt: skip
"""Verbs whose arguments, beside the request and the time, are plain values."""


def _recorded(verb: str) -> Callable[..., Any]:
    """Return the method of ``ControlPlane`` that writes its input first."""
    act = getattr(ControlPlane, verb)
    parameters = inspect.signature(act).parameters
    names = list(parameters)[1:]
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}

    def method(self: RecordingPlane, *given: Any, **named: Any) -> Any:
        args = {**defaults, **dict(zip(names, given, strict=False)), **named}
        self.write_input(verb, args.pop("now", 0.0), args.pop("live", None), args)
        return act(self, *given, **named)

    return method


for _verb in PLAIN_VERBS:
    setattr(RecordingPlane, _verb, _recorded(_verb))


class ReplayedRequest(LiveRequest):
    """A request of a replay: ``last`` is what the last line about it says."""

    def __init__(self, last: InputRequest, deadline_s: float, blocks: PromptBlocks) -> None:
        super().__init__(last.id, deadline_s, blocks)
        self.last = last

    def resident(self) -> Request:
        """See ``LiveRequest.resident``."""
        last = msgspec.structs.asdict(self.last)
        del last["generated"]
        return Request(**{**last, "slo": self.last.slo or Slo()})


def replay_inputs(
    lines: Iterable[InputLine], plane: ControlPlane, profiles: Callable[[str], Profile]
) -> None:
    """Call the verbs of ``lines`` on ``plane``, in order; ``profiles`` gives the profile of an instance.

    The plane decides as the one that wrote them did, if it runs the same system with the same settings.
    Raises InternalError for a line of a verb that does not exist.
    """
    lives: dict[str, ReplayedRequest] = {}
    for line in lines:
        if line.request is None:
            _replay_fleet_input(line, plane, profiles)
        else:
            _replay_request_input(line, line.request, plane, lives)


def _replay_fleet_input(line: InputLine, plane: ControlPlane, profiles: Callable[[str], Profile]) -> None:
    args, now = dict(line.args), line.now_s
    match line.verb:
        case "instance_up":
            given = msgspec.convert(args["instance"], Instance)
            fixed = None if args["fixed_role"] is None else Role(args["fixed_role"])
            plane.instance_up(given, profiles(given.id), now, fixed_role=fixed)
        case "act":
            plane.act([_action(action) for action in args["actions"]], now)
        case "start_failed":
            plane.start_failed(Role(args["role"]))
        case "foreign_load" | "stop_failed":
            getattr(plane, line.verb)(**args)
        case "start" | "tick" | "instance_down":
            getattr(plane, line.verb)(**args, now=now)
        case _:
            raise InternalError(f"the control plane has no verb {line.verb!r} without a request")


def _replay_request_input(
    line: InputLine, about: InputRequest, plane: ControlPlane, lives: dict[str, ReplayedRequest]
) -> None:
    args, now = dict(line.args), line.now_s
    if line.verb == "arrive":
        blocks = PromptBlocks(tuple(args["blocks"][0]), args["blocks"][1])
        lives[about.id] = ReplayedRequest(about, args["deadline_s"], blocks)
    live = lives.get(about.id) or ReplayedRequest(about, 0.0, NO_BLOCKS)  # or refused before it arrived
    live.last, live.generated = about, about.generated
    match line.verb:
        case "arrive":
            plane.arrive(live, now)
        case "failed":
            live.repeatable = args["repeatable"]
            kind = getattr(errors, args["error"])
            plane.failed(live, kind("replayed", instance=args["instance"], stage=args["stage"]), now)
        case "ended":
            plane.ended(live, None if args["error"] is None else TidegateError(args["error"]), now)
        case verb if verb in PLAIN_VERBS:
            getattr(plane, verb)(live, now=now, **args)
        case _:
            raise InternalError(f"the control plane has no verb {line.verb!r} about a request")


def _action(given: Mapping[str, Any]) -> Action:
    kinds = {kind.__name__: kind for kind in Action.__args__}
    fields = {name: value for name, value in given.items() if name != "type"}
    action: Action = msgspec.convert(fields, kinds[given["type"]])
    return action
