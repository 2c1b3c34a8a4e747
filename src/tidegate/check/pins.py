"""KV that the check has pinned on servers, and how it lets go of it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from tidegate.check.server import Server
from tidegate.check.verdict import Json
from tidegate.core.errors import EngineError

UNSERVABLE_TOKENS = 1 << 30
"""More output than any server allows: the request is refused before any work, and the pin's owner is told."""
RELEASE_S = 3.0


class Pins:
    """Handles that were given out and not yet taken or let go.

    vLLM frees pinned blocks when another server has pulled them, when another server refuses a request that
    came with the handle, or when the lease ends.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, Json]] = {}
        self._takers: dict[str, list[str]] = {}

    def add(self, owner: str, params: Json) -> None:
        """Take note of a handle that ``owner`` gave."""
        self._held[str(params.get("remote_request_id"))] = (owner, params)

    def taken(self, params: Json, taker: str) -> None:
        """Take note that ``taker`` has pulled the KV: its owner has freed it, and ``taker`` can reach it."""
        owner, _ = self._held.pop(str(params.get("remote_request_id")), ("", {}))
        if owner and taker not in self._takers.setdefault(owner, []):
            self._takers[owner].append(taker)

    def forget(self, params: Json) -> None:
        """Take note that the handle's lease is over."""
        self._held.pop(str(params.get("remote_request_id")), None)

    def held_by(self, owner: str) -> int:
        """Return how many handles of ``owner`` are still out."""
        return sum(name == owner for name, _ in self._held.values())

    async def release(self, servers: Mapping[str, Server], owners: Collection[str]) -> None:
        """Have all that is still held of ``owners`` freed, as far as somebody can reach them. Never raises
        for what servers do."""
        wanted = [
            (request_id, servers[taker], params)
            for request_id, (owner, params) in self._held.items()
            if owner in owners
            for taker in self._takers.get(owner, [])[:1]
        ]
        done = await asyncio.gather(*(_refuse(taker, params) for _, taker, params in wanted))
        for (request_id, _, _), freed in zip(wanted, done, strict=True):
            if freed:
                del self._held[request_id]


async def _refuse(taker: Server, params: Json) -> bool:
    """Have ``taker`` refuse a request with the handle; tell whether it did."""
    kv = {**params, "do_remote_prefill": True, "do_remote_decode": False}
    try:
        reply = await taker.send([0], UNSERVABLE_TOKENS, kv=kv, deadline_s=RELEASE_S)
    except EngineError:
        return False
    return 400 <= reply.status < 500
