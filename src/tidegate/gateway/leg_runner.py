"""Runs the legs of one request, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Migrate
from tidegate.core.errors import EngineError, EngineTimeout, KvLost
from tidegate.engines.seam import KvHandle, Leg, LegEnd, LegTimes
from tidegate.gateway import leg_sampling
from tidegate.gateway.call import Call
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.gateway.legs import Legs
from tidegate.gateway.upstream import Upstream
from tidegate.policies.order import Ticket
from tidegate.protocol.chunks import Tokens

EXPORT_S = 5.0
"""How long a prefill waits for another instance to pin what it would read (ours); then it computes."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The answer is complete."""

    times: LegTimes


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The leg ended as far as it was to go; the KV behind ``handle`` (None: none) continues it."""

    times: LegTimes
    handle: KvHandle | None


@dataclass(frozen=True, slots=True)
class Migrating:
    """The leg was ended so that the decode moves."""

    migrate: Migrate


LegResult = Completed | HandedOver | Migrating


class _Ignored:
    """Takes tokens that nobody asked for."""

    def tokens(self, tokens: Tokens) -> None:
        """See ``TokensSink.tokens``."""

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""


class LegRunner:
    """Builds the legs of one request, runs them and sees to the KV that they leave. ``legs`` takes the
    tokens."""

    def __init__(self, call: Call, dispatcher: Dispatcher, legs: Legs, deadline_s: float) -> None:
        self._call = call
        self._dispatcher = dispatcher
        self._deadline_s = deadline_s
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
    ) -> LegResult:
        """Run one leg over at most ``most`` tokens and return what happened.

        With ``hand_over`` another leg continues it, pulling its KV where instances can; only such a leg ends
        ``HandedOver``. Only another one ends ``Migrating``. A ``handle`` that cannot be used, or was not, is
        released. ``extend`` is one that covers the beginning of the prompt of a leg that hands over. The
        ticket goes to an engine that orders by it, unless the answer has begun already.

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
            most = legs.limit.remaining(begun)
        sampling = leg_sampling.continuing if capabilities.continues else leg_sampling.beginning
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
            legs.limit.check()
            end = await upstream.engine.run(leg, legs, deadline_s=self._left_s(now))
        except BaseException as error:
            # The answer may have been lost on the way: the engine then holds a pin nobody knows of.
            if pin:
                dispatcher.background(upstream.engine.release_request(leg.request_id))
            if isinstance(error, KvLost) and held is not None:
                dispatcher.handles.suspect_owner(held)
            if isinstance(error, EngineError) and legs.finish_reason is not None:
                return Completed(LegTimes())
            raise
        finally:
            if held is not None and (loaded is None or legs.first_s is None):
                dispatcher.handles.release(held, sent=loaded is not None)
        if loaded is not None and not pin and not legs.stopped:
            dispatcher.loads.kept(upstream.member.instance.id, legs.prompt_tokens + len(legs.out_ids))
        return self._result(end)

    def _result(self, end: LegEnd) -> LegResult:
        legs = self._legs
        if legs.finish_reason is None and legs.limit.refusal is None:
            migrate = legs.migration_begun()
            return HandedOver(end.times, end.handle) if migrate is None else Migrating(migrate)
        if end.handle is not None:
            self._dispatcher.handles.release(end.handle)
        legs.limit.check()
        return Completed(end.times)

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
        left_s = self._deadline_s - now
        if left_s <= 0:
            deadline_s = self._dispatcher.settings.request_deadline_s
            raise EngineTimeout(f"the request's deadline of {deadline_s:g} s has passed")
        return left_s
