"""Tests of statelessness: random flips and migrations while a gateway serves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tidegate.control.live_request import Stage
from tidegate.core.decision import Flip, Migrate
from tidegate.core.instance import Role
from tidegate.gateway.dispatcher import Dispatcher


@dataclass(frozen=True, slots=True)
class Forced:
    """How often a random instance flips and a random decode moves (0: never), drawn from ``seed``."""

    flip_every_s: float = 0.0
    migrate_every_s: float = 0.0
    seed: int = 0


NOT_FORCED = Forced()


@asynccontextmanager
async def chaos(dispatcher: Dispatcher, forced: Forced) -> AsyncIterator[None]:
    """Flip a random instance and move a random decode again and again. No pool is emptied."""
    rng = random.Random(forced.seed)

    async def repeat(act: Callable[[Dispatcher, random.Random], None], period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            act(dispatcher, rng)

    periods = {flip_one: forced.flip_every_s, migrate_one: forced.migrate_every_s}
    tasks = [asyncio.create_task(repeat(act, period_s)) for act, period_s in periods.items() if period_s > 0]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def flip_one(dispatcher: Dispatcher, rng: random.Random) -> None:
    """Flip a random instance whose pool has another one."""
    snapshot = dispatcher.plane.snapshot(dispatcher.clock.now())
    for name in rng.sample(snapshot.ids, len(snapshot.ids)):
        role = dispatcher.plane.ledger.role_of(name)
        if role is not Role.MIXED and int(snapshot.labelled(role).sum()) > 1:
            to = Role.DECODE if role is Role.PREFILL else Role.PREFILL
            dispatcher.act([Flip(name, to, "forced")])
            return


def migrate_one(dispatcher: Dispatcher, rng: random.Random) -> None:
    """Have a random decode move to a random other instance, if any can."""
    plane = dispatcher.plane
    decodes = sorted(live.id for live in plane.requests.values() if live.stage is Stage.DECODE)
    for request_id in rng.sample(decodes, len(decodes)):
        live = plane.requests[request_id]
        others = [name for name in plane.ledger.ids if name != live.decode_on]
        if live.decode_on is None or live.migrate is not None or not others:
            continue
        dispatcher.act([Migrate(request_id, live.decode_on, rng.choice(others), "forced")])
        if plane.requests[request_id].migrate is not None:
            return
