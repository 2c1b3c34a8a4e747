"""What a driver told the control plane, as journal lines: one plane writes them, another one replays them.

A plane decides by its inputs alone, so the inputs of a live journal give its decisions again, to the bit.
"""

from __future__ import annotations

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
from tidegate.signals.prefix import PromptBlocks


class RecordingPlane(ControlPlane):
    """A control plane that journals every input before it acts on it."""

    def start(self, now: float) -> Effects:
        self._input("start", now)
        return super().start(now)

    def tick(self, now: float) -> Effects:
        self._input("tick", now)
        return super().tick(now)

    def instance_up(
        self, instance: Instance, profile: Profile, now: float, *, fixed_role: Role | None = None
    ) -> Effects:
        fixed = None if fixed_role is None else int(fixed_role)
        self._input("instance_up", now, args={"instance": instance, "fixed_role": fixed})
        return super().instance_up(instance, profile, now, fixed_role=fixed_role)

    def instance_down(self, instance_id: str, reason: str, now: float) -> Effects:
        self._input("instance_down", now, args={"instance_id": instance_id, "reason": reason})
        return super().instance_down(instance_id, reason, now)

    def start_failed(self, role: Role) -> None:
        self._input("start_failed", 0.0, args={"role": int(role)})
        super().start_failed(role)

    def stop_failed(self, instance_id: str) -> None:
        self._input("stop_failed", 0.0, args={"instance_id": instance_id})
        super().stop_failed(instance_id)

    def act(self, actions: Sequence[Action], now: float) -> Effects:
        given = [{"type": type(action).__name__, **msgspec.to_builtins(action)} for action in actions]
        self._input("act", now, args={"actions": given})
        return super().act(actions, now)

    def arrive(self, live: LiveRequest, now: float) -> Effects:
        self._input("arrive", now, live, args={"blocks": live.blocks, "deadline_s": live.deadline_s})
        return super().arrive(live, now)

    def prefill_done(self, live: LiveRequest, now: float) -> Effects:
        self._input("prefill_done", now, live)
        return super().prefill_done(live, now)

    def decode_began(self, live: LiveRequest, resident_tokens: int, now: float) -> None:
        self._input("decode_began", now, live, args={"resident_tokens": resident_tokens})
        super().decode_began(live, resident_tokens, now)

    def transfer_ended(self, live: LiveRequest, now: float) -> None:
        self._input("transfer_ended", now, live)
        super().transfer_ended(live, now)

    def tokens(self, live: LiveRequest, count: int, now: float) -> None:
        self._input("tokens", now, live, args={"count": count})
        super().tokens(live, count, now)

    def failed(self, live: LiveRequest, error: EngineError, now: float) -> Effects:
        told = {"error": type(error).__name__, "instance": error.instance, "stage": error.stage}
        self._input("failed", now, live, args={**told, "repeatable": live.repeatable})
        return super().failed(live, error, now)

    def ended(self, live: LiveRequest, error: TidegateError | None, now: float) -> Effects:
        self._input("ended", now, live, args={"error": None if error is None else type(error).__name__})
        return super().ended(live, error, now)

    def migration_begun(self, live: LiveRequest, now: float) -> None:
        self._input("migration_begun", now, live)
        super().migration_begun(live, now)

    def migration_refused(self, live: LiveRequest, why: str, now: float, *, for_good: bool = False) -> None:
        self._input("migration_refused", now, live, args={"why": why, "for_good": for_good})
        super().migration_refused(live, why, now, for_good=for_good)

    def migration_cancelled(self, live: LiveRequest, now: float, moved_bytes: int = 0) -> None:
        self._input("migration_cancelled", now, live, args={"moved_bytes": moved_bytes})
        super().migration_cancelled(live, now, moved_bytes)

    def migration_done(
        self, live: LiveRequest, resident_tokens: int, now: float, *, moved_bytes: int = 0, pulled: bool
    ) -> None:
        args = {"resident_tokens": resident_tokens, "moved_bytes": moved_bytes, "pulled": pulled}
        self._input("migration_done", now, live, args=args)
        super().migration_done(live, resident_tokens, now, moved_bytes=moved_bytes, pulled=pulled)

    def foreign_load(self, instance_id: str, requests: int, tokens: int) -> None:
        args = {"instance_id": instance_id, "requests": requests, "tokens": tokens}
        self._input("foreign_load", 0.0, args=args)
        super().foreign_load(instance_id, requests, tokens)

    def _input(
        self, verb: str, now: float, live: LiveRequest | None = None, args: Mapping[str, Any] | None = None
    ) -> None:
        request = None
        if live is not None:
            now_is = live.resident()
            request = InputRequest(
                id=live.id,
                generated=live.generated,
                prompt_tokens=now_is.prompt_tokens,
                max_tokens=now_is.max_tokens,
                arrival_s=now_is.arrival_s,
                slo=now_is.slo,
                tenant=now_is.tenant,
                session=now_is.session,
                turn=now_is.turn,
            )
        self._journal.write(
            InputLine(
                t_s=self._journal.elapsed_s(now), verb=verb, now_s=now, request=request, args=dict(args or {})
            )
        )


class ReplayedRequest(LiveRequest):
    """A request as the inputs tell of it: ``told`` is what its last line said."""

    def __init__(self, told: InputRequest, deadline_s: float, blocks: PromptBlocks) -> None:
        super().__init__(told.id, deadline_s, blocks)
        self.told = told

    def resident(self) -> Request:
        """See ``LiveRequest.resident``."""
        told = self.told
        return Request(
            told.id,
            told.prompt_tokens,
            told.max_tokens,
            told.arrival_s,
            told.slo or Slo(),
            told.tenant,
            told.session,
            told.turn,
        )


def replay_inputs(
    lines: Iterable[InputLine], plane: ControlPlane, profiles: Callable[[str], Profile]
) -> None:
    """Tell ``plane`` all that ``lines`` say, in order; ``profiles`` gives the profile of an instance.

    The plane decides as the one that wrote them did, if it runs the same system with the same settings.
    Raises InternalError for a line of a verb that does not exist.
    """
    _InputReplay(plane, profiles).run(lines)


class _InputReplay:
    def __init__(self, plane: ControlPlane, profiles: Callable[[str], Profile]) -> None:
        self._plane = plane
        self._profiles = profiles
        self._lives: dict[str, ReplayedRequest] = {}

    def run(self, lines: Iterable[InputLine]) -> None:
        for line in lines:
            if line.request is None:
                self._fleet_input(line)
            else:
                self._request_input(line, line.request)

    def _fleet_input(self, line: InputLine) -> None:
        plane, args, now = self._plane, dict(line.args), line.now_s
        match line.verb:
            case "start":
                plane.start(now)
            case "tick":
                plane.tick(now)
            case "instance_up":
                given = msgspec.convert(args["instance"], Instance)
                fixed = None if args["fixed_role"] is None else Role(args["fixed_role"])
                plane.instance_up(given, self._profiles(given.id), now, fixed_role=fixed)
            case "instance_down":
                plane.instance_down(args["instance_id"], args["reason"], now)
            case "start_failed":
                plane.start_failed(Role(args["role"]))
            case "stop_failed":
                plane.stop_failed(args["instance_id"])
            case "act":
                plane.act([_action(action) for action in args["actions"]], now)
            case "foreign_load":
                plane.foreign_load(**args)
            case _:
                raise InternalError(f"the control plane has no verb {line.verb!r} without a request")

    def _request_input(self, line: InputLine, told: InputRequest) -> None:
        plane, args, now = self._plane, dict(line.args), line.now_s
        if line.verb == "arrive":
            blocks = PromptBlocks(tuple(args["blocks"][0]), args["blocks"][1])
            self._lives[told.id] = ReplayedRequest(told, args["deadline_s"], blocks)
        live = self._lives.get(told.id)
        if live is None:  # refused before it arrived
            live = ReplayedRequest(told, 0.0, PromptBlocks((), 1.0))
        live.told, live.generated = told, told.generated
        match line.verb:
            case "failed":
                live.repeatable = args["repeatable"]
                kind = getattr(errors, args["error"])
                plane.failed(live, kind("replayed", instance=args["instance"], stage=args["stage"]), now)
            case "ended":
                plane.ended(live, None if args["error"] is None else TidegateError(args["error"]), now)
            case "arrive":
                plane.arrive(live, now)
            case "decode_began":
                plane.decode_began(live, args["resident_tokens"], now)
            case "tokens":
                plane.tokens(live, args["count"], now)
            case "migration_refused":
                plane.migration_refused(live, args["why"], now, for_good=args["for_good"])
            case "migration_cancelled":
                plane.migration_cancelled(live, now, args["moved_bytes"])
            case "migration_done":
                plane.migration_done(live, now=now, **args)
            case "prefill_done" | "transfer_ended" | "migration_begun":
                getattr(plane, line.verb)(live, now)
            case _:
                raise InternalError(f"the control plane has no verb {line.verb!r} about a request")


def _action(told: Mapping[str, Any]) -> Action:
    kinds = {kind.__name__: kind for kind in Action.__args__}
    fields = {name: value for name, value in told.items() if name != "type"}
    action: Action = msgspec.convert(fields, kinds[told["type"]])
    return action
