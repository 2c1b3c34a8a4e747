"""One request on its way through the cluster, in wall time: the legs that the control plane has it run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from tidegate.control.effects import GiveUp, Held, RunDecode, RunPrefill, StartMigration
from tidegate.control.record import RequestEnding, RequestRecord, outcome_line
from tidegate.core.decision import Path, Place
from tidegate.core.errors import ClientError, EngineError, EngineFault, InternalError, TidegateError
from tidegate.core.stages import parts_of_ttft
from tidegate.engines.seam import KvHandle, LegEnd, LegTimes, TokensSink
from tidegate.gateway.call import Call, TokenEstimate
from tidegate.gateway.dispatcher import Command, Dispatcher
from tidegate.gateway.legs import Legs
from tidegate.gateway.moving import StagedMove
from tidegate.gateway.prompt_keys import KeptAnswer, with_answer
from tidegate.gateway.upstream import Upstream
from tidegate.policies.order import Ticket


class ServedRequest:
    """Serves one call. ``run`` returns when the last token was delivered, or raises a TidegateError.

    Whatever happens, the request leaves the control plane, engines abort what is no longer wanted, and
    journal and metrics get one outcome. ``legs`` holds what engines answered so far, ``record`` its times.
    """

    def __init__(
        self,
        call: Call,
        dispatcher: Dispatcher,
        estimate: TokenEstimate,
        answer: TokensSink,
        arrival_s: float,
    ) -> None:
        self.call = call
        self.record = RequestRecord(arrival_s)
        follows = dispatcher.plane.sessions.unnamed and not (call.session or isinstance(call.prompt, list))
        self._kept = KeptAnswer(answer) if follows else None
        # What a request holds must not refer back to it: only a collection would free it then.
        self.legs = Legs(call, self.record, dispatcher, estimate, self._kept or answer)
        self._dispatcher = dispatcher
        self._plane = dispatcher.plane
        self._clock = dispatcher.clock
        self._placed_s = arrival_s
        self._command: Command | None = None
        self._commanded: asyncio.Future[None] | None = None
        self._staged: StagedMove | None = None

    def command(self, command: Command) -> None:
        """See ``Served.command``."""
        self._command = command
        if self._commanded is not None and not self._commanded.done() and not isinstance(command, Held):
            self._commanded.set_result(None)

    def start_migration(self, effect: StartMigration) -> None:
        """See ``Served.start_migration``: the decode moves in stages, or at its next token."""
        legs, plane, now = self.legs, self._plane, self._clock.now()
        why_not = legs.why_not_movable(effect.migrate)
        dst = self._dispatcher.upstreams.get(effect.migrate.dst)
        if why_not or dst is None:
            why_not = why_not or f"{effect.migrate.dst} is down"
            plane.migration_refused(legs, why_not, now, for_good=bool(self.record.unmovable))
            return
        self._drop_move()
        self._staged = legs.follow(dst, self._move_failed)
        legs.cut = self._staged is None
        if self._staged is not None:
            plane.migration_begun(legs, now)

    def _move_failed(self, move: StagedMove, why: str) -> None:
        if move is self._staged and self.legs.migrate is not None:
            self._plane.migration_cancelled(self.legs, self._clock.now(), why=why)

    def _drop_move(self) -> None:
        """End a move in stages; the decode stays at its source if that has not given it up."""
        move, self._staged = self._staged, None
        if move is not None:
            move.drop()

    async def run(self) -> None:
        """Serve the request to its end."""
        dispatcher = self._dispatcher
        dispatcher.served[self.call.id] = self
        error: TidegateError | None = None
        try:
            await self._until_finished()
        except TidegateError as failure:
            error = failure
            raise
        except asyncio.CancelledError:
            error = dispatcher.cut_off()
            raise
        except Exception as failure:
            error = InternalError(f"{type(failure).__name__}: {failure}")
            raise
        finally:
            del dispatcher.served[self.call.id]
            self._drop_move()
            self._close(error)

    async def _until_finished(self) -> None:
        if self._nothing_left():
            return
        legs = self.legs
        self._dispatcher.do(self._plane.arrive(legs, self._clock.now()))
        while True:
            command = await self._next_command()
            assert isinstance(command, RunPrefill), "a request that is not placed is prefilled first"
            try:
                await self._attempt(command)
                if legs.finish_reason is not None:
                    return
            except EngineError as error:
                self._note_ttft(LegTimes())
                if self._nothing_left():
                    return
                self._drop_move()
                legs.repeatable = not self.call.state
                self._dispatcher.do(self._plane.failed(legs, error, self._clock.now()))

    def _nothing_left(self) -> bool:
        """End a request whose last token is out. Raises PromptTooLong for one that fits no instance."""
        legs, context = self.legs, self._dispatcher.max_model_len
        if legs.prompt_ids is not None and not legs.out_ids and context:
            legs.settle_limit(len(legs.prompt_ids), context)
        legs.check_limit()
        if legs.remaining() != 0:
            return False
        legs.finish_at_limit()
        return True

    async def _next_command(self) -> RunPrefill | RunDecode:
        """Return what the control plane wants next, waiting for it while the request is held.

        Raises what it gives the request up with.
        """
        while self._command is None or isinstance(self._command, Held):
            self._commanded = asyncio.get_running_loop().create_future()
            await self._commanded
            self._commanded = None
        command, self._command = self._command, None
        if isinstance(command, GiveUp):
            raise command.error
        return command

    async def _attempt(self, command: RunPrefill) -> None:
        """Run the request, or what is left of it, from one placement of its prefill."""
        dispatcher, legs = self._dispatcher, self.legs
        legs.decode_first_s = None
        on = command.place.prefill_on
        upstream = dispatcher.upstream(on, "prefill")
        capabilities = upstream.member.capabilities
        self._placed_s = placed_s = self._clock.now()
        anew = bool(self.call.state) and not capabilities.continues
        if command.place.path is Path.COLOCATED or (anew and not capabilities.kv_transfer):
            legs.decode_on = on
            end = await self._to_the_end(upstream, ticket=command.ticket)
            self._note_prefill(end.times)
            self._note_decode(end.times, placed_s)
            return
        held = await self._read_back(command.place)
        hand_over = legs.remaining() != 1
        end = await legs.run(upstream, hand_over=hand_over, most=1, ticket=command.ticket, extend=held)
        self._note_prefill(end.times)
        if held is None:
            prompt_tokens = legs.prompt_tokens + len(legs.out_ids)
            observed_s = self.record.observed_prefill_s or 0.0
            dispatcher.drift.prefill(on, prompt_tokens, end.times, observed_s, alone=command.alone)
        if legs.finish_reason is None:
            await self._decode(end.handle)

    async def _decode(self, handle: KvHandle | None) -> None:
        """Have the decode placed and run it, pulling the KV behind ``handle`` unless it is gone."""
        dispatcher, now = self._dispatcher, self._clock.now()
        try:
            dispatcher.do(self._plane.prefill_done(self.legs, now))
            command = await self._next_command()
            if isinstance(command, RunPrefill):  # every instance went down meanwhile
                self._command = command
                return
            upstream = dispatcher.upstream(command.on, "decode")
        except BaseException:
            if handle is not None:
                dispatcher.handles.release(handle)
            raise
        end = await self._to_the_end(upstream, handle=handle)
        self._note_decode(end.times, now)

    async def _to_the_end(
        self, upstream: Upstream, *, handle: KvHandle | None = None, ticket: Ticket | None = None
    ) -> LegEnd:
        """Run all that is left, on ``upstream`` first, then wherever migrations take it. Returns how the last
        leg that was placed or pulled ended."""
        legs = self.legs
        end = await self._until_given_up(legs.run(upstream, handle=handle, ticket=ticket))
        while legs.finish_reason is None:
            if legs.stopped:
                assert legs.migrate is not None and legs.upstream is not None, "it is cut only to migrate"
                upstream, end = await self._move(legs.upstream, legs.migrate.dst)
                if legs.finish_reason is None:
                    end = await self._until_given_up(legs.run(upstream, handle=end.handle))
                continue
            move, self._staged = self._staged, None
            if move is None:
                raise EngineFault("the engine ended the leg early", stage="decode")
            await self._until_given_up(legs.carry_on(move))
        return end

    async def _until_given_up(self, leg: Coroutine[Any, Any, LegEnd]) -> LegEnd:
        """Await a leg. That its instance fails is no error once the decode is another's and no token was lost
        on the way here."""
        try:
            return await leg
        except EngineError as error:
            move = self._staged
            if move is None or self.legs.finish_reason is not None:
                raise
            try:
                await move.begun(len(self.legs.out_ids))
            except EngineError:
                raise error from None
            return LegEnd()

    async def _move(self, src: Upstream, dst_id: str) -> tuple[Upstream, LegEnd]:
        """Have the source pin the KV of the stream so far; return where the decode goes on, and how that
        leg ended.

        A leg of one token pins it: the source's prefix cache holds all but the last block of its prompt, and
        the client gets that token while the destination pulls.
        """
        dispatcher, plane, legs = self._dispatcher, self._plane, self.legs
        stopped_s, pulls = self.record.last_token_s, False
        legs.cut = False
        plane.migration_begun(legs, self._clock.now())
        try:
            end = await legs.run(src, hand_over=True, most=1)
            if end.handle is None:
                return src, end
            dst = dispatcher.upstreams.get(dst_id)
            if dst is None or legs.migrate is None:
                dispatcher.handles.release(end.handle)
                return src, LegEnd()
            pulls = True
            legs.pulls(end.handle.tokens * src.member.instance.kv_bytes_per_token, stopped_s)
            return dst, end
        finally:
            if legs.migrate is not None and not pulls:
                plane.migration_cancelled(legs, self._clock.now())

    # later rounds

    async def _read_back(self, place: Place) -> KvHandle | None:
        """Return a handle for what another instance holds of the conversation, if the placement says so.

        The holder's prefix cache has it; a leg over one token pins it. None whenever anything is in the way,
        and where the prompt turns out to begin otherwise: then it is computed.
        """
        dispatcher, legs = self._dispatcher, self.legs
        holder = dispatcher.upstreams.get(place.read_from or "")
        upstream = dispatcher.upstreams.get(place.prefill_on)
        if holder is None or upstream is None or legs.session is None:
            return None
        if "prompt_logprobs" in self.call.sampling:
            return None
        try:
            if not await legs.tokenise(upstream) or legs.prompt_ids is None:
                return None
            tokens = dispatcher.sessions.held_of(legs.session, self.call.salt, legs.prompt_ids) or 0
            worth = tokens >= holder.member.instance.block_tokens
            handle = await legs.export(holder, tokens) if worth else None
        except (EngineError, ClientError):
            return None
        if handle is not None:
            self.record.read_back_tokens = handle.tokens
        return handle

    # the record

    def _note_prefill(self, times: LegTimes) -> None:
        record, legs, call = self.record, self.legs, self.call
        record.cached_tokens = times.cached_tokens
        now, read, shared = self._clock.now(), times.kv_loaded_tokens, None
        if legs.retells is not None and legs.session is not None and legs.prompt_ids is not None:
            shared = self._dispatcher.sessions.held_of(legs.session, call.salt, legs.prompt_ids)
        self._plane.prefill_reported(legs, times.cached_tokens, now, read_tokens=read, shared_tokens=shared)
        record.observed_prefill_s = self._prefill_s(times, self.legs.first_s or self._clock.now())
        self._note_ttft(times)

    def _note_ttft(self, times: LegTimes) -> None:
        """Divide the TTFT, once, by what is told of the leg that gave the first token."""
        record = self.record
        if record.ttft_s is None or record.first_token_s is None or "queue" in record.stages:
            return
        queue_s = self._placed_s - record.arrival_s + (times.queue_s or 0.0)
        found = {"queue": queue_s, "prefill": self._prefill_s(times, record.first_token_s)}
        record.stages |= parts_of_ttft(record.ttft_s, found)

    def _prefill_s(self, times: LegTimes, first_s: float) -> float:
        """Return the prefill's time: all since its placement but the queue where the engine tells none."""
        if times.prefill_s is not None:
            return times.prefill_s
        return first_s - self._placed_s - (times.queue_s or 0.0)

    def _note_decode(self, times: LegTimes, placed_s: float) -> None:
        record = self.record
        first_s, last_s = self.legs.decode_first_s, record.last_token_s
        if first_s is None or last_s is None:
            return
        record.kv_transfer_bytes += times.kv_loaded_bytes
        if self.legs.count > 1:
            transfer_s, queue_s = times.kv_load_s or 0.0, times.queue_s or 0.0
            record.stages["transfer"] = transfer_s
            record.stages["decode_queue"] = queue_s
            record.stages["first_step"] = max(0.0, first_s - placed_s - transfer_s - queue_s)
        record.stages["decode"] = last_s - first_s

    def _close(self, error: TidegateError | None) -> None:
        """Take the request out of the plane and tell journal and metrics how it ended."""
        dispatcher, call, legs, now = self._dispatcher, self.call, self.legs, self._clock.now()
        self._note_ttft(LegTimes())
        if error is None and legs.session is not None:
            ids = (legs.prompt_ids or []) + legs.out_ids
            dispatcher.sessions.note(legs.session, call.salt, ids[:-1])  # the last has no KV
            legs.blocks = with_answer(legs.blocks, call, ids, self._kept)
        effects = self._plane.ended(legs, error, now)
        record, journal = self.record, dispatcher.journal
        record.prefill_on, record.decode_on = legs.prefill_on, legs.decode_on
        record.predicted_prefill_s = legs.predicted_prefill_s
        record.replays, record.migrations = legs.replays, legs.migrations
        record.predicted_lengths = legs.predicted
        ending = RequestEnding(
            call.id,
            call.slo,
            legs.prompt_tokens,
            len(legs.out_ids),
            legs.finish_reason,
            error,
            now,
            session=call.session,
            tenant=call.tenant,
        )
        dispatcher.metrics.observe(record, ending)
        dispatcher.recent.ended(record, ending)
        if journal.enabled:
            journal.write(outcome_line(record, ending, journal.started_s))
        dispatcher.do(effects)
