"""One vLLM server as the probes of a check see it, and the KV that they have pinned on servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import aiohttp

from tidegate.core.errors import EngineError, EngineFault, SetupError
from tidegate.engines.seam import Json
from tidegate.engines.vllm.client import Reply, ServerFacts, VllmClient
from tidegate.engines.vllm.metrics import VllmMetrics

METRICS_LAG_S = 2.0
"""How long metrics may lag behind an answer: servers write them after the step that made it."""
METRICS_POLL_S = 0.05
RELEASE_S = 3.0
WAKE_S = 0.3
WAKE_STEPS = 3


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a server may take for a plain question, for a leg of a few tokens, and for a leg whose KV
    cannot come: vLLM waits 5 s for a peer."""

    ask_s: float = 5.0
    leg_s: float = 20.0
    dead_peer_s: float = 15.0


@dataclass(frozen=True, slots=True)
class SelfDescription:
    """What one server says of itself. ``clock_skew_s``: its clock minus ours, None without a Date header."""

    facts: ServerFacts
    version: str
    clock_skew_s: float | None


class ProbedServer(VllmClient):
    """A client of the server with the id ``name``, which enters every handle of an answer in ``pins``."""

    def __init__(
        self,
        name: str,
        url: str,
        session: aiohttp.ClientSession,
        pins: PinnedHandles,
        deadlines: Deadlines,
        api_key: str,
    ) -> None:
        ask_s, leg_s = deadlines.ask_s, deadlines.leg_s
        super().__init__(session, url, instance=name, api_key=api_key, deadline_s=ask_s, completion_s=leg_s)
        self.id = name
        self.dead_peer_s = deadlines.dead_peer_s
        self._pins = pins

    async def describe(self) -> SelfDescription:
        """Ask the server what it is. Raises EngineError when it does not answer as a vLLM server does."""
        try:
            health, facts, version = await asyncio.gather(self.ask("/health"), self.facts(), self.version())
        except SetupError as error:
            raise EngineFault(error.message, instance=self.id) from None
        if health.status != 200:
            raise EngineFault(f"/health answers {health.error}", instance=self.id)
        return SelfDescription(facts, version or "unknown", health.clock_skew_s)

    async def ask(self, path: str, body: Json | None = None, *, deadline_s: float | None = None) -> Reply:
        """See ``VllmClient.ask``."""
        reply = await super().ask(path, body, deadline_s=deadline_s)
        if reply.kv_params is not None:
            self._pins.add(self.id, reply.kv_params)
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


class PinnedHandles:
    """Handles that servers gave and nobody has taken or released yet.

    vLLM frees pinned blocks when another server has pulled them, when another server refuses a request that
    came with the handle, or when the lease ends.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, Json]] = {}
        self._kept: set[str] = set()
        self._takers: dict[str, str] = {}
        self._unreachable: set[str] = set()
        self._given: dict[str, int] = {}

    def add(self, owner: str, params: Json) -> None:
        """Enter a handle that ``owner`` gave."""
        self._held[_name(params)] = (owner, params)
        self._given[owner] = self._given.get(owner, 0) + 1

    def keep(self, params: Json) -> None:
        """Keep the handle until ``release_all`` or ``forget``."""
        self._kept.add(_name(params))

    def taken(self, params: Json, taker: str) -> None:
        """Enter that ``taker`` has pulled the KV: its owner has freed it, and ``taker`` can reach it."""
        owner, _ = self._held.pop(_name(params), ("", {}))
        if owner:
            self._takers.setdefault(owner, taker)

    def missed(self, params: Json) -> None:
        """Enter that a pull failed: perhaps nobody can reach its owner."""
        self._unreachable.add(self._held.get(_name(params), ("", {}))[0])

    def forget(self, params: Json) -> None:
        """Enter that the handle's lease is over."""
        self._held.pop(_name(params), None)

    def given_by(self, owner: str) -> int:
        """Return how many handles ``owner`` has given so far."""
        return self._given.get(owner, 0)

    def held_by(self, owner: str) -> int:
        """Return how many handles of ``owner`` are still pinned."""
        return sum(name == owner for name, _ in self._held.values())

    async def release(self, servers: Mapping[str, ProbedServer], owners: Collection[str]) -> None:
        """Have ``owners`` free what they pin, except what is kept, as far as somebody has pulled from them.
        Never raises for what servers do."""
        takers = {
            name: servers[self._takers[owner]]
            for name, (owner, _) in self._held.items()
            if owner in owners and owner in self._takers and name not in self._kept
        }
        await self._refuse(takers)

    async def release_all(self, servers: Mapping[str, ProbedServer]) -> None:
        """Have all owners free what they pin, as far as others reach them. Never raises for a server."""
        self._kept.clear()
        await self.release(servers, servers)
        strangers = {
            name: other
            for name, (owner, _) in self._held.items()
            if owner not in self._unreachable
            for other in servers.values()
            if other.id != owner
        }
        for name in await self._refuse(strangers):
            await _wake(strangers[name])

    async def _refuse(self, takers: Mapping[str, ProbedServer]) -> list[str]:
        """Send each handle to a server that refuses it; return the names of those that are freed by that."""

        async def refuse(name: str, taker: ProbedServer) -> bool:
            kv = {**self._held[name][1], "do_remote_prefill": True, "do_remote_decode": False}
            try:
                return await taker.decline(kv, deadline_s=RELEASE_S)
            except EngineError:
                return False

        refused = await asyncio.gather(*(refuse(*each) for each in takers.items()))
        freed = [name for name, done in zip(takers, refused, strict=True) if done]
        for name in freed:
            self._held.pop(name, None)
        return freed


def _name(params: Json) -> str:
    return str(params.get("remote_request_id"))


async def _wake(stranger: ProbedServer) -> None:
    """Have a server that has never pulled from the owner pass the refusal on: its handshake takes a moment,
    and what waits for it goes out with a later step, which an idle server does not make."""
    for _ in range(WAKE_STEPS):
        await asyncio.sleep(WAKE_S)
        try:
            await stranger.complete([0], 1, deadline_s=RELEASE_S)
        except EngineError:
            return
