"""One vLLM server as the probes of a check see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from tidegate.engines.seam import Json
from tidegate.engines.vllm.client import Reply, VllmClient
from tidegate.engines.vllm.metrics import VllmMetrics

METRICS_LAG_S = 2.0
"""How long metrics may lag behind an answer: servers write them after the step that made it."""
METRICS_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a server may take for a plain question, for a leg of a few tokens, and for a leg whose KV
    cannot come: vLLM waits 5 s for a peer."""

    ask_s: float = 5.0
    leg_s: float = 20.0
    dead_peer_s: float = 15.0


class ProbedServer(VllmClient):
    """A client of the server with the id ``name``, which tells ``pinned`` of every handle in an answer."""

    def __init__(
        self,
        name: str,
        url: str,
        session: aiohttp.ClientSession,
        *,
        deadlines: Deadlines,
        api_key: str,
        pinned: Callable[[str, Json], None],
    ) -> None:
        super().__init__(
            session,
            url,
            instance=name,
            api_key=api_key,
            deadline_s=deadlines.ask_s,
            completion_s=deadlines.leg_s,
        )
        self.id = name
        self.dead_peer_s = deadlines.dead_peer_s
        self._pinned = pinned

    async def complete(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        kv: Json | None = None,
        salt: str = "",
        deadline_s: float | None = None,
    ) -> Reply:
        """See ``VllmClient.complete``."""
        reply = await super().complete(prompt, max_tokens, kv=kv, salt=salt, deadline_s=deadline_s)
        if reply.kv_params is not None:
            self._pinned(self.id, reply.kv_params)
        return reply

    async def metrics_once(
        self, holds: Callable[[VllmMetrics], bool], *, within_s: float = METRICS_LAG_S
    ) -> VllmMetrics:
        """Read the metrics until ``holds``, or until ``within_s`` have passed; return the last reading."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + within_s
        while True:
            metrics = await self.metrics()
            if holds(metrics) or clock() >= end_s:
                return metrics
            await asyncio.sleep(METRICS_POLL_S)
