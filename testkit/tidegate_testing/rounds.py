"""Conversations of several rounds, and a system that prefills and decodes each of them somewhere else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.policies.starting_roles import mixed_roles
from tidegate.systems.system import System


@dataclass(frozen=True)
class AnywherePlacement:
    """Draws where each phase of a round runs. A ``local`` share of later prefills runs where the history is,
    and of the others a share has the history ``read``; of decodes a share ``stays`` there."""

    seed: int
    local: float = 0.4
    read: float = 0.7
    stays: float = 0.7
    needs: frozenset[Signal] = frozenset({Signal.HISTORY})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        rng = self._drawn("prefill", request, snapshot)
        history, on = request.history, rng.choice(snapshot.ids)
        if history is not None and history.on in snapshot.index and rng.random() < self.local:
            return Verdict(Place(history.on, history.on, Path.COLOCATED), reason="local")
        read_from = history.on if history is not None and rng.random() < self.read else None
        return Verdict(Place(on, None, Path.DISAGGREGATED, read_from), reason="anywhere")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        rng = self._drawn("decode", request, snapshot)
        history, on = request.history, rng.choice(snapshot.ids)
        if history is not None and history.on in snapshot.index and rng.random() < self.stays:
            on = history.on
        return Verdict(Place(prefill_on, on, Path.DISAGGREGATED), reason="anywhere")

    def _drawn(self, phase: str, request: Request, snapshot: Snapshot) -> random.Random:
        return random.Random(f"{self.seed} {phase} {snapshot.placed_prefills} {request.prompt_tokens}")


def anywhere(seed: int = 0, local: float = 0.4, read: float = 0.7, stays: float = 0.7) -> System:
    """Return the system of an ``AnywherePlacement``."""
    both = AnywherePlacement(seed, local, read, stays)
    return System(
        name="anywhere", summary="drawn", roles=mixed_roles, prefill=both, decode=both, read_back=None
    )


Ask = Callable[[dict[str, Any], Mapping[str, str]], Awaitable[list[int]]]
"""Sends a body with headers, and returns the ids of the whole answer."""


async def converse(
    ask: Ask, sessions: int, rounds: int, *, at_once: int = 12, first: int = 120, more: int = 40
) -> list[list[list[int]]]:
    """Hold greedy conversations, ``at_once`` at a time; return the ids of every answer.

    Two tenants have sessions of the same name, and every fifth conversation names none.
    """
    gate = asyncio.Semaphore(at_once)

    async def one(session: int) -> list[list[int]]:
        headers = {"x-session-id": f"s{session // 2}", "x-tenant-id": f"t{session % 2}"}
        if session % 5 == 0:
            del headers["x-session-id"]
        history: list[int] = []
        answers: list[list[int]] = []
        async with gate:
            for said, tokens in rounds_of(session, rounds, first, more):
                history = history + said
                body = {"prompt": history, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
                answers.append(await ask(body, headers))
                history = history + answers[-1]
        return answers

    return await asyncio.gather(*(one(session) for session in range(sessions)))


def rounds_of(session: int, rounds: int, first: int = 120, more: int = 40) -> list[tuple[list[int], int]]:
    """Return what a session's client says in each round, as token ids, and how long each answer is."""
    rng = random.Random(session)
    return [
        (
            [rng.randrange(5, 500) for _ in range(rng.randrange(8, first if not turn else more))],
            rng.randrange(4, 40),
        )
        for turn in range(rounds)
    ]
