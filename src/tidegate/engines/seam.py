"""The interface between the gateway and any engine: legs in, tokens out."""

from __future__ import annotations

import math
from typing import Any, Protocol

import msgspec

from tidegate.policies.order import Ticket
from tidegate.protocol.chunks import Tokens

Json = dict[str, Any]

STAGE_MARK = "tidegate-stage: "
"""What a line on an engine's stdout begins with that says how far its start is."""


class KvHandle(msgspec.Struct, frozen=True):
    """KV pinned on an instance after a leg, as the engine described it in ``params``.

    ``owner`` is the ``Member.engine_id`` of the process that holds it, with which it ends. It covers exactly
    the first ``tokens`` of the leg's prompt. Its lease ends at ``expires_s`` of the event loop's time; inf
    where the owner itself refuses late pulls.
    """

    params: Json
    owner: str = ""
    tokens: int = 0
    expires_s: float = math.inf


class RunningLeg(msgspec.Struct, frozen=True):
    """A leg that decodes on the engine ``engine_id``, whose KV channel listens at ``host``:``port``."""

    engine_id: str
    request_id: str
    host: str
    port: int


class Leg(msgspec.Struct, frozen=True):
    """One call to one engine: a part of a request.

    ``prompt`` is token ids, or the text of a client while no engine has tokenised it. A chat has
    ``messages``, and token ids in ``prompt`` once they are known; the last ``generated`` ids are earlier
    output. ``pin`` asks for a handle at the end. ``sampling`` are the
    body fields that all legs share. ``ticket``, for an engine with the capability ``orders``, is on a clock
    that shows 0 when the leg is sent. Another leg may take a ``movable`` one over while it decodes: one that
    ``follows`` it, begins behind its last token and says so in its first piece (``Tokens.moved``).
    """

    request_id: str
    prompt: list[int] | str | None
    messages: list[Json] | None
    max_tokens: int | None
    sampling: Json
    generated: int = 0
    pin: bool = False
    handle: KvHandle | None = None
    salt: str = ""
    ticket: Ticket | None = None
    movable: bool = False
    follows: RunningLeg | None = None

    @property
    def whole(self) -> bool:
        """Whether it is answered in one piece: streams bring neither handles nor ``prompt_logprobs``."""
        return self.pin or "prompt_logprobs" in self.sampling


class TokensSink(Protocol):
    """Takes a leg's pieces on the event loop, in order. One that returns True has the leg end there: it gets
    nothing more, and ``Engine.run`` returns. What it raises ends the leg, too, and is raised by
    ``Engine.run``."""

    def tokens(self, tokens: Tokens) -> bool | None:
        """Take any piece."""

    def plain(self, text: str, token_ids: list[int]) -> bool | None:
        """Take a piece that is only text and ids, as nearly all are: the short way through the relay."""


class IgnoredTokens:
    """Takes tokens that nobody asked for: a ``TokensSink``."""

    def tokens(self, tokens: Tokens) -> None:
        """See ``TokensSink.tokens``."""

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""


class LegTimes(msgspec.Struct, frozen=True):
    """Where a leg's time went inside the engine, in seconds; None where the engine does not say."""

    queue_s: float | None = None
    kv_load_s: float | None = None
    prefill_s: float | None = None
    kv_loaded_tokens: int = 0
    kv_loaded_bytes: int = 0
    cached_tokens: int = 0


class LegEnd(msgspec.Struct, frozen=True):
    """How a leg ended, after its last Tokens were delivered, or its sink ended it."""

    handle: KvHandle | None = None
    times: LegTimes = LegTimes()


class Engine(Protocol):
    """One engine instance, called over the network."""

    async def run(self, leg: Leg, sink: TokensSink, *, deadline_s: float) -> LegEnd:
        """Run a leg to its end. Cancelling aborts it on the engine. Raises a ClientError when the engine
        refuses the request itself; EngineUnreachable, EngineTimeout, EngineFault or EngineBusy when another
        instance may try; KvLost when it may be tried without its handle."""

    async def tokenise(
        self, prompt: list[int] | str | None, messages: list[Json] | None, sampling: Json
    ) -> list[int] | None:
        """Return the ids of a prompt or a chat, as a leg would take them; None where engines are not asked
        that. Raises EngineError."""

    async def ask(self, path: str, body: bytes, *, deadline_s: float) -> bytes:
        """POST a question beside requests, and return the JSON it answers. Raises a ClientError when the
        engine refuses it, and EngineError."""

    def refuses(self, handle: KvHandle) -> str | None:
        """Say why this engine must not be sent ``handle``; None when it may. No I/O."""

    def owner_gone(self, owner: str) -> None:
        """Give up the legs that still wait for KV of the engine ``owner``; they fail with KvLost."""

    async def release(self, handle: KvHandle) -> None:
        """Free the KV of a handle of this engine now; failure is silent (the lease ends it)."""

    async def decline(self, handle: KvHandle) -> None:
        """Have the owner of another engine's handle free its KV, where the owner itself cannot be asked."""

    async def release_request(self, request_id: str) -> None:
        """Like ``release``, for a leg whose answer never arrived; unknown ids are ignored."""

    def close(self, reason: str) -> None:
        """Fail what is running with EngineUnreachable and close all connections."""
