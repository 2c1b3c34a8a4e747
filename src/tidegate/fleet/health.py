"""Health checks over HTTP, and the wait until they show that an instance is gone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp

from tidegate.core.errors import EngineError, EngineUnreachable, NoDescriptors
from tidegate.engines.loop_time import LoopTime
from tidegate.engines.vllm.client import VllmClient

SHORTEST_PAUSE_S = 0.1
"""Pause between checks while an instance is under suspicion, and after one that used up its period."""
REFUSED = "refuses connections"
UNASKED = "could not be asked"
MISSED = "does not answer health checks"


@dataclass(frozen=True, slots=True)
class HealthPace:
    """A check begins every ``every_s``, each bounded by ``deadline_s``; ``misses`` in a row mean gone. Time
    of a check in which this process did not run makes it that much less of a miss."""

    every_s: float = 2.0
    deadline_s: float = 2.0
    misses: int = 3


async def health_trouble(client: VllmClient) -> str:
    """Check the server's health once; return REFUSED, MISSED, UNASKED when no connection could be opened from
    here, or nothing for a healthy one."""
    try:
        return "" if await client.healthy() else MISSED
    except NoDescriptors:
        return UNASKED
    except EngineError as error:
        return REFUSED if isinstance(error, EngineUnreachable) and error.refused else MISSED


async def until_unhealthy(
    client: VllmClient, suspicion: asyncio.Event, pace: HealthPace, *, refused_is_gone: bool
) -> str:
    """Check at ``pace``, and return the reason once the instance counts as gone.

    Setting ``suspicion`` brings the next check forward; while checks then miss, they follow at once. One
    refused connection is enough when ``refused_is_gone``, else it counts as a miss.
    """
    clock = asyncio.get_running_loop().time
    running = LoopTime.here()
    missed = 0.0
    hurried = False
    began_s = clock()
    while True:
        rest_s = 0.0 if hurried and missed else began_s + pace.every_s - clock()
        try:
            async with asyncio.timeout(max(SHORTEST_PAUSE_S, rest_s)):
                await suspicion.wait()
            suspicion.clear()
            hurried = True
        except TimeoutError:
            pass
        began_s, began = clock(), running.mark()
        trouble = await health_trouble(client)
        if not trouble:
            missed, hurried = 0.0, False
            continue
        if trouble == UNASKED:
            continue
        missed += max(0.0, 1.0 - running.lost_s(began) / pace.deadline_s)
        if missed >= pace.misses or (refused_is_gone and trouble == REFUSED):
            return trouble


async def end_watch(tasks: set[asyncio.Task[None]], session: aiohttp.ClientSession | None) -> None:
    """Cancel a fleet's ``tasks``, wait until they have ended, close its session; idempotent."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if session is not None:
        await session.close()
