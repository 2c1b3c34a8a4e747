"""One request's way through the cluster: placed, prefilled, handed over, decoded, replayed if it must."""

from __future__ import annotations

import asyncio

from tidegate.core.decision import Migrate, Path
from tidegate.core.errors import (
    EngineError,
    EngineFault,
    EngineTimeout,
    EngineUnreachable,
    InternalError,
    KvLost,
    PromptTooLong,
    TidegateError,
    status_of,
)
from tidegate.core.request import Request
from tidegate.engines.seam import KvHandle, Leg, LegEnd, Tokens
from tidegate.gateway.answers import Answer
from tidegate.gateway.call import Call
from tidegate.gateway.continuation import Continuation, NotRepeated, StopStrings
from tidegate.gateway.outcome import record
from tidegate.gateway.scheduler import Scheduler
from tidegate.gateway.token_estimate import TokenEstimate
from tidegate.gateway.upstream import Upstream
from tidegate.measure.rows import Ending, Story
from tidegate.policies.order import Ticket

DEADLY = 3
"""Instances that may die under a request before its first token; then it is taken for the cause (ours)."""


class _Leave(Exception):
    """Ends a stream whose decode is to go on elsewhere."""


class _Done(Exception):
    """Ends a stream behind the last token that is wanted."""


class Flight:
    """Serves one call. ``run`` returns when the last token was delivered, or raises a TidegateError.

    Whatever happens, the request leaves the ledger, engines abort what is no longer wanted, and the
    journal and metrics get one outcome. A flight is the ``TokensSink`` of its legs.
    """

    def __init__(
        self, call: Call, scheduler: Scheduler, estimate: TokenEstimate, answer: Answer, arrival_s: float
    ) -> None:
        self.call = call
        self.story = Story(arrival_s)
        self.prompt_ids: list[int] | None = call.prompt if isinstance(call.prompt, list) else None
        self.out_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._scheduler = scheduler
        self._ledger = scheduler.ledger
        self._clock = scheduler.clock
        self._estimate = estimate
        self._answer = answer
        self._deadline_s = arrival_s + scheduler.settings.request_deadline_s
        self._limit: int | None = call.max_tokens
        self._refusal: PromptTooLong | None = None
        self._failures = 0
        self._deaths = 0
        self._legs = 0
        self._leg_upstream: Upstream | None = None
        self._leg_first_s: float | None = None
        self._handing_over = False
        self._decoding = False
        self._seams: Continuation | None = None
        self._migrate: Migrate | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the client's prompt; an estimate until an engine has tokenised a text prompt."""
        if self.prompt_ids is not None:
            return len(self.prompt_ids)
        return self._estimate.tokens(self.call.prompt_chars)

    async def run(self) -> None:
        """Serve the request to its end."""
        self._scheduler.flights[self.call.id] = self
        error: TidegateError | None = None
        try:
            await self._until_finished()
        except TidegateError as failure:
            error = failure
            raise
        except asyncio.CancelledError:
            error = self._scheduler.cut_off()
            raise
        except Exception as failure:
            error = InternalError(f"{type(failure).__name__}: {failure}")
            raise
        finally:
            del self._scheduler.flights[self.call.id]
            self._close(error)

    async def _until_finished(self) -> None:
        while True:
            try:
                await self._attempt()
                return
            except EngineError as error:
                if self.finish_reason is not None:
                    return
                await self._prepare_replay(error)

    async def _prepare_replay(self, error: EngineError) -> None:
        """Account for a failed attempt. Raises ``error`` when the request may not be tried again."""
        scheduler, now = self._scheduler, self._clock.now()
        self._ledger.aborted(self.call.id, now)
        self._failures += 1
        label = status_of(error).label
        scheduler.journal.write(
            "failure",
            now,
            request=self.call.id,
            instance=error.instance,
            stage=error.stage,
            reason=label,
            message=error.message,
            generated=len(self.out_ids),
        )
        if isinstance(error, EngineUnreachable):
            self._deaths += 1
        poisonous = self._deaths >= DEADLY and not self.out_ids
        if self._failures > scheduler.settings.replays or now >= self._deadline_s or poisonous:
            raise error
        if isinstance(error, NotRepeated) and self.call.state:
            raise error
        scheduler.metrics.replays.labels(label).inc()
        self.story.replays += 1
        if error.instance and not isinstance(error, KvLost):
            await scheduler.confirm_failure(error.instance)

    async def _attempt(self) -> None:
        """Run the request, or what is left of it, from one placement of its prefill."""
        scheduler, story = self._scheduler, self.story
        self._decoding = False
        if self.prompt_ids is not None and not self.out_ids and scheduler.max_model_len:
            self._settle_limit(len(self.prompt_ids), scheduler.max_model_len)
        self._raise_refusal()
        if self._remaining() == 0:
            self._finish_at_limit()
            return
        dispatched = await scheduler.place_prefill(
            self._request(),
            kind="replay" if story.replays else "place_prefill",
            recovery_s=scheduler.settings.recovery_s if self.out_ids else 0.0,
            deadline_s=self._deadline_s,
        )
        place = dispatched.place
        story.prefill_on = place.prefill_on
        story.predicted_prefill_s = dispatched.predicted_prefill_s
        upstream = scheduler.upstreams[place.prefill_on]
        capabilities = upstream.member.capabilities
        beginning_anew = bool(self.call.state) and not capabilities.continues
        if beginning_anew:
            story.unmovable = self.call.state
        placed_s = self._clock.now()
        if place.path is Path.COLOCATED or (beginning_anew and not capabilities.kv_transfer):
            story.decode_on = place.prefill_on
            end = await self._to_the_end(upstream, ticket=dispatched.ticket)
            self._note_prefill(end, placed_s)
            self._note_decode(end, placed_s)
            return
        hand_over = self._remaining() != 1
        end = await self._run_leg(upstream, hand_over=hand_over, most=1, ticket=dispatched.ticket)
        self._note_prefill(end, placed_s)
        if self.finish_reason is None and self._refusal is None:
            await self._decode(upstream, end.handle)
        elif end.handle is not None:
            scheduler.handles.release(end.handle)
        self._raise_refusal()

    async def _decode(self, source: Upstream, handle: KvHandle | None) -> None:
        """Place the decode and run it, pulling the KV behind ``handle`` unless it is gone."""
        scheduler = self._scheduler
        now = self._clock.now()
        self._ledger.prefill_ended(self.call.id, now)
        try:
            name = scheduler.place_decode(self._request(), source.member.instance.id)
        except BaseException:
            if handle is not None:
                scheduler.handles.release(handle)
            raise
        self.story.decode_on = name
        self._decoding = True
        if name != source.member.instance.id:
            self._ledger.transfer_started(self.call.id, now)
        self._note_decode(await self._to_the_end(scheduler.upstreams[name], handle=handle), now)

    async def _to_the_end(
        self, upstream: Upstream, *, handle: KvHandle | None = None, ticket: Ticket | None = None
    ) -> LegEnd:
        """Run all that is left, on ``upstream`` first, then wherever migrations take it."""
        while True:
            try:
                return await self._run_leg(upstream, handle=handle, ticket=ticket)
            except _Leave:
                upstream, handle = await self._move(upstream)
                ticket = None
            if self.finish_reason is not None:
                return LegEnd()

    # migration

    def leave(self, migrate: Migrate) -> str:
        """Move the decode as ``migrate`` says, at its next token; return why not, "" when it will."""
        upstream = self._leg_upstream
        if not self._decoding or self._handing_over or upstream is None or self._leg_first_s is None:
            return "it does not decode"
        if upstream.member.instance.id != migrate.src:
            return f"it does not decode on {migrate.src}"
        if self._migrate is not None:
            return "it moves already"
        if self.story.unmovable:
            return f"its state cannot move: {self.story.unmovable}"
        if not upstream.member.capabilities.kv_transfer:
            return f"the KV of {migrate.src} cannot be moved"
        self._migrate = migrate
        return ""

    def _leave_if_told(self) -> None:
        """Raise _Leave where the answer may be cut: its text is whole, and something is left to generate."""
        whole = self._seams is None or self._seams.clean == len(self.out_ids)
        left = self._remaining()
        if whole and self.finish_reason is None and (left is None or left > 1):
            raise _Leave

    async def _move(self, src: Upstream) -> tuple[Upstream, KvHandle | None]:
        """Have the source pin what the stream has so far, and return where to go on, with the handle.

        The leg that does so brings one token: the stream waits for no transfer before it. The prefix cache
        of the source holds all but the last block of what the leg computes.
        """
        scheduler, story, migrate = self._scheduler, self.story, self._migrate
        assert migrate is not None
        scheduler.migrations.note(migrate, "begun")
        event = "cancelled"
        try:
            end = await self._run_leg(src, hand_over=True, most=1)
            dst = scheduler.upstreams.get(migrate.dst)
            if self.finish_reason is not None or dst is None or end.handle is None:
                if end.handle is not None:
                    scheduler.handles.release(end.handle)
                return src, None
            now = self._clock.now()
            resident = self.prompt_tokens + len(self.out_ids)
            self._ledger.decode_dispatched(self.call.id, migrate.dst, resident, now)
            self._ledger.transfer_started(self.call.id, now)
            story.migrations += 1
            story.decode_on = migrate.dst
            event = "done"
            return dst, end.handle
        finally:
            self._migrate = None
            scheduler.migrations.note(migrate, event)

    # legs

    async def _run_leg(
        self,
        upstream: Upstream,
        *,
        hand_over: bool = False,
        most: int | None = None,
        handle: KvHandle | None = None,
        ticket: Ticket | None = None,
    ) -> LegEnd:
        """Run one leg over at most ``most`` tokens; with ``hand_over`` another one continues it, pulling its
        KV where instances can. A ``handle`` that cannot be used, or was not, is released.

        The ticket goes to an engine that orders by it, unless the answer has begun already.
        """
        call, scheduler = self.call, self._scheduler
        now = self._clock.now()
        self._legs += 1
        self._leg_upstream, self._leg_first_s, self._handing_over = upstream, None, hand_over
        capabilities = upstream.member.capabilities
        pin = hand_over and capabilities.kv_transfer
        ordered = capabilities.orders and not self.out_ids
        loaded = handle if handle is not None and scheduler.handles.usable(handle, upstream) else None
        begun = self._begin(upstream, loaded)
        left = None if self._limit is None else self._limit - begun
        leg = Leg(
            request_id=f"{call.id}-{self._legs}",
            prompt=call.prompt if self.prompt_ids is None else [*self.prompt_ids, *self.out_ids[:begun]],
            messages=call.messages,
            max_tokens=left if most is None else most,
            sampling=self._sampling(begun, left if most is None else most),
            generated=begun,
            pin=pin,
            handle=loaded,
            salt=call.salt,
            ticket=ticket.on_clock(-now) if ticket is not None and ordered else None,
        )
        try:
            left_s = self._deadline_s - now
            if left_s <= 0:
                raise EngineTimeout(
                    f"the request's deadline of {scheduler.settings.request_deadline_s:g} s has passed"
                )
            return await upstream.engine.run(leg, self, deadline_s=left_s)
        except _Done:
            return LegEnd()
        except BaseException as error:
            # The answer may have been lost on the way: the engine then holds a pin nobody knows of.
            if pin:
                scheduler.background(upstream.engine.release_request(leg.request_id))
            if isinstance(error, KvLost) and handle is not None:
                scheduler.handles.suspect_owner(handle)
            raise
        finally:
            if handle is not None and (loaded is None or self._leg_first_s is None):
                scheduler.handles.release(handle)

    def _begin(self, upstream: Upstream, handle: KvHandle | None) -> int:
        """Return how many of the delivered tokens the next leg's prompt holds; it says the others again.

        All of them for an engine that continues. Another begins with exactly what a handle covers, without
        one where text is whole, and where the answer depends on more than its tokens at its start.
        """
        if upstream.member.capabilities.continues:
            self._seams = None
            return len(self.out_ids)
        if self._seams is None:
            call = self.call
            include = bool(call.sampling.get("include_stop_str_in_output"))
            stops = None
            if call.stops:
                least = call.sampling.get("min_tokens") or 0
                stops = StopStrings(call.stops, include=include, min_tokens=least)
            self._seams = Continuation(self.out_ids, stops)
        if handle is not None and self.prompt_ids is not None:
            begun = handle.tokens - len(self.prompt_ids)
        else:
            begun = 0 if self.call.state else self._seams.clean
        self._seams.begin(begun)
        return begun

    def _sampling(self, begun: int, most: int | None) -> dict[str, object]:
        """Return the sampling fields of a leg behind ``begun`` tokens: ``min_tokens`` asks no more of it than
        it may generate.

        For an engine that does not continue: it counts from the leg's start, the gateway looks for stop
        strings, and a seed that is ours differs from leg to leg, so that random numbers do not repeat.
        """
        sampling = self.call.sampling
        wanted = sampling.get("min_tokens")
        if self._seams is None:
            if wanted and most is not None:
                return sampling | {"min_tokens": min(wanted, len(self.out_ids) + most)}
            return sampling
        changed: dict[str, object] = {}
        if wanted:
            changed["min_tokens"] = max(0, wanted - begun if most is None else min(wanted - begun, most))
        if "seed" in sampling and not self.call.seeded:
            changed["seed"] = sampling["seed"] + begun
        dropped = ("stop", "include_stop_str_in_output") if self.call.stops else ()
        return {name: value for name, value in (sampling | changed).items() if name not in dropped}

    # the legs' tokens

    def tokens(self, tokens: Tokens) -> None:
        """See ``TokensSink.tokens``."""
        if tokens.prompt_token_ids is not None and self.prompt_ids is None:
            self._learn_prompt(tokens.prompt_token_ids)
        if self._refusal is not None:
            return
        if tokens.token_ids:
            if self.prompt_ids is None:
                raise EngineFault("the engine does not return the prompt's token ids")
            self._arrived()
        seams = self._seams
        if seams is not None:
            if self._handing_over and self.call.state:
                return  # The next leg says it again, from the state that it keeps.
            tokens = seams.piece(tokens, whole=self._handing_over)
        if tokens.token_ids:
            self._count(tokens.token_ids)
        reason = tokens.finish_reason
        if reason == "length" and self._handing_over and self._remaining() != 0:
            reason = None
        if reason is not None:
            self.finish_reason, self.stop_reason = reason, tokens.stop_reason
        if seams is not None and seams.stops is not None:
            tokens.text = self._until_stop(seams.stops, tokens.text)
            reason = tokens.finish_reason = self.finish_reason
            tokens.stop_reason = self.stop_reason
        if tokens.token_ids or tokens.text or tokens.delta or reason is not None:
            self._answer.tokens(tokens, reason, self.prompt_ids)
        self._after_piece()

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""
        if self._leg_first_s is None:
            self._arrived()
        seams = self._seams
        if seams is not None:
            text, token_ids = seams.plain(text, token_ids)
            if not token_ids and not text:
                return
        self._count(token_ids)
        if seams is not None and seams.stops is not None:
            text = self._until_stop(seams.stops, text)
            if self.finish_reason is not None:
                self._answer.tokens(
                    Tokens(text, token_ids, None, self.finish_reason, self.stop_reason),
                    self.finish_reason,
                    self.prompt_ids,
                )
                raise _Done
        self._answer.plain(text, token_ids)
        if self._migrate is not None:
            self._after_piece()

    def _until_stop(self, stops: StopStrings, text: str) -> str:
        """Return the text up to a stop string, which ends the request; all that is left when it has ended."""
        ended = self.finish_reason is not None
        text = stops.feed(text, len(self.out_ids))
        if stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", stops.found
        elif ended:
            text += stops.flush()
        return text

    def _after_piece(self) -> None:
        """End the leg's stream behind a stop string, or for a migration."""
        if self._handing_over:
            return
        if self._seams is not None and self._seams.stops is not None and self._seams.stops.found is not None:
            raise _Done
        if self._migrate is not None:
            self._leave_if_told()

    def _arrived(self) -> None:
        """Note the leg's first token, be it new or said again."""
        if self._leg_first_s is None:
            self._leg_first_s = self._clock.now()
            self._leg_began(self._leg_first_s)

    def _count(self, token_ids: list[int]) -> None:
        """Enter new tokens in the books."""
        now = self._clock.now()
        self.out_ids += token_ids
        story = self.story
        if story.first_token_s is None:
            story.first_token_s = now
        story.last_token_s = now
        if self._decoding:
            self._ledger.tokens(self.call.id, len(token_ids), now)

    def _leg_began(self, now: float) -> None:
        """The leg's first token: a pull it waited for has ended, a colocated prefill has become a decode."""
        if self._decoding:
            self._ledger.transfer_ended(self.call.id, now)
        elif not self._handing_over and self._leg_upstream is not None:
            self._ledger.prefill_ended(self.call.id, now)
            resident = self.prompt_tokens + len(self.out_ids)
            self._ledger.decode_dispatched(self.call.id, self._leg_upstream.member.instance.id, resident, now)
            self._decoding = True

    def _learn_prompt(self, ids: list[int]) -> None:
        """Take the prompt as the engine tokenised it."""
        self.prompt_ids = ids
        self._estimate.observe(self.call.prompt_chars, len(ids))
        if self._leg_upstream is not None:
            self._settle_limit(len(ids), self._leg_upstream.member.instance.max_model_len)

    # lengths

    def _settle_limit(self, prompt: int, context: int) -> None:
        """Fix how many tokens to generate; note the refusal of a request that does not fit."""
        self._limit = limit = self.call.tokens_within(context - prompt)
        if limit < 1 or prompt + limit > context:
            field = "messages" if self.call.chat else "prompt"
            self._refusal = PromptTooLong(
                f"the context is {context} tokens; the prompt has {prompt} and max_tokens is {max(1, limit)}",
                param="max_tokens" if prompt < context else field,
            )

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _remaining(self) -> int | None:
        """Tokens still to generate; None while a prompt of unknown length leaves that open."""
        return None if self._limit is None else self._limit - len(self.out_ids)

    def _finish_at_limit(self) -> None:
        """End a request whose last token arrived but whose last leg failed before it said so."""
        self.finish_reason = "length"
        self._answer.tokens(Tokens("", []), "length", self.prompt_ids)

    def _request(self) -> Request:
        call = self.call
        return Request(
            id=call.id,
            prompt_tokens=self.prompt_tokens + len(self.out_ids),
            max_tokens=self._remaining() or 1,
            arrival_s=self.story.arrival_s,
            slo=call.slo,
            tenant=call.tenant,
            session=call.session,
        )

    # the story

    def _note_prefill(self, end: LegEnd, placed_s: float) -> None:
        story, times = self.story, end.times
        story.cached_tokens = times.cached_tokens
        first_s = self._leg_first_s or self._clock.now()
        queue_s = times.queue_s or 0.0
        prefill_s = times.prefill_s if times.prefill_s is not None else first_s - placed_s - queue_s
        story.observed_prefill_s = prefill_s
        story.stages.setdefault("queue", placed_s - story.arrival_s + queue_s)
        story.stages.setdefault("prefill", prefill_s)

    def _note_decode(self, end: LegEnd, placed_s: float) -> None:
        story, times = self.story, end.times
        first_s, last_s = self._leg_first_s, story.last_token_s
        if first_s is None or last_s is None:
            return
        story.kv_transfer_bytes += times.kv_loaded_bytes
        if self._legs > 1:
            transfer_s, queue_s = times.kv_load_s or 0.0, times.queue_s or 0.0
            story.stages["transfer"] = transfer_s
            story.stages["decode_queue"] = queue_s
            story.stages["first_step"] = max(0.0, first_s - placed_s - transfer_s - queue_s)
        story.stages["decode"] = last_s - first_s

    def _close(self, error: TidegateError | None) -> None:
        """Take the request out of the ledger and tell journal and metrics how it ended."""
        now = self._clock.now()
        if error is None:
            self._ledger.finished(self.call.id, now)
        else:
            self._ledger.aborted(self.call.id, now)
        self._scheduler.released()
        ending = Ending(
            self.call.id,
            self.call.slo,
            self.prompt_tokens,
            len(self.out_ids),
            self.finish_reason,
            error,
            now,
            session=self.call.session,
            tenant=self.call.tenant,
        )
        record(self.story, ending, journal=self._scheduler.journal, metrics=self._scheduler.metrics)
