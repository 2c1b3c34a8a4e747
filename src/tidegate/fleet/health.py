"""Health checks: one question over HTTP, and the wait until the answers say an instance is gone."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass

import aiohttp

from tidegate.core.errors import EngineError, EngineUnreachable
from tidegate.engines.vllm.client import VllmClient

SHORTEST_PAUSE_S = 0.1
"""Pause between checks while an instance is under suspicion, and after one that used up its period."""


class Health(enum.StrEnum):
    """What one check found."""

    HEALTHY = "healthy"
    REFUSED = "refuses connections"
    MISSED = "does not answer health checks"


@dataclass(frozen=True, slots=True)
class HealthPace:
    """A check begins every ``every_s``, each bounded by ``deadline_s``; ``misses`` in a row mean gone."""

    every_s: float = 2.0
    deadline_s: float = 2.0
    misses: int = 3


async def check_health(client: VllmClient) -> Health:
    """Ask for the server's health once; never raises for what the other side does."""
    try:
        return Health.HEALTHY if await client.healthy() else Health.MISSED
    except EngineError as error:
        refused = isinstance(error, EngineUnreachable) and error.refused
        return Health.REFUSED if refused else Health.MISSED


async def until_unhealthy(
    client: VllmClient, suspicion: asyncio.Event, pace: HealthPace, *, refused_is_gone: bool
) -> str:
    """Check at ``pace``, each time with the client's deadline, and return the reason once the instance
    counts as gone.

    Setting ``suspicion`` brings the next check forward; while checks then miss, they follow each
    other without the usual pause. One refused connection is enough when ``refused_is_gone``, else it
    counts as a miss.
    """
    clock = asyncio.get_running_loop().time
    missed = 0
    hurried = False
    began_s = clock()
    while True:
        rest_s = 0.0 if hurried and missed else began_s + pace.every_s - clock()
        if await _pause(max(SHORTEST_PAUSE_S, rest_s), suspicion):
            hurried = True
        began_s = clock()
        answer = await check_health(client)
        if answer is Health.HEALTHY:
            missed, hurried = 0, False
            continue
        missed += 1
        if missed >= pace.misses or (refused_is_gone and answer is Health.REFUSED):
            return answer.value


async def _pause(seconds: float, suspicion: asyncio.Event) -> bool:
    """Wait, but no longer than until ``suspicion`` is set; clear it and tell whether it was."""
    try:
        async with asyncio.timeout(seconds):
            await suspicion.wait()
    except TimeoutError:
        return False
    suspicion.clear()
    return True


async def end_watch(tasks: list[asyncio.Task[None]], session: aiohttp.ClientSession | None) -> None:
    """Cancel a fleet's tasks, wait until they have ended and close its session; idempotent.

    ``tasks`` is emptied.
    """
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()
    if session is not None:
        await session.close()
