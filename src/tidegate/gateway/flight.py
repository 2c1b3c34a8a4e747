"""One request's way through the cluster: placed, prefilled, handed over, decoded, replayed if it must."""

from __future__ import annotations

import asyncio

from tidegate.control.record import RequestEnding, RequestRecord
from tidegate.core.decision import Migrate, Path
from tidegate.core.errors import (
    EngineError,
    EngineUnreachable,
    InternalError,
    KvLost,
    NotRepeated,
    TidegateError,
    status_of,
)
from tidegate.engines.seam import KvHandle, LegEnd
from tidegate.gateway.answers import Answer
from tidegate.gateway.call import Call
from tidegate.gateway.legs import Leave, Legs
from tidegate.gateway.outcome import record
from tidegate.gateway.scheduler import Scheduler
from tidegate.gateway.token_estimate import TokenEstimate
from tidegate.gateway.upstream import Upstream
from tidegate.policies.order import Ticket

DEADLY = 3
"""Instances that may die under a request before its first token; then it is taken for the cause (ours)."""


class Flight:
    """Serves one call. ``run`` returns when the last token was delivered, or raises a TidegateError.

    Whatever happens, the request leaves the ledger, engines abort what is no longer wanted, and the
    journal and metrics get one outcome. ``legs`` holds what the engines answered so far.
    """

    def __init__(
        self, call: Call, scheduler: Scheduler, estimate: TokenEstimate, answer: Answer, arrival_s: float
    ) -> None:
        self.call = call
        self.story = RequestRecord(arrival_s)
        self.legs = Legs(call, scheduler, estimate, answer, self.story)
        self._scheduler = scheduler
        self._ledger = scheduler.ledger
        self._clock = scheduler.clock
        self._failures = 0
        self._deaths = 0

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
                if self.legs.finish_reason is not None:
                    return
                await self._prepare_replay(error)

    async def _prepare_replay(self, error: EngineError) -> None:
        """Account for a failed attempt. Raises ``error`` when the request may not be tried again."""
        scheduler, now = self._scheduler, self._clock.now()
        self._ledger.aborted(self.call.id, now)
        self._failures += 1
        label = status_of(error).label
        if scheduler.journal.enabled:
            scheduler.journal.failure(now, self.call.id, error, len(self.legs.out_ids))
        if isinstance(error, EngineUnreachable):
            self._deaths += 1
        poisonous = self._deaths >= DEADLY and not self.legs.out_ids
        if self._failures > scheduler.settings.replays or now >= self.legs.deadline_s or poisonous:
            raise error
        if isinstance(error, NotRepeated) and self.call.state:
            raise error
        scheduler.metrics.replays.labels(label).inc()
        self.story.replays += 1
        if error.instance and not isinstance(error, KvLost):
            await scheduler.confirm_failure(error.instance)

    async def _attempt(self) -> None:
        """Run the request, or what is left of it, from one placement of its prefill."""
        scheduler, story, legs = self._scheduler, self.story, self.legs
        legs.decoding, legs.decode_first_s = False, None
        if legs.prompt_ids is not None and not legs.out_ids and scheduler.max_model_len:
            legs.settle_limit(len(legs.prompt_ids), scheduler.max_model_len)
        legs.raise_refusal()
        if legs.remaining() == 0:
            legs.finish_at_limit()
            return
        dispatched = await scheduler.place_prefill(
            legs.request(),
            kind="replay" if story.replays else "place_prefill",
            recovery_s=scheduler.settings.recovery_s if legs.out_ids else 0.0,
            deadline_s=legs.deadline_s,
        )
        place = dispatched.place
        story.prefill_on = place.prefill_on
        story.predicted_prefill_s = dispatched.predicted_prefill_s
        upstream = scheduler.upstreams[place.prefill_on]
        capabilities = upstream.member.capabilities
        placed_s = self._clock.now()
        anew = bool(self.call.state) and not capabilities.continues
        if place.path is Path.COLOCATED or (anew and not capabilities.kv_transfer):
            story.decode_on = place.prefill_on
            end = await self._to_the_end(upstream, ticket=dispatched.ticket)
            self._note_prefill(end, placed_s)
            self._note_decode(end, placed_s)
            return
        held = await self._read_back(upstream)
        hand_over = legs.remaining() != 1
        end = await legs.run(upstream, hand_over=hand_over, most=1, ticket=dispatched.ticket, extend=held)
        self._note_prefill(end, placed_s)
        if held is None:
            scheduler.drift.prefill(
                place.prefill_on,
                legs.request().prompt_tokens,
                end.times,
                story.observed_prefill_s or 0.0,
                alone=dispatched.alone,
            )
        if legs.finish_reason is None and legs.refusal is None:
            await self._decode(upstream, end.handle)
        elif end.handle is not None:
            scheduler.handles.release(end.handle)
        legs.raise_refusal()

    async def _decode(self, source: Upstream, handle: KvHandle | None) -> None:
        """Place the decode and run it, pulling the KV behind ``handle`` unless it is gone."""
        scheduler = self._scheduler
        now = self._clock.now()
        self._ledger.prefill_ended(self.call.id, now)
        try:
            name = scheduler.place_decode(self.legs.request(), source.member.instance.id)
        except BaseException:
            if handle is not None:
                scheduler.handles.release(handle)
            raise
        self.story.decode_on = name
        self.legs.decoding = True
        if name != source.member.instance.id:
            self._ledger.transfer_started(self.call.id, now)
        self._note_decode(await self._to_the_end(scheduler.upstreams[name], handle=handle), now)

    async def _to_the_end(
        self, upstream: Upstream, *, handle: KvHandle | None = None, ticket: Ticket | None = None
    ) -> LegEnd:
        """Run all that is left, on ``upstream`` first, then wherever migrations take it."""
        while True:
            try:
                return await self.legs.run(upstream, handle=handle, ticket=ticket)
            except Leave as leave:
                upstream, handle = await self._move(upstream, leave.migrate)
                ticket = None
            if self.legs.finish_reason is not None:
                return LegEnd()

    def leave(self, migrate: Migrate) -> str:
        """See ``Movable.leave``."""
        return self.legs.leave(migrate)

    async def _move(self, src: Upstream, migrate: Migrate) -> tuple[Upstream, KvHandle | None]:
        """Have the source pin what the stream has so far, and return where to go on, with the handle.

        The leg that does so brings one token, so the client waits for one step less of the destination. The
        prefix cache of the source holds all but the last block of what the leg computes.
        """
        scheduler, story, legs = self._scheduler, self.story, self.legs
        scheduler.migrations.note(migrate, "begun")
        event = "cancelled"
        try:
            end = await legs.run(src, hand_over=True, most=1)
            dst = scheduler.upstreams.get(migrate.dst)
            if legs.finish_reason is not None or dst is None or end.handle is None:
                if end.handle is not None:
                    scheduler.handles.release(end.handle)
                return src, None
            now = self._clock.now()
            resident = legs.prompt_tokens + len(legs.out_ids)
            self._ledger.decode_dispatched(self.call.id, migrate.dst, resident, now)
            self._ledger.transfer_started(self.call.id, now)
            story.migrations += 1
            story.decode_on = migrate.dst
            event = "done"
            return dst, end.handle
        finally:
            scheduler.migrations.note(migrate, event)

    # later rounds

    async def _read_back(self, upstream: Upstream) -> KvHandle | None:
        """Return a handle for what another instance holds of the conversation, if ``upstream`` should pull
        it.

        The holder's prefix cache has it; a leg over one token pins it. None whenever anything is in the way:
        then the prompt is computed.
        """
        scheduler, legs = self._scheduler, self.legs
        if legs.out_ids or not self.call.session or not upstream.member.capabilities.extends_kv:
            return None
        known = scheduler.sessions.find(self.call)
        holder = scheduler.upstreams.get(known.on) if known is not None else None
        if (
            known is None
            or holder is None
            or holder is upstream
            or holder.member.engine_id != known.engine_id
        ):
            return None
        try:
            if not await legs.tokenise(upstream) or legs.prompt_ids is None:
                return None
            tokens = known.worth_reading(legs.prompt_ids, upstream.member)
            handle = await legs.export(holder, tokens) if tokens else None
        except EngineError:
            return None
        if handle is not None:
            self.story.read_back_tokens = handle.tokens
        return handle

    # the story

    def _note_prefill(self, end: LegEnd, placed_s: float) -> None:
        story, times = self.story, end.times
        story.cached_tokens = times.cached_tokens
        first_s = self.legs.first_s or self._clock.now()
        queue_s = times.queue_s or 0.0
        prefill_s = times.prefill_s if times.prefill_s is not None else first_s - placed_s - queue_s
        story.observed_prefill_s = prefill_s
        story.stages.setdefault("queue", placed_s - story.arrival_s + queue_s)
        story.stages.setdefault("prefill", prefill_s)

    def _note_decode(self, end: LegEnd, placed_s: float) -> None:
        story, times = self.story, end.times
        first_s, last_s = self.legs.decode_first_s, story.last_token_s
        if first_s is None or last_s is None:
            return
        story.kv_transfer_bytes += times.kv_loaded_bytes
        if self.legs.count > 1:
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
        ending = RequestEnding(
            self.call.id,
            self.call.slo,
            self.legs.prompt_tokens,
            len(self.legs.out_ids),
            self.legs.finish_reason,
            error,
            now,
            session=self.call.session,
            tenant=self.call.tenant,
        )
        legs = self.legs
        if error is None and self.call.session and legs.upstream is not None and legs.prompt_ids is not None:
            ids = legs.prompt_ids + legs.out_ids
            self._scheduler.sessions.note(
                self.call, legs.upstream.member, ids, self.story.prefill_on, len(legs.prompt_ids)
            )
        record(self.story, ending, journal=self._scheduler.journal, metrics=self._scheduler.metrics)
