"""Prefills to the shortest queue, decodes to the most free KV, one decode a second off the fullest one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tidegate.core.decision import ControlDecision, Migrate, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.systems.registry import SystemOptions
from tidegate.systems.system import System


@dataclass(frozen=True)
class ShortestQueue:
    """Both placements."""

    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        queue = np.where(snapshot.labelled(Role.PREFILL), snapshot.prefill_tokens, np.inf)
        place = Place(snapshot.ids[queue.argmin()], None, Path.DISAGGREGATED)
        return Verdict(place, reason="shortest queue")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        free = np.where(snapshot.labelled(Role.DECODE), snapshot.free_tokens, -np.inf)
        return Verdict(
            Place(prefill_on, snapshot.ids[free.argmax()], Path.DISAGGREGATED), reason="most free KV"
        )


@dataclass(frozen=True)
class MoveOne:
    """Moves the longest decode of the fullest instance to the emptiest one, if they differ by ``tokens``."""

    tokens: int = 2_000
    name: str = "move-one"
    period_s: float = 1.0
    needs: frozenset[Signal] = frozenset()

    def initial(self) -> int:
        return 0

    def decide(self, snapshot: Snapshot, moved: int) -> ControlDecision[int]:
        decoding = np.flatnonzero(snapshot.labelled(Role.DECODE) & ~snapshot.draining)
        if len(decoding) < 2:
            return ControlDecision(moved, reason="nowhere to move to")
        tokens = snapshot.decode_tokens[decoding]
        src, dst = int(decoding[tokens.argmax()]), int(decoding[tokens.argmin()])
        rows = snapshot.requests
        there = np.flatnonzero((rows.decode_on == src) & (rows.source_on < 0))
        if tokens.max() - tokens.min() < self.tokens or not len(there):
            return ControlDecision(moved)
        longest = there[rows.context_tokens[there].argmax()]
        move = Migrate(rows.ids[longest], snapshot.ids[src], snapshot.ids[dst], "balance")
        return ControlDecision(moved + 1, (move,), f"moved {moved + 1} so far")


def shortest_queue(options: SystemOptions) -> System:
    """Shortest queue first, with decodes that move."""
    placement = ShortestQueue()
    return System(
        name="shortest-queue",
        summary="shortest queue, decodes move off the fullest instance",
        roles=options.roles(),
        prefill=placement,
        decode=placement,
        controllers=(MoveOne(),),
    )
