"""SGLang servers behind the engine seam."""

from __future__ import annotations

import asyncio
import secrets

from tidegate.core.errors import BadRequest, ClientError, EngineFault, KvLost, PromptTooLong
from tidegate.core.instance import Role
from tidegate.engines.seam import Json, KvHandle, Leg, LegEnd, Tokens, TokensSink
from tidegate.engines.sglang.request import generate_body
from tidegate.engines.sglang.room import HiddenStates, Room
from tidegate.engines.sglang.server import SglangServer

LEASE_S = 30.0
"""How long a room waits for its decode leg (ours): its decode server generates on meanwhile."""


class SglangPeers:
    """The SGLang servers that are up and the rooms that are open between them. One for a fleet.

    ``hidden_states`` is given those of every prompt; the prefill servers must have been started with
    ``--enable-return-hidden-states``.
    """

    def __init__(self, *, hidden_states: HiddenStates | None = None, lease_s: float = LEASE_S) -> None:
        self.servers: dict[str, SglangServer] = {}
        self.rooms: dict[int, Room] = {}
        self.hidden_states = hidden_states
        self.lease_s = lease_s

    def room_for(self, server: SglangServer) -> Room:
        """Return a new room on ``server`` and the peer of the other role with the fewest rooms.

        Raises EngineFault when there is none, or ``server`` is being drained.
        """
        if server.draining:
            raise EngineFault(f"{server.instance} is changing its role and takes no requests")
        wanted = Role.PREFILL if server.role is Role.DECODE else Role.DECODE
        peers = [peer for peer in self.servers.values() if peer.role is wanted and not peer.draining]
        if not peers:
            raise EngineFault(f"no {wanted.label} server is up to pair {server.instance} with")
        peer = min(peers, key=lambda peer: (peer.rooms, peer.instance))
        prefill, decode = (peer, server) if wanted is Role.PREFILL else (server, peer)
        room = Room(secrets.randbits(63), prefill, decode, lease_s=self.lease_s)
        self.rooms[room.number] = room
        for side in (prefill, decode):
            side.rooms += 1
            side.idle.clear()
        return room

    def closed(self, room: Room) -> None:
        """Take a room off the books."""
        del self.rooms[room.number]
        for side in (room.prefill, room.decode):
            side.rooms -= 1
            if not side.rooms:
                side.idle.set()

    async def switch_role(self, instance: str, role: Role, *, drain_s: float) -> None:
        """See ``SglangServer.switch_role``; a new decode server captures the graphs that the others have."""
        graphs = [peer.facts.decode_graphs for peer in self.servers.values() if peer.role is Role.DECODE]
        known = next((graph for graph in graphs if graph), {})
        await self.servers[instance].switch_role(role, drain_s=drain_s, decode_graphs=known)


class SglangEngine:
    """Calls one SGLang server as an ``Engine``, with the help of its peers.

    SGLang starts a request's prefill and decode at once: the prefill server computes nothing before a decode
    server has reserved room for the KV, and all tokens, the first one too, come from the decode server. The
    gateway places the decode behind the first token. Both hold because a leg opens a ``Room`` on a pair:

    - A leg that pins opens it on this server and the peer of the other role with the fewest rooms. It takes
      the first token and leaves the room open; its handle names the room and belongs to the decode server of
      the pair. Nobody knows yet how much the request may generate, so the room is opened for all that the
      context leaves.
    - A leg with that handle goes on in the room, on that decode server only: another one ``refuses`` the
      handle, and the request is computed again. It begins with the tokens that were said already, as with
      vLLM. Where it ends before the room does, the servers are told to abort.
    - A leg without either opens a room and stays in it to the end, whichever role this server has.

    KV does not move once a decode runs. A leg with ``min_tokens`` hands no room on, since the leg behind it
    has another minimum.
    """

    def __init__(self, server: SglangServer, peers: SglangPeers) -> None:
        self.server = server
        self.instance, self.engine_id = server.instance, server.engine_id
        self._peers = peers
        peers.servers[server.instance] = server

    async def run(self, leg: Leg, sink: TokensSink, *, deadline_s: float) -> LegEnd:
        """See ``Engine.run``."""
        hands_on = leg.pin and not leg.sampling.get("min_tokens")
        try:
            if leg.handle is not None and not leg.pin:
                room = self._entered(leg)
            else:
                room = await self._open(leg, sink, deadline_s)
            await room.deliver(sink, leg.max_tokens, last=not hands_on)
        except ClientError as error:
            if not leg.generated and leg.handle is None:
                raise
            # The client's own request passed before: what is refused is what the gateway made of it.
            raise EngineFault(
                f"refused a continued leg: {error.message}", instance=self.instance, stage="decode"
            ) from None
        if not hands_on or room.ended:
            return LegEnd()
        expires_s = asyncio.get_running_loop().time() + self._peers.lease_s
        params = {"bootstrap_room": room.number}
        return LegEnd(KvHandle(params, room.decode.engine_id, room.prompt_tokens, expires_s))

    async def tokenise(
        self, prompt: list[int] | str | None, messages: list[Json] | None, sampling: Json
    ) -> list[int] | None:
        """See ``Engine.tokenise``; None for a chat."""
        return await self.server.tokenise(prompt) if isinstance(prompt, str) else prompt

    def refuses(self, handle: KvHandle) -> str | None:
        """See ``Engine.refuses``."""
        room = self._room(handle)
        if room is None or room.ended:
            return "expired"
        return None if handle.owner == self.engine_id else "elsewhere"

    def owner_gone(self, owner: str) -> None:
        """See ``Engine.owner_gone``: a decode server waits for minutes before it gives up."""
        for room in list(self._peers.rooms.values()):
            if room.prefill.engine_id == owner and room.decode is self.server:
                room.lost_prefill()

    async def release(self, handle: KvHandle) -> None:
        """See ``Engine.release``."""
        room = self._room(handle)
        if room is not None:
            room.close()

    async def decline(self, handle: KvHandle) -> None:
        """See ``Engine.decline``."""
        await self.release(handle)

    async def release_request(self, request_id: str) -> None:
        """See ``Engine.release_request``."""
        for room in list(self._peers.rooms.values()):
            if room.request_id == request_id:
                room.close()

    def close(self, reason: str) -> None:
        """See ``Engine.close``. Rooms that need this server fail."""
        if self._peers.servers.get(self.instance) is self.server:
            del self._peers.servers[self.instance]
        self.server.wire.drop(reason)

    def _room(self, handle: KvHandle) -> Room | None:
        return self._peers.rooms.get(handle.params["bootstrap_room"])

    def _entered(self, leg: Leg) -> Room:
        """Return the room behind the leg's handle."""
        assert leg.handle is not None and isinstance(leg.prompt, list)
        refused, room = self.refuses(leg.handle), self._room(leg.handle)
        if refused is None and len(leg.prompt) != leg.handle.tokens:
            refused = f"covers {leg.handle.tokens} tokens, the leg's prompt has {len(leg.prompt)}"
        if refused is not None or room is None:
            raise KvLost(f"the handle is of no use: {refused}", instance=self.instance, stage="decode")
        return room

    async def _open(self, leg: Leg, sink: TokensSink, deadline_s: float) -> Room:
        if leg.handle is not None:
            await self.release(leg.handle)  # A prefill reads no KV of others.
        prompt = await self.tokenise(leg.prompt, leg.messages, leg.sampling)
        if prompt is None:
            raise BadRequest("chats are not served by SGLang servers; send a prompt", param="messages")
        if prompt is not leg.prompt:
            sink.tokens(Tokens("", [], prompt_token_ids=prompt))
        space = self.server.facts.max_model_len - len(prompt)
        if space < 1:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens: no room to answer", param="prompt")
        wanted = space if leg.pin or leg.max_tokens is None else min(leg.max_tokens, space)
        body = generate_body(leg, prompt, wanted)
        room = self._peers.room_for(self.server)
        room.open(
            leg,
            body,
            hidden_states=self._peers.hidden_states,
            deadline_s=deadline_s,
            closed=self._peers.closed,
        )
        return room
