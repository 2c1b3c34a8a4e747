"""One request's way through the cluster: placed, prefilled, handed over, decoded, replayed if it must."""

from __future__ import annotations

import asyncio

from tidegate.core.decision import Path
from tidegate.core.errors import (
    EngineError,
    EngineFault,
    EngineTimeout,
    EngineUnreachable,
    InternalError,
    PromptTooLong,
    TidegateError,
    status_of,
)
from tidegate.core.request import Request
from tidegate.engines.seam import KvHandle, Leg, LegEnd, Tokens
from tidegate.gateway.answers import Answer
from tidegate.gateway.call import Call
from tidegate.gateway.outcome import record
from tidegate.gateway.scheduler import Scheduler, Upstream
from tidegate.measure.rows import Ending, Story
from tidegate.policies.order import Ticket

CHARS_PER_TOKEN = 4.0
"""First guess for text prompts, until engines have told lengths (a common rule of thumb)."""


DEADLY = 3
"""Instances that may die under a request before its first token; then it is taken for the cause (ours)."""


class TokenEstimate:
    """Guesses a text prompt's token count from the prompts seen so far."""

    def __init__(self) -> None:
        self._chars_per_token = CHARS_PER_TOKEN

    def tokens(self, chars: int) -> int:
        """Return the expected length, at least 1."""
        return max(1, round(chars / self._chars_per_token))

    def observe(self, chars: int, tokens: int) -> None:
        """Learn from a prompt whose length became known."""
        if chars and tokens:
            self._chars_per_token += 0.2 * (chars / tokens - self._chars_per_token)


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

    @property
    def prompt_tokens(self) -> int:
        """Length of the client's prompt; an estimate until an engine has tokenised a text prompt."""
        if self.prompt_ids is not None:
            return len(self.prompt_ids)
        return self._estimate.tokens(self.call.prompt_chars)

    async def run(self) -> None:
        """Serve the request to its end."""
        self._scheduler.in_flight += 1
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
            self._scheduler.in_flight -= 1
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
        if not self._resumable():
            raise error
        scheduler.metrics.replays.labels(label).inc()
        self.story.replays += 1
        if error.instance:
            await scheduler.confirm_failure(error.instance)

    def _resumable(self) -> bool:
        """Whether another leg continues exactly where the failed one ended."""
        if not self.out_ids or self.call.greedy or self._leg_upstream is None:
            return True
        return self._leg_upstream.member.capabilities.resumes_sampling

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
        movable = self.call.greedy or upstream.member.capabilities.resumes_sampling
        placed_s = self._clock.now()
        if place.path is Path.COLOCATED or not movable:
            story.decode_on = place.prefill_on
            end = await self._run_leg(upstream, self._remaining(), ticket=dispatched.ticket)
            self._note_prefill(end, placed_s)
            self._note_decode(end, placed_s)
            return
        hand_over = self._remaining() != 1
        end = await self._run_leg(upstream, 1, hand_over=hand_over, ticket=dispatched.ticket)
        self._note_prefill(end, placed_s)
        if self.finish_reason is None and self._refusal is None:
            await self._decode(upstream, end.handle)
        elif end.handle is not None:
            scheduler.background(upstream.engine.release(end.handle))
        self._raise_refusal()

    async def _decode(self, source: Upstream, handle: KvHandle | None) -> None:
        """Place the decode and run it, pulling the KV behind ``handle`` unless it is gone."""
        scheduler = self._scheduler
        pulled = False
        try:
            now = self._clock.now()
            self._ledger.prefill_ended(self.call.id, now)
            name = scheduler.place_decode(self._request(), source.member.instance.id)
            self.story.decode_on = name
            self._decoding = True
            if name != source.member.instance.id:
                self._ledger.transfer_started(self.call.id, now)
            end = await self._run_leg(scheduler.upstreams[name], self._remaining(), handle=handle)
            pulled = True
            self._note_decode(end, now)
        finally:
            if not pulled and handle is not None:
                scheduler.background(source.engine.release(handle))

    async def _run_leg(
        self,
        upstream: Upstream,
        max_tokens: int | None,
        *,
        hand_over: bool = False,
        handle: KvHandle | None = None,
        ticket: Ticket | None = None,
    ) -> LegEnd:
        """Run one leg; with ``hand_over`` another one continues it, pulling its KV where instances can.

        The ticket goes to an engine that orders by it, unless the answer has begun already.
        """
        call = self.call
        now = self._clock.now()
        left_s = self._deadline_s - now
        if left_s <= 0:
            raise EngineTimeout(
                f"the request's deadline of {self._scheduler.settings.request_deadline_s:g} s has passed"
            )
        self._legs += 1
        self._leg_upstream, self._leg_first_s, self._handing_over = upstream, None, hand_over
        pin = hand_over and upstream.member.capabilities.kv_transfer
        ordered = upstream.member.capabilities.orders and not self.out_ids
        leg = Leg(
            request_id=f"{call.id}-{self._legs}",
            prompt=call.prompt if self.prompt_ids is None else [*self.prompt_ids, *self.out_ids],
            messages=call.messages,
            max_tokens=max_tokens,
            sampling=self._sampling(max_tokens),
            generated=len(self.out_ids),
            pin=pin,
            handle=handle,
            salt=call.salt,
            ticket=ticket.on_clock(-now) if ticket is not None and ordered else None,
        )
        try:
            return await upstream.engine.run(leg, self, deadline_s=left_s)
        except BaseException:
            # The answer may have been lost on the way: the engine then holds a pin nobody knows of.
            if pin:
                self._scheduler.background(upstream.engine.release_request(leg.request_id))
            raise

    def _sampling(self, max_tokens: int | None) -> dict[str, object]:
        """Return the leg's sampling fields: ``min_tokens`` asks no more of it than it may generate."""
        sampling = self.call.sampling
        wanted = sampling.get("min_tokens")
        if wanted and max_tokens is not None:
            return sampling | {"min_tokens": min(wanted, len(self.out_ids) + max_tokens)}
        return sampling

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
            self._count(tokens.token_ids)
        reason = tokens.finish_reason
        if reason == "length" and self._handing_over and self._remaining() != 0:
            reason = None
        if reason is not None:
            self.finish_reason, self.stop_reason = reason, tokens.stop_reason
        if tokens.token_ids or tokens.text or reason is not None:
            self._answer.tokens(tokens, reason, self.prompt_ids)

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""
        self._count(token_ids)
        self._answer.plain(text, token_ids)

    def _count(self, token_ids: list[int]) -> None:
        """Enter new tokens in the books."""
        now = self._clock.now()
        if self._leg_first_s is None:
            self._leg_first_s = now
            self._leg_began(now)
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
