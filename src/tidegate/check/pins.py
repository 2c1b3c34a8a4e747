"""KV that the check has pinned on servers, and how it lets go of it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from tidegate.check.server import ProbedServer
from tidegate.check.verdict import Json
from tidegate.core.errors import EngineError

RELEASE_S = 3.0
WAKE_S = 0.3
WAKE_STEPS = 3


class PinnedHandles:
    """Handles that were given out and not yet taken or let go.

    vLLM frees pinned blocks when another server has pulled them, when another server refuses a request that
    came with the handle, or when the lease ends.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, Json]] = {}
        self._kept: set[str] = set()
        self._takers: dict[str, list[str]] = {}
        self._unreachable: set[str] = set()
        self._given: dict[str, int] = {}

    def add(self, owner: str, params: Json) -> None:
        """Take note of a handle that ``owner`` gave."""
        self._held[_name(params)] = (owner, params)
        self._given[owner] = self._given.get(owner, 0) + 1

    def keep(self, params: Json) -> None:
        """Have the handle stay until ``release_all``, or ``forget``."""
        self._kept.add(_name(params))

    def taken(self, params: Json, taker: str) -> None:
        """Take note that ``taker`` has pulled the KV: its owner has freed it, and ``taker`` can reach it."""
        owner, _ = self._held.pop(_name(params), ("", {}))
        if owner and taker not in self._takers.setdefault(owner, []):
            self._takers[owner].append(taker)

    def missed(self, params: Json) -> None:
        """Take note that a pull failed: its owner may not be reachable for anybody."""
        self._unreachable.add(self._held.get(_name(params), ("", {}))[0])

    def forget(self, params: Json) -> None:
        """Take note that the handle's lease is over."""
        self._held.pop(_name(params), None)

    def given_by(self, owner: str) -> int:
        """Return how many handles of ``owner`` were given out so far."""
        return self._given.get(owner, 0)

    def held_by(self, owner: str) -> int:
        """Return how many handles of ``owner`` are still out."""
        return sum(name == owner for name, _ in self._held.values())

    async def release(self, servers: Mapping[str, ProbedServer], owners: Collection[str]) -> None:
        """Have what is held of ``owners`` freed by those who pulled from them, but for what is kept. Never
        raises for what servers do."""
        names = [
            name for name, (owner, _) in self._held.items() if owner in owners and name not in self._kept
        ]
        await self._release(servers, names)

    async def release_all(self, servers: Mapping[str, ProbedServer]) -> None:
        """Have everything freed, as far as somebody can reach its owner. Never raises for what servers do."""
        await self._release(servers, list(self._held))
        strangers: dict[str, ProbedServer] = {}
        for owner in {owner for owner, _ in self._held.values()} - self._unreachable:
            strangers.update((owner, servers[other]) for other in servers if other != owner)
        names = [name for name, (owner, _) in self._held.items() if owner in strangers]
        done = await asyncio.gather(
            *(_refuse(strangers[self._held[name][0]], self._held[name][1]) for name in names)
        )
        for name, freed in zip(names, done, strict=True):
            if freed:
                owner, _ = self._held.pop(name)
                await _wake(strangers[owner])

    async def _release(self, servers: Mapping[str, ProbedServer], names: Collection[str]) -> None:
        wanted = [
            (name, servers[taker])
            for name in names
            for taker in self._takers.get(self._held[name][0], [])[:1]
        ]
        done = await asyncio.gather(*(_refuse(server, self._held[name][1]) for name, server in wanted))
        for (name, _), freed in zip(wanted, done, strict=True):
            if freed:
                self._held.pop(name, None)


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


async def _refuse(taker: ProbedServer, params: Json) -> bool:
    """Have ``taker`` refuse a request with the handle; tell whether it did."""
    kv = {**params, "do_remote_prefill": True, "do_remote_decode": False}
    try:
        return await taker.decline(kv, deadline_s=RELEASE_S)
    except EngineError:
        return False
