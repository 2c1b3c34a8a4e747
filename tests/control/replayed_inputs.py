"""Calls the verbs of a control plane as the input lines of a journal say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from tidegate.control.inputs import PLAIN_VERBS
from tidegate.control.live_request import LiveRequest
from tidegate.control.plane import ControlPlane
from tidegate.core import errors
from tidegate.core.decision import Action
from tidegate.core.errors import InternalError, TidegateError
from tidegate.core.instance import Instance, Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.costs.profile import Profile
from tidegate.journal.schema import InputLine, InputRequest
from tidegate.signals.prefix import NO_BLOCKS, PromptBlocks


class ReplayedRequest(LiveRequest):
    """A request of a replay: ``last`` is what the last line about it says."""

    def __init__(self, last: InputRequest, deadline_s: float, blocks: PromptBlocks) -> None:
        super().__init__(last.id, deadline_s, blocks)
        self.last = last

    def resident(self) -> Request:
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
            live.repeatable = args.pop("repeatable")
            kind = getattr(errors, args.pop("error"))
            plane.failed(live, kind("replayed", **args), now)
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
