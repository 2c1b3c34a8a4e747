"""Runs the legs of one request, one after the other."""

from __future__ import annotations

from tidegate.core.errors import EngineError, EngineTimeout, KvLost
from tidegate.engines.seam import KvHandle, Leg, LegEnd
from tidegate.gateway import continuation
from tidegate.gateway.call import Call
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.gateway.legs import Legs
from tidegate.gateway.upstream import Upstream
from tidegate.policies.order import Ticket
from tidegate.protocol.chunks import Tokens

EXPORT_S = 5.0
"""How long a prefill waits for another instance to pin what it would read (ours); then it computes."""


class _Ignored:
    """Takes tokens that nobody asked for."""

    def tokens(self, tokens: Tokens) -> None:
        """See ``TokensSink.tokens``."""

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""


class LegRunner:
    """Builds the legs of one request, runs them and sees to the KV that they leave. ``legs`` takes the
    tokens."""

    def __init__(self, call: Call, dispatcher: Dispatcher, legs: Legs) -> None:
        self._call = call
        self._dispatcher = dispatcher
        self._legs = legs

    async def run(
        self,
        upstream: Upstream,
        *,
        hand_over: bool = False,
        most: int | None = None,
        handle: KvHandle | None = None,
        extend: KvHandle | None = None,
        ticket: Ticket | None = None,
    ) -> LegEnd:
        """Run one leg over at most ``most`` tokens.

        With ``hand_over`` another leg continues it, with the KV behind its handle where instances can pull.
        Without, it ends the answer, unless it was stopped so that the decode migrates. A ``handle`` that
        cannot be used, or was not, is released. ``extend`` is one that covers the beginning of the prompt of
        a leg that hands over. The ticket goes to an engine that orders by it, unless the answer has begun.

        Raises what ``Engine.run`` raises unless the answer is complete by then, PromptTooLong when the prompt
        turns out not to fit, and ClientGone.
        """
        call, dispatcher, legs = self._call, self._dispatcher, self._legs
        now = dispatcher.clock.now()
        capabilities = upstream.member.capabilities
        # With nobody to pull or decline it, what vLLM pins is held until its lease ends: it fills the cache.
        wanted = capabilities.continues or len(dispatcher.upstreams) > 1
        pin = hand_over and wanted and upstream.member.produces_kv
        held = extend if handle is None else handle
        loaded = held if held is not None and dispatcher.handles.usable(held, upstream) else None
        ordered = capabilities.orders and not legs.out_ids
        begun = legs.begin(upstream, hand_over=hand_over, handle=None if hand_over else loaded)
        if most is None:
            most = legs.remaining_after(begun)
        sampling = continuation.continuing if capabilities.continues else continuation.beginning
        leg = Leg(
            request_id=f"{call.id}-{legs.count}",
            prompt=call.prompt if legs.prompt_ids is None else [*legs.prompt_ids, *legs.out_ids[:begun]],
            messages=call.messages,
            max_tokens=most,
            sampling=sampling(call, begun, most),
            generated=begun,
            pin=pin,
            handle=loaded,
            salt=call.salt,
            ticket=ticket.on_clock(-now) if ticket is not None and ordered else None,
        )
        try:
            legs.check_limit()
            end = await upstream.engine.run(leg, legs, deadline_s=self._left_s(now))
        except BaseException as error:
            # The answer may have been lost on the way: the engine then holds a pin nobody knows of.
            if pin:
                dispatcher.background(upstream.engine.release_request(leg.request_id))
            if isinstance(error, KvLost) and held is not None:
                dispatcher.handles.suspect_owner(held)
            if isinstance(error, EngineError) and legs.finish_reason is not None:
                return LegEnd()
            raise
        finally:
            if held is not None and (loaded is None or legs.first_s is None):
                dispatcher.handles.release(held, sent=loaded is not None)
        if loaded is not None and not pin and not legs.stopped:
            dispatcher.loads.kept(upstream.member.instance.id, legs.prompt_tokens + len(legs.out_ids))
        if legs.finish_reason is None and legs.refusal is None:
            return end
        if end.handle is not None:
            dispatcher.handles.release(end.handle)
        legs.check_limit()
        return LegEnd(times=end.times)

    async def tokenise(self, upstream: Upstream) -> bool:
        """Have an engine tokenise the prompt ahead of its first leg; False when it cannot. Raises
        EngineError."""
        if self._legs.prompt_ids is None:
            call = self._call
            ids = await upstream.engine.tokenise(call.prompt, call.messages, call.sampling)
            if ids is None:
                return False
            self._legs.learn_prompt(ids, upstream)
        return True

    async def export(self, holder: Upstream, tokens: int) -> KvHandle | None:
        """Have an instance whose prefix cache holds the first ``tokens`` of the prompt pin them.

        The one token that this makes is nobody's. Raises EngineError.
        """
        legs = self._legs
        assert legs.prompt_ids is not None
        legs.count += 1
        leg = Leg(
            request_id=f"{self._call.id}-{legs.count}",
            prompt=legs.prompt_ids[:tokens],
            messages=None,
            max_tokens=1,
            sampling={"temperature": 0},
            pin=True,
            salt=self._call.salt,
        )
        left_s = self._left_s(self._dispatcher.clock.now())
        return (await holder.engine.run(leg, _Ignored(), deadline_s=min(EXPORT_S, left_s))).handle

    def _left_s(self, now: float) -> float:
        """Return the seconds until the request's deadline. Raises EngineTimeout when it has passed."""
        left_s = self._legs.deadline_s - now
        if left_s <= 0:
            deadline_s = self._dispatcher.settings.request_deadline_s
            raise EngineTimeout(f"the request's deadline of {deadline_s:g} s has passed")
        return left_s
