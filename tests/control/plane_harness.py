"""A control plane with scripted policies, and a request class that needs no driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tidegate.control.effects import Effects, RunDecode, RunPrefill
from tidegate.control.live_request import LiveRequest
from tidegate.control.plane import ControlPlane
from tidegate.control.settings import ControlSettings
from tidegate.core.decision import Action, ControlDecision, Hold, Placement, Reject, Verdict
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.baselines import LEAST_LOADED
from tidegate.policies.protocols import Controller, DecodePlacement, Signal, StartingRoles
from tidegate.policies.starting_roles import even_roles
from tidegate.signals.forecast import LoadFeed
from tidegate.signals.lengths import LengthSource
from tidegate.signals.prefix import NO_BLOCKS, PrefixIndex, PromptBlocks
from tidegate.systems.system import System
from tidegate_testing import REFERENCE, instance


class PlainRequest(LiveRequest):
    """A request of ``prompt_tokens`` that may generate ``max_tokens``."""

    def __init__(
        self,
        name: str = "r0",
        prompt_tokens: int = 100,
        max_tokens: int = 50,
        *,
        arrival_s: float = 0.0,
        deadline_s: float = 600.0,
        blocks: PromptBlocks = NO_BLOCKS,
    ) -> None:
        super().__init__(name, deadline_s, blocks)
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.arrival_s = arrival_s

    def as_request(self) -> Request:
        return Request(
            self.id,
            self.prompt_tokens + self.generated,
            self.max_tokens - self.generated,
            self.arrival_s,
            Slo(1.0, 0.05),
            generated=self.generated,
        )


@dataclass
class HoldWhile:
    """Places as ``LEAST_LOADED`` does, but holds or rejects prefills while told to."""

    holding: bool = False
    rejecting: bool = False
    asked: list[Request] = field(default_factory=list)
    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        self.asked.append(request)
        if self.rejecting:
            return Verdict(Reject("full", 3.0))
        if self.holding:
            return Verdict(Hold("told to"))
        return LEAST_LOADED.place_prefill(request, snapshot)


@dataclass(frozen=True)
class PlacesNoDecode:
    """Answers every decode with ``decision``."""

    decision: Placement
    needs: frozenset[Signal] = frozenset()

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        return Verdict(self.decision)


@dataclass(frozen=True)
class Scripted:
    """A controller that takes its actions from ``script``, one entry per decision; its state counts them."""

    script: Sequence[tuple[Action, ...]] = ()
    period_s: float = 1.0
    name: str = "scripted"
    needs: frozenset[Signal] = frozenset()

    def initial(self) -> int:
        return 0

    def decide(self, snapshot: Snapshot, state: int) -> ControlDecision[int]:
        actions = self.script[state] if state < len(self.script) else ()
        return ControlDecision(state + 1, actions, f"decision {state}")


def make_plane(
    instances: int = 4,
    *,
    controllers: tuple[Controller[int], ...] = (),
    prefill: HoldWhile | None = None,
    decode: DecodePlacement = LEAST_LOADED,
    roles: StartingRoles = even_roles,
    prefixes: PrefixIndex | None = None,
    lengths: LengthSource | None = None,
    load: LoadFeed | None = None,
    settings: ControlSettings | None = None,
    lines: list[bytes] | None = None,
    window_s: float = 1.0,
) -> ControlPlane:
    """Return a plane with instances ``i0``, ``i1``, ... up at time 0, started."""
    system = System(
        name="test",
        summary="a test's",
        roles=roles,
        prefill=prefill or HoldWhile(),
        decode=decode,
        controllers=controllers,
        window_s=window_s,
    )
    ids = [f"i{k}" for k in range(instances)]
    journal = JournalWriter(None if lines is None else lines.append)
    plane = ControlPlane(system, ids, journal, settings, prefixes, lengths, load)
    for name in ids:
        plane.instance_up(instance(name), REFERENCE, 0.0)
    plane.start(0.0)
    return plane


def only(effects: Effects, kind: type) -> list:  # type: ignore[type-arg]
    """Return the effects of one type."""
    return [effect for effect in effects if isinstance(effect, kind)]


def decoding(plane: ControlPlane, live: PlainRequest, now: float = 0.0) -> RunDecode:
    """Bring a request to its decode; return the effect that runs it."""
    (run,) = plane.arrive(live, now)
    assert isinstance(run, RunPrefill)
    live.generated = 1
    (decode,) = plane.prefill_done(live, now)
    assert isinstance(decode, RunDecode)
    return decode
