"""One request: what its legs have brought so far, and where it stands."""

from __future__ import annotations

from typing import Any

from tidegate.control.live_request import LiveRequest, Stage
from tidegate.control.record import RequestRecord
from tidegate.core.decision import Migrate
from tidegate.core.errors import EngineError, EngineFault, EngineTimeout, KvLost, PromptTooLong
from tidegate.core.request import Request
from tidegate.engines.seam import IgnoredTokens, KvHandle, Leg, LegEnd, RunningLeg, TokensSink
from tidegate.fleet.member import Capabilities
from tidegate.gateway.call import Call, TokenEstimate
from tidegate.gateway.continuation import Continuation, beginning, continuation, continuing, still_asked
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.gateway.moving import MoveFailed, StagedMove, pinning_leg
from tidegate.gateway.prompt_keys import prompt_blocks
from tidegate.gateway.upstream import Upstream
from tidegate.policies.order import Ticket, decode_ticket
from tidegate.protocol.chunks import MIGRATED, Tokens
from tidegate.protocol.stop_strings import StopStrings

EXPORT_S = 5.0
"""How long a prefill waits for another instance to pin what it would read (ours); then it computes."""
DECODE = Stage.DECODE
"""Read with every token, and reading a member of an enum class is slow."""


class Legs(LiveRequest):
    """A request as the control plane knows it: runs its legs one after the other, and takes their tokens (a
    ``TokensSink``).

    It passes the tokens on to ``answer``. The last ones bring the finish reason; those of ``tokens``, not of
    ``plain``, bring the prompt's ids.

    ``out_ids`` are the tokens delivered so far, and ``prompt_ids`` the client's prompt, None until an engine
    has tokenised it. ``refusal`` is set when prompt and answer do not fit the context. ``count`` legs were
    begun. ``upstream`` and ``first_s`` are of the leg that runs or ran last, and so is ``stopped``: whether
    it was ended from here. ``decode_first_s`` is when the first decode leg began to answer. A leg
    whose decode is to migrate by ending is ``cut``.
    """

    def __init__(
        self,
        call: Call,
        record: RequestRecord,
        dispatcher: Dispatcher,
        estimate: TokenEstimate,
        answer: TokensSink,
    ) -> None:
        deadline_s = record.arrival_s + dispatcher.settings.request_deadline_s
        named = bool(call.session)
        followed = dispatcher.plane.sessions.unnamed and not named
        blocks = prompt_blocks(call, estimate, followed=followed)
        super().__init__(call.id, deadline_s, blocks, named=named)
        self.prompt_ids: list[int] | None = call.prompt if isinstance(call.prompt, list) else None
        self.out_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.refusal: PromptTooLong | None = None
        self.stopped = False
        self.count = 0
        self.upstream: Upstream | None = None
        self.first_s: float | None = None
        self.decode_first_s: float | None = None
        self.cut = False
        self._running = ""
        self._pulled: tuple[int, float | None] | None = None
        self._call = call
        self._dispatcher = dispatcher
        self._record = record
        self._plane = dispatcher.plane
        self._clock = dispatcher.clock
        self._estimate = estimate
        self._answer = answer
        self._limit = call.max_tokens
        self._handing_over = False
        self._continuation: Continuation | None = None
        self._prompt_logprobs: list[Any] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the client's prompt; an estimate until an engine has tokenised a text prompt."""
        if self.prompt_ids is not None:
            return len(self.prompt_ids)
        return self._estimate.tokens(self._call.prompt_chars)

    # the limit of tokens

    def settle_limit(self, prompt_tokens: int, context_tokens: int) -> None:
        """Fix how many tokens to generate behind a prompt of that length, or refuse it for its context."""
        self._limit = limit = self._call.tokens_within(context_tokens - prompt_tokens)
        if limit < 1 or prompt_tokens + limit > context_tokens:
            field = "messages" if self._call.chat else "prompt"
            self.refusal = PromptTooLong(
                f"the context is {context_tokens} tokens; the prompt has {prompt_tokens} and max_tokens is "
                f"{max(1, limit)}",
                param="max_tokens" if prompt_tokens < context_tokens else field,
            )

    def check_limit(self) -> None:
        """Raise the refusal, if there is one."""
        if self.refusal is not None:
            raise self.refusal

    def remaining(self, generated: int | None = None) -> int | None:
        """Return how many tokens may follow ``generated`` ones, or all that are out; None while the prompt's
        length leaves it open."""
        generated = len(self.out_ids) if generated is None else generated
        return None if self._limit is None else self._limit - generated

    # legs

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

        With ``hand_over`` another leg is to continue: where instances can pull, the engine pins the KV, and
        ``LegEnd.handle`` names it. Without, the leg ends the answer, unless it is stopped because the decode
        migrates. ``handle`` names KV that this leg pulls; one that cannot be used, or was not, is released.
        ``extend`` names KV for the beginning of a prompt whose leg hands over. An engine that orders prefills
        gets ``ticket``; once the answer has begun, one that says when it did.

        Raises what ``Engine.run`` raises unless the answer is complete by then, PromptTooLong when the prompt
        turns out not to fit, and ClientGone.
        """
        dispatcher = self._dispatcher
        capabilities = upstream.member.capabilities
        # With nobody to pull or decline it, what vLLM pins is held until its lease ends: it fills the cache.
        wanted = capabilities.continues or len(dispatcher.upstreams) > 1
        pin = hand_over and wanted and upstream.member.produces_kv
        held = extend if handle is None else handle
        loaded = held if held is not None and dispatcher.handles.usable(held, upstream) else None
        begun = self._begin(upstream, hand_over=hand_over, handle=None if hand_over else loaded)
        leg = self._leg(
            capabilities,
            begun,
            most,
            ticket,
            pin=pin,
            handle=loaded,
            movable=capabilities.staged and not hand_over,
        )
        self._running = leg.request_id
        try:
            self.check_limit()
            end = await upstream.engine.run(leg, self, deadline_s=self._left_s())
        except BaseException as error:
            # The answer may have been lost on the way: the engine then holds a pin nobody knows of.
            if pin:
                dispatcher.background(upstream.engine.release_request(leg.request_id))
            if isinstance(error, KvLost) and held is not None:
                dispatcher.handles.suspect_owner(held)
            if isinstance(error, EngineError) and self.finish_reason is not None:
                return LegEnd()
            raise
        finally:
            if held is not None and (loaded is None or self.first_s is None):
                dispatcher.handles.release(held, sent=loaded is not None)
        if loaded is not None and not pin and not self.stopped:
            dispatcher.loads.kept(upstream.member.instance.id, self.prompt_tokens + len(self.out_ids))
        if self.finish_reason is None and self.refusal is None:
            return end
        if end.handle is not None:
            dispatcher.handles.release(end.handle)
        self.check_limit()
        return LegEnd(times=end.times)

    def _leg(
        self, capabilities: Capabilities, begun: int, most: int | None, ticket: Ticket | None, **more: Any
    ) -> Leg:
        """Return a leg over at most ``most`` tokens behind ``begun`` delivered ones, with ``more`` fields."""
        call, known, had = self._call, self.prompt_ids is not None, self._prompt_logprobs is not None
        most = self.remaining(begun) if most is None else most
        if self.out_ids and self._record.first_token_s is not None:
            ticket = decode_ticket(self.as_request(), self._record.first_token_s)
        sampling = (continuing if capabilities.continues else beginning)(call, begun, most)
        return Leg(
            request_id=f"{call.id}-{self.count}",
            prompt=call.prompt if self.prompt_ids is None else [*self.prompt_ids, *self.out_ids[:begun]],
            messages=call.messages,
            max_tokens=most,
            sampling=still_asked(call, sampling, prompt_known=known, had_logprobs=had),
            generated=begun,
            salt=call.salt,
            ticket=ticket.on_clock(-self._clock.now()) if ticket and capabilities.orders else None,
            **more,
        )

    def follow(self, dst: Upstream, failed: MoveFailed) -> StagedMove | None:
        """Have ``dst`` take the decode over in stages; None where source or destination cannot. The leg that
        runs goes on meanwhile."""
        assert self.upstream is not None
        src = self.upstream.member
        if not (src.capabilities.staged and dst.member.capabilities.staged and self._running):
            return None
        self.count += 1
        leg = self._leg(
            dst.member.capabilities,
            len(self.out_ids),
            None,
            None,
            movable=True,
            follows=RunningLeg(src.engine_id, self._running, src.kv_host, src.kv_port),
        )
        return StagedMove(dst, leg, max(0.0, self.deadline_s - self._clock.now()), failed)

    async def carry_on(self, move: StagedMove) -> LegEnd:
        """Go on with the leg that took the decode over; the one before it has ended. Raises what ``run``
        raises."""
        moved = await move.begun(len(self.out_ids))
        if self.migrate is None:
            raise move.drop("the migration was cancelled")
        self.upstream, self._running, self.stopped = move.dst, move.leg.request_id, False
        self.first_s = self._clock.now()
        self._record.kv_transfer_bytes += moved.moved_bytes
        self._moved_here(moved.moved_bytes, moved.stages, self._record.last_token_s)
        try:
            return await move.carry_on(self)
        except EngineError:
            if self.finish_reason is not None:
                return LegEnd()
            raise

    async def tokenise(self, upstream: Upstream) -> bool:
        """Have an engine tokenise the prompt before its first leg; False if it cannot. Raises EngineError."""
        if self.prompt_ids is None:
            call = self._call
            ids = await upstream.engine.tokenise(call.prompt, call.messages, call.sampling)
            if ids is not None:
                self._learn_prompt(ids, upstream)
        return self.prompt_ids is not None

    async def export(self, holder: Upstream, tokens: int) -> KvHandle | None:
        """Have an instance whose prefix cache holds the first ``tokens`` of the prompt pin them. Raises
        EngineError."""
        assert self.prompt_ids is not None
        self.count += 1
        leg = pinning_leg(self._call, self.count, self.prompt_ids[:tokens])
        end = await holder.engine.run(leg, IgnoredTokens(), deadline_s=min(EXPORT_S, self._left_s()))
        return end.handle

    def _left_s(self) -> float:
        """Return the seconds until the request's deadline. Raises EngineTimeout when it has passed."""
        left_s = self.deadline_s - self._clock.now()
        if left_s <= 0:
            deadline_s = self._dispatcher.settings.request_deadline_s
            raise EngineTimeout(f"the request's deadline of {deadline_s:g} s has passed")
        return left_s

    def _begin(self, upstream: Upstream, *, hand_over: bool, handle: KvHandle | None) -> int:
        """Begin the next leg; return how many of the delivered tokens go into its prompt.

        The engine generates the others again. An engine that continues takes all of them into the prompt.
        Another takes exactly those that ``handle`` covers; without a handle those up to where the text is
        whole, and none where the answer depends on more than its tokens.
        """
        self.count += 1
        self.upstream, self.first_s, self._handing_over, self.stopped = upstream, None, hand_over, False
        self._running = ""
        if upstream.member.capabilities.continues:
            self._continuation = None
            return len(self.out_ids)
        if self._continuation is None:
            self._continuation = continuation(self._call, self.out_ids)
            self._record.unmovable = self._call.state
        if handle is not None and self.prompt_ids is not None:
            begun = handle.tokens - len(self.prompt_ids)
        else:
            begun = 0 if self._record.unmovable else self._continuation.clean
        self._continuation.begin(begun)
        return begun

    def finish_at_limit(self) -> None:
        """End a request whose last token arrived but whose last leg failed before it said so."""
        self.finish_reason = "length"
        self._say_last("", [])

    def _learn_prompt(self, ids: list[int], upstream: Upstream) -> None:
        """Take the prompt as ``upstream`` tokenised it, and settle the limit."""
        self.prompt_ids = ids
        self._estimate.observe(self._call.prompt_chars, len(ids))
        self.settle_limit(len(ids), upstream.member.instance.max_model_len)

    def as_request(self) -> Request:
        """See ``LiveRequest.as_request``."""
        call, generated = self._call, len(self.out_ids)
        about = call.slo, call.tenant, call.session
        return Request(
            call.id,
            self.prompt_tokens + generated,
            self.remaining() or 1,
            self._record.arrival_s,
            *about,
            generated=generated,
            priority=call.priority,
        )

    # migration

    def why_not_movable(self, migrate: Migrate) -> str:
        """Return why the decode cannot move as ``migrate`` says; "" when it will, at its next token."""
        upstream = self.upstream
        if self._handing_over or upstream is None or self.first_s is None:
            return "it does not decode"
        if self._record.unmovable:
            return f"its state cannot move: {self._record.unmovable}"
        if not upstream.member.produces_kv:
            return f"the KV of {migrate.src} cannot be moved"
        return ""

    def _may_migrate(self) -> bool:
        """Tell whether the answer is to move and may be cut: its text is whole, and something is left to
        generate."""
        if not self.cut or self.migrate is None or self._handing_over or self.finish_reason is not None:
            return False
        left = self.remaining()
        whole = self._continuation is None or self._continuation.clean == len(self.out_ids)
        return whole and (left is None or left > 1)

    def pulls(self, moved_bytes: int, stopped_s: float | None) -> None:
        """Note that the decode stopped at its source, after a token at ``stopped_s``, and is to be pulled."""
        self._pulled = moved_bytes, stopped_s
        resident = self.prompt_tokens + len(self.out_ids)
        self._plane.migration_pulls(self, resident, self._clock.now(), stopped_s)

    def _moved_here(self, moved_bytes: int, stages: int, stopped_s: float | None) -> None:
        """Note the first token at the destination."""
        now, resident = self._clock.now(), self.prompt_tokens + len(self.out_ids)
        pause_s = None if stopped_s is None else now - stopped_s
        self._plane.migration_done(
            self, resident, now, moved_bytes=moved_bytes, stages=stages, pause_s=pause_s
        )

    # the tokens

    def tokens(self, tokens: Tokens) -> bool:
        """See ``TokensSink.tokens``. Raises NotRepeated, ClientGone, EngineFault without the prompt's ids."""
        if tokens.prompt_token_ids is not None and self.prompt_ids is None and self.upstream is not None:
            self._learn_prompt(tokens.prompt_token_ids, self.upstream)
        self.stopped = self.refusal is not None
        if self.stopped:
            return True
        if tokens.forecast is not None:
            self._plane.length_reported(self, *tokens.forecast, self._clock.now())
        if tokens.prompt_logprobs is not None:
            self._prompt_logprobs = tokens.prompt_logprobs
        engine_ended = tokens.finish_reason is not None
        if tokens.token_ids:
            if self.prompt_ids is None:
                raise EngineFault("the engine does not return the prompt's token ids")
            self._arrived()
        joint = self._continuation
        if joint is not None:
            if tokens.delta:
                self._record.unmovable = self._record.unmovable or f"a parser ({', '.join(tokens.delta)})"
            if self._handing_over and self._record.unmovable:
                return False  # The next leg says it again, from the state that it keeps.
            tokens = joint.piece(tokens, whole=self._handing_over)
        if tokens.token_ids:
            self._count(tokens.token_ids)
        reason = tokens.finish_reason
        if reason == MIGRATED or (reason == "length" and self._handing_over and self.remaining() != 0):
            reason = None
        if reason is not None:
            self.finish_reason, self.stop_reason = reason, tokens.stop_reason
        stops = None if joint is None else joint.stops
        if joint is not None and stops is not None:
            tokens.text = self._until_stop(joint, stops, tokens.text)
        tokens.finish_reason, tokens.stop_reason = self.finish_reason, self.stop_reason
        tokens.prompt_token_ids, tokens.prompt_logprobs = self.prompt_ids, self._prompt_logprobs
        if tokens.token_ids or tokens.text or tokens.delta or tokens.finish_reason is not None:
            self._answer.tokens(tokens)
        if engine_ended or self._handing_over:
            return False
        self.stopped = (stops is not None and stops.found is not None) or self._may_migrate()
        return self.stopped

    def plain(self, text: str, token_ids: list[int]) -> bool:
        """See ``TokensSink.plain``. Raises NotRepeated and ClientGone."""
        if self.first_s is None:
            self._arrived()
        joint = self._continuation
        if joint is not None:
            text, token_ids = joint.plain(text, token_ids)
            if not token_ids and not text:
                return False
        self._count(token_ids)
        if joint is not None and joint.stops is not None:
            text = self._until_stop(joint, joint.stops, text)
            if self.finish_reason is not None:
                self._say_last(text, token_ids)
                self.stopped = True
                return True
        self._answer.plain(text, token_ids)
        if self.cut:
            self.stopped = self._may_migrate()
        return self.stopped

    def _say_last(self, text: str, token_ids: list[int]) -> None:
        last = Tokens(text, token_ids, None, self.finish_reason, self.stop_reason, self.prompt_ids)
        last.prompt_logprobs = self._prompt_logprobs
        self._answer.tokens(last)

    def _until_stop(self, joint: Continuation, stops: StopStrings, text: str) -> str:
        """Return the text up to a stop string, which ends the request; all that is left when it has ended."""
        ended = self.finish_reason is not None
        text = joint.until_stop(text, self.stop_reason)
        if stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", stops.found
        elif ended:
            text += stops.flush()
        return text

    def _arrived(self) -> None:
        """Note the leg's first token, new or said again: a pull that it waited for has ended, a colocated
        prefill has become a decode."""
        if self.first_s is not None:
            return
        self.first_s = now = self._clock.now()
        if not self._handing_over and self.decode_first_s is None:
            self.decode_first_s = now
        pulled, self._pulled = self._pulled, None
        if pulled is not None and self.migrate is not None and not self._handing_over:
            self._moved_here(pulled[0], 1, pulled[1])
        elif self.stage is DECODE:
            self._plane.transfer_ended(self, now)
        elif not self._handing_over:
            self._dispatcher.do(self._plane.decode_began(self, self.prompt_tokens + len(self.out_ids), now))

    def _count(self, token_ids: list[int]) -> None:
        """Count new tokens, here and in the control plane."""
        now = self._clock.now()
        self.out_ids += token_ids
        record = self._record
        if record.first_token_s is None:
            record.first_token_s = now
        record.last_token_s = now
        self.generated = len(self.out_ids)
        if self.stage is DECODE:
            self._plane.tokens(self, len(token_ids), now)
