"""What the SGLang tests share: stand-ins and the engines in front of them, a sink, legs."""

from __future__ import annotations

import asyncio

from sglang_contract import Fabric, StandIn

from tidegate.engines.seam import KvHandle, Leg, Tokens
from tidegate.engines.sglang.engine import SglangEngine, SglangPeers
from tidegate.engines.sglang.server import connect_sglang


class Taken:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.pieces: list[Tokens] = []
        self.first = asyncio.Event()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> str | None:
        return self.pieces[-1].finish_reason

    def tokens(self, tokens: Tokens) -> None:
        self.pieces.append(tokens)
        self.ids += tokens.token_ids
        self.first.set()

    def plain(self, text: str, token_ids: list[int]) -> None:
        self.tokens(Tokens(text, token_ids))


class Split:
    """Stand-ins by name and their engines; what they share."""

    def __init__(self) -> None:
        self.fabric = Fabric()
        self.peers = SglangPeers()
        self.servers: dict[str, StandIn] = {}
        self.engines: dict[str, SglangEngine] = {}

    async def add(self, name: str, role: str, **launch: object) -> SglangEngine:
        """Start a server and connect to it."""
        server = StandIn(self.fabric, role, bootstrap_port=9000 + len(self.servers), **launch)
        self.servers[name] = server
        await server.up()
        return await self.connect(name)

    async def connect(self, name: str) -> SglangEngine:
        """Connect to a server that is up."""
        url = self.servers[name].url
        known = await connect_sglang(name, url, engine_id=f"{name}-a", connect_s=10.0, stall_s=30.0)
        engine = self.engines[name] = SglangEngine(known, self.peers)
        return engine

    async def quiet(self) -> None:
        """Return when no request is open anywhere, here or on a server."""
        async with asyncio.timeout(20.0):
            while self.peers.rooms or any(server.running for server in self.servers.values()):
                await asyncio.sleep(0.01)


def leg(
    prompt: list[int] | str,
    max_tokens: int | None,
    *,
    request_id: str = "cmpl-1-1",
    pin: bool = False,
    handle: KvHandle | None = None,
    generated: int = 0,
    **sampling: object,
) -> Leg:
    """Return a greedy leg."""
    return Leg(
        request_id=request_id,
        prompt=prompt,
        messages=None,
        max_tokens=max_tokens,
        sampling={"temperature": 0} | sampling,
        generated=generated,
        pin=pin,
        handle=handle,
    )
