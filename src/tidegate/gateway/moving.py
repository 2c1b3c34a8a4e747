"""A decode on its way to another instance in stages, while its stream goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate.core.errors import ClientError, EngineFault, TidegateError
from tidegate.engines.seam import Leg, LegEnd, TokensSink
from tidegate.gateway.call import Call
from tidegate.gateway.upstream import Upstream
from tidegate.protocol.chunks import MovedDecode, Tokens

MoveFailed = Callable[["StagedMove", str], None]


class StagedMove:
    """The leg at the destination ``dst``, which begins behind the last token of the leg that it follows.

    What it says is held back until ``carry_on``, for the source's stream may still be on its way; its first
    piece says how many tokens of the answer there are by then. ``failed`` hears of an end before that.
    """

    def __init__(self, dst: Upstream, leg: Leg, deadline_s: float, failed: MoveFailed) -> None:
        self.dst = dst
        self.leg = leg
        self._sink: TokensSink | None = None
        self._held: list[Tokens] = []
        self._moved: MovedDecode | None = None
        self._failed = failed
        self._begun = asyncio.Event()
        self._run = asyncio.create_task(dst.engine.run(leg, self, deadline_s=deadline_s))
        self._run.add_done_callback(self._ended)

    async def begun(self, delivered: int) -> MovedDecode:
        """Wait for the first piece; return what it says of the move. Raises why there is none to come, and
        EngineFault for one that goes on behind other tokens than the ``delivered`` ones, and ends the leg."""
        await self._begun.wait()
        moved = self._moved
        if moved is None:
            why = "the leg does not say where it begins"
            try:
                await self._run
            except ClientError as refused:
                why = refused.message
            raise self.drop(why)
        if moved.generated != delivered:
            raise self.drop(f"the decode goes on behind {moved.generated} tokens; {delivered} were delivered")
        return moved

    async def carry_on(self, sink: TokensSink) -> LegEnd:
        """Hand on what was held back and all that follows, until the leg ends."""
        self._sink = sink
        for piece in self._held:
            if sink.tokens(piece):
                self.drop()
                return LegEnd()
        self._held.clear()
        return await self._run

    def drop(self, why: str = "") -> EngineFault:
        """End the leg; the decode stays at its source if that has not given it up. Returns ``why`` as an
        error."""
        self._run.cancel()
        return EngineFault(why, instance=self.dst.member.instance.id, stage="decode")

    def tokens(self, tokens: Tokens) -> bool | None:
        """See ``TokensSink.tokens``."""
        if self._sink is not None:
            return self._sink.tokens(tokens)
        if not self._held:
            self._moved = tokens.moved
            self._begun.set()
        self._held.append(tokens)
        return None

    def plain(self, text: str, token_ids: list[int]) -> bool | None:
        """See ``TokensSink.plain``."""
        if self._sink is not None:
            return self._sink.plain(text, token_ids)
        self._held.append(Tokens(text, token_ids))
        return None

    def _ended(self, run: asyncio.Task[LegEnd]) -> None:
        self._begun.set()
        error = None if run.cancelled() else run.exception()
        if error is None or self._sink is not None:
            return
        self._failed(self, error.message if isinstance(error, TidegateError) else repr(error))


def pinning_leg(call: Call, number: int, prompt_ids: list[int]) -> Leg:
    """Return the leg that has an engine pin what it has of a prompt; its one token is nobody's."""
    return Leg(
        request_id=f"{call.id}-{number}",
        prompt=prompt_ids,
        messages=None,
        max_tokens=1,
        sampling={"temperature": 0},
        pin=True,
        salt=call.salt,
    )
