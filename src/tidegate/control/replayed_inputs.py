"""Takes the decisions of a journal again: calls the verbs of a control plane as its ``input`` lines say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tidegate.control.inputs import PLAIN_VERBS
from tidegate.control.live_request import LiveRequest
from tidegate.control.plane import ControlPlane
from tidegate.control.settings import ControlSettings
from tidegate.core import errors
from tidegate.core.decision import Action
from tidegate.core.errors import InternalError, TidegateError, TraceError
from tidegate.core.instance import Instance, Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.costs.profile import Profile
from tidegate.journal.reader import JournalLines
from tidegate.journal.schema import HeaderLine, InputLine, InputRequest
from tidegate.journal.writer import JournalWriter
from tidegate.policies.protocols import Signal
from tidegate.signals.forecast.choice import ForecastSettings, deployed_feed
from tidegate.signals.lengths.choice import AUTO, deployed_source
from tidegate.signals.prefix import NO_BLOCKS, PrefixIndex, PromptBlocks
from tidegate.systems.system import System


class ReplayedRequest(LiveRequest):
    """A request of a replay: ``last`` is what the last line about it says."""

    def __init__(self, last: InputRequest, deadline_s: float, blocks: PromptBlocks) -> None:
        super().__init__(last.id, deadline_s, blocks)
        self.last = last

    def as_request(self) -> Request:
        return Request(**msgspec.structs.asdict(self.last) | {"slo": self.last.slo or Slo()})


def decide_again(
    path: str | Path,
    system: System,
    settings: ControlSettings | None = None,
    lengths: str = AUTO,
    forecast: ForecastSettings | None = None,
) -> list[bytes]:
    """Return the lines that a plane writes which is told what the journal's ``input`` lines say.

    Under the system, the settings and the sources of lengths and forecasts of the gateway that wrote the
    journal these are its own lines, but for ``header``, ``input``, ``load_drift`` and ``outcome``; only ``t``
    may differ, by a microsecond.
    Under others they are what those would have decided of the same inputs, until one follows from a decision
    that they did not take. Raises TraceError for a journal without inputs.
    """
    lines = JournalLines(path)
    ids: list[str] = []
    inputs: list[InputLine] = []
    for line in lines:
        if isinstance(line, HeaderLine):
            ids = [instance.id for instance in line.instances]
        elif isinstance(line, InputLine):
            inputs.append(line)
    if not inputs:
        raise TraceError("it has no 'input' lines: `serve --journal-inputs` writes them", file=str(path))
    written: list[bytes] = []
    journal = JournalWriter(written.append, inputs[0].now_s - inputs[0].t_s)
    source = deployed_source(lengths, needed=Signal.LENGTHS in system.needs)
    load = deployed_feed(forecast or ForecastSettings(), needed=Signal.FORECAST in system.needs)
    if load is not None and any(line.verb == "load_fitted" for line in inputs):
        load.fit = lambda number, periods: None
    replay_inputs(inputs, ControlPlane(system, ids, journal, settings, PrefixIndex(), source, load))
    return written


def replay_inputs(lines: Iterable[InputLine], plane: ControlPlane) -> None:
    """Call the verbs of ``lines`` on ``plane``, in order. Raises InternalError for an unknown verb."""
    lives: dict[str, ReplayedRequest] = {}
    for line in lines:
        if line.request is None:
            _replay_fleet_input(line, plane)
        else:
            _replay_request_input(line, line.request, plane, lives)


def _replay_fleet_input(line: InputLine, plane: ControlPlane) -> None:
    args, now = dict(line.args), line.now_s
    match line.verb:
        case "instance_up":
            given = msgspec.convert(args["instance"], Instance)
            fixed = None if args["fixed_role"] is None else Role(args["fixed_role"])
            plane.instance_up(given, Profile.from_json(args["profile"]), now, fixed_role=fixed)
        case "act":
            plane.act([_action(action) for action in args["actions"]], now)
        case "start_failed":
            plane.start_failed(Role(args["role"]), args["reason"], now)
        case "foreign_load" | "stop_failed" | "load_fitted":
            getattr(plane, line.verb)(**args)
        case "start" | "tick" | "instance_down" | "profile_scaled":
            getattr(plane, line.verb)(**args, now=now)
        case _:
            raise InternalError(f"the control plane has no verb {line.verb!r} without a request")


def _replay_request_input(
    line: InputLine, about: InputRequest, plane: ControlPlane, lives: dict[str, ReplayedRequest]
) -> None:
    args, now = dict(line.args), line.now_s
    if line.verb == "arrive":
        lives[about.id] = ReplayedRequest(about, args["deadline_s"], _blocks(args["blocks"]))
    live = lives.get(about.id) or ReplayedRequest(about, 0.0, NO_BLOCKS)  # or refused before it arrived
    live.last, live.generated = about, about.generated
    match line.verb:
        case "arrive":
            plane.arrive(live, now)
        case "failed":
            live.repeatable = args.pop("repeatable")
            kind, message = getattr(errors, args.pop("error")), args.pop("message")
            plane.failed(live, kind(message, **args), now)
        case "ended":
            live.blocks = _blocks(args["blocks"])
            plane.ended(live, None if args["error"] is None else TidegateError(args["error"]), now)
        case verb if verb in PLAIN_VERBS:
            getattr(plane, verb)(live, now=now, **args)
        case _:
            raise InternalError(f"the control plane has no verb {line.verb!r} about a request")


def _blocks(given: Sequence[Any]) -> PromptBlocks:
    keys, *more = given
    return PromptBlocks(tuple(keys), *more)


def _action(given: Mapping[str, Any]) -> Action:
    kinds = {kind.__name__: kind for kind in Action.__args__}
    fields = {name: value for name, value in given.items() if name != "type"}
    action: Action = msgspec.convert(fields, kinds[given["type"]])
    return action
