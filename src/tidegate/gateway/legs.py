"""A request's legs, one after the other, and the tokens they bring."""

from __future__ import annotations

from tidegate.control.record import RequestRecord
from tidegate.core.decision import Migrate
from tidegate.core.errors import EngineFault, EngineTimeout, KvLost, PromptTooLong
from tidegate.core.request import Request
from tidegate.engines.seam import KvHandle, Leg, LegEnd, Tokens
from tidegate.gateway.answers import Answer
from tidegate.gateway.call import Call
from tidegate.gateway.continuation import Continuation, StopStrings
from tidegate.gateway.scheduler import Scheduler
from tidegate.gateway.token_estimate import TokenEstimate
from tidegate.gateway.upstream import Upstream
from tidegate.policies.order import Ticket

EXPORT_S = 5.0
"""How long a prefill waits for another instance to pin what it would read (ours); then it computes."""


class Leave(Exception):
    """Ends a stream whose decode is to go on elsewhere."""

    def __init__(self, migrate: Migrate) -> None:
        super().__init__(migrate)
        self.migrate = migrate


class _Done(Exception):
    """Ends a stream behind the last token that is wanted."""


class _Unheard:
    """Takes tokens that nobody asked for."""

    def tokens(self, tokens: Tokens) -> None:
        """See ``TokensSink.tokens``."""

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""


class Legs:
    """Runs the legs of one request and takes their tokens. A ``TokensSink``.

    ``out_ids`` are the tokens delivered so far, and ``prompt_ids`` the client's prompt, None until an engine
    has tokenised it. ``upstream`` and ``first_s`` are of the leg that runs or ran last, ``decoding`` says
    that the ledger has the request as a decode, ``decode_first_s`` when its first decode leg began to answer.
    """

    def __init__(
        self, call: Call, scheduler: Scheduler, estimate: TokenEstimate, answer: Answer, story: RequestRecord
    ) -> None:
        self.prompt_ids: list[int] | None = call.prompt if isinstance(call.prompt, list) else None
        self.out_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.refusal: PromptTooLong | None = None
        self.decoding = False
        self.count = 0
        self.upstream: Upstream | None = None
        self.first_s: float | None = None
        self.decode_first_s: float | None = None
        self.deadline_s = story.arrival_s + scheduler.settings.request_deadline_s
        self._call = call
        self._story = story
        self._scheduler = scheduler
        self._ledger = scheduler.ledger
        self._clock = scheduler.clock
        self._estimate = estimate
        self._answer = answer
        self._limit: int | None = call.max_tokens
        self._handing_over = False
        self._seams: Continuation | None = None
        self._migrate: Migrate | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the client's prompt; an estimate until an engine has tokenised a text prompt."""
        if self.prompt_ids is not None:
            return len(self.prompt_ids)
        return self._estimate.tokens(self._call.prompt_chars)

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
        """Run one leg over at most ``most`` tokens; with ``hand_over`` another one continues it, pulling its
        KV where instances can. A ``handle`` that cannot be used, or was not, is released. ``extend`` is one
        that covers the beginning of the prompt of a leg that hands over.

        The ticket goes to an engine that orders by it, unless the answer has begun already.
        """
        call, scheduler = self._call, self._scheduler
        now = self._clock.now()
        self.count += 1
        self.upstream, self.first_s, self._handing_over = upstream, None, hand_over
        if self._migrate is not None:
            # What was to move has failed meanwhile, and is placed anew.
            scheduler.migrations.note(self._migrate, "cancelled")
            self._migrate = None
        capabilities = upstream.member.capabilities
        # With nobody to pull or decline it, what vLLM pins is held until its lease ends: it fills the cache.
        wanted = capabilities.continues or len(scheduler.upstreams) > 1
        pin = hand_over and wanted and upstream.member.produces_kv
        ordered = capabilities.orders and not self.out_ids
        held = extend if handle is None else handle
        loaded = held if held is not None and scheduler.handles.usable(held, upstream) else None
        begun = self._begin(upstream, None if hand_over else loaded)
        left = None if self._limit is None else self._limit - begun
        leg = Leg(
            request_id=f"{call.id}-{self.count}",
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
            left_s = self.deadline_s - now
            if left_s <= 0:
                raise EngineTimeout(
                    f"the request's deadline of {scheduler.settings.request_deadline_s:g} s has passed"
                )
            end = await upstream.engine.run(leg, self, deadline_s=left_s)
            if loaded is not None and not pin:
                scheduler.loads.kept(upstream.member.instance.id, self.prompt_tokens + len(self.out_ids))
            return end
        except _Done:
            return LegEnd()
        except BaseException as error:
            # The answer may have been lost on the way: the engine then holds a pin nobody knows of.
            if pin:
                scheduler.background(upstream.engine.release_request(leg.request_id))
            if isinstance(error, KvLost) and held is not None:
                scheduler.handles.suspect_owner(held)
            raise
        finally:
            if held is not None and (loaded is None or self.first_s is None):
                scheduler.handles.release(held, sent=loaded is not None)

    def _begin(self, upstream: Upstream, handle: KvHandle | None) -> int:
        """Return how many of the delivered tokens the next leg's prompt holds; it says the others again.

        All of them for an engine that continues. Another begins with exactly what a handle covers, without
        one where text is whole, and where the answer depends on more than its tokens at its start.
        """
        if upstream.member.capabilities.continues:
            self._seams = None
            return len(self.out_ids)
        if self._seams is None:
            call = self._call
            include = bool(call.sampling.get("include_stop_str_in_output"))
            stops = None
            if call.stops:
                least = call.sampling.get("min_tokens") or 0
                unaware = not self._engine_stops
                stops = StopStrings(call.stops, include=include, unaware=unaware, min_tokens=least)
            self._seams = Continuation(self.out_ids, stops)
            self._story.unmovable = call.state
        if handle is not None and self.prompt_ids is not None:
            begun = handle.tokens - len(self.prompt_ids)
        else:
            begun = 0 if self._story.unmovable else self._seams.clean
        self._seams.begin(begun)
        return begun

    def _sampling(self, begun: int, most: int | None) -> dict[str, object]:
        """Return the sampling fields of a leg behind ``begun`` tokens: ``min_tokens`` asks no more of it than
        it may generate.

        For an engine that does not continue: it counts from the leg's start, says stop strings, which the
        gateway leaves out, and a seed that is ours differs from leg to leg, so that random numbers do not
        repeat.
        """
        sampling = self._call.sampling
        wanted = sampling.get("min_tokens")
        if self._seams is None:
            if wanted and most is not None:
                return sampling | {"min_tokens": min(wanted, len(self.out_ids) + most)}
            return sampling
        changed: dict[str, object] = {}
        if wanted:
            changed["min_tokens"] = max(0, wanted - begun if most is None else min(wanted - begun, most))
        if "seed" in sampling and not self._call.seeded:
            changed["seed"] = sampling["seed"] + begun
        if not self._call.stops:
            return sampling | changed
        if self._engine_stops:
            return sampling | changed | {"include_stop_str_in_output": True}
        dropped = ("stop", "include_stop_str_in_output")
        return {name: value for name, value in (sampling | changed).items() if name not in dropped}

    @property
    def _engine_stops(self) -> bool:
        """Whether engines are given the stop strings, to say them: one that is busy sends several tokens in a
        piece, and only it knows which of them is the last one.

        It would say the text of a stop token, too, and nobody could tell that from the answer's.
        """
        sampling = self._call.sampling
        if sampling.get("include_stop_str_in_output"):
            return True
        return not sampling.get("stop_token_ids") and sampling.get("skip_special_tokens") is not False

    # migration

    def leave(self, migrate: Migrate) -> str:
        """Move the decode as ``migrate`` says, at its next token; return why not, "" when it will."""
        upstream = self.upstream
        if not self.decoding or self._handing_over or upstream is None or self.first_s is None:
            return "it does not decode"
        if upstream.member.instance.id != migrate.src:
            return f"it does not decode on {migrate.src}"
        if self._migrate is not None:
            return "it moves already"
        if self._story.unmovable:
            return f"its state cannot move: {self._story.unmovable}"
        if not upstream.member.produces_kv:
            return f"the KV of {migrate.src} cannot be moved"
        self._migrate = migrate
        return ""

    def _leave_if_told(self) -> None:
        """Raise Leave where the answer may be cut: its text is whole, and something is left to generate."""
        if self._migrate is None:
            return
        whole = self._seams is None or self._seams.clean == len(self.out_ids)
        left = self.remaining()
        if whole and self.finish_reason is None and (left is None or left > 1):
            migrate, self._migrate = self._migrate, None
            raise Leave(migrate)

    # what the prompt is, and who holds it

    async def tokenise(self, upstream: Upstream) -> bool:
        """Have an engine tokenise the prompt ahead of its first leg; False when it cannot. Raises
        EngineError."""
        if self.prompt_ids is None:
            call = self._call
            ids = await upstream.engine.tokenise(call.prompt, call.messages, call.sampling)
            if ids is None:
                return False
            self.upstream = upstream
            self._learn_prompt(ids)
        return True

    async def export(self, holder: Upstream, tokens: int) -> KvHandle | None:
        """Have an instance whose prefix cache holds the first ``tokens`` of the prompt pin them.

        The one token that this makes is nobody's. Raises EngineError.
        """
        assert self.prompt_ids is not None
        self.count += 1
        leg = Leg(
            request_id=f"{self._call.id}-{self.count}",
            prompt=self.prompt_ids[:tokens],
            messages=None,
            max_tokens=1,
            sampling={"temperature": 0},
            pin=True,
            salt=self._call.salt,
        )
        left_s = self.deadline_s - self._clock.now()
        return (await holder.engine.run(leg, _Unheard(), deadline_s=min(EXPORT_S, left_s))).handle

    # the legs' tokens

    def tokens(self, tokens: Tokens) -> None:
        """See ``TokensSink.tokens``."""
        if tokens.prompt_token_ids is not None and self.prompt_ids is None:
            self._learn_prompt(tokens.prompt_token_ids)
        if self.refusal is not None:
            return
        if tokens.token_ids:
            if self.prompt_ids is None:
                raise EngineFault("the engine does not return the prompt's token ids")
            self._arrived()
        seams = self._seams
        if seams is not None:
            if tokens.delta:
                self._story.unmovable = self._story.unmovable or f"a parser ({', '.join(tokens.delta)})"
            if self._handing_over and self._story.unmovable:
                return  # The next leg says it again, from the state that it keeps.
            tokens = seams.piece(tokens, whole=self._handing_over)
        if tokens.token_ids:
            self._count(tokens.token_ids)
        reason = tokens.finish_reason
        if reason == "length" and self._handing_over and self.remaining() != 0:
            reason = None
        if reason is not None:
            self.finish_reason, self.stop_reason = reason, tokens.stop_reason
        if seams is not None and seams.stops is not None:
            tokens.text = self._until_stop(seams, seams.stops, tokens.text)
            reason = tokens.finish_reason = self.finish_reason
            tokens.stop_reason = self.stop_reason
        if tokens.token_ids or tokens.text or tokens.delta or reason is not None:
            self._answer.tokens(tokens, reason, self.prompt_ids)
        self._after_piece()

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""
        if self.first_s is None:
            self._arrived()
        seams = self._seams
        if seams is not None:
            text, token_ids = seams.plain(text, token_ids)
            if not token_ids and not text:
                return
        self._count(token_ids)
        if seams is not None and seams.stops is not None:
            text = self._until_stop(seams, seams.stops, text)
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

    def _until_stop(self, seams: Continuation, stops: StopStrings, text: str) -> str:
        """Return the text up to a stop string, which ends the request; all that is left when it has ended."""
        ended = self.finish_reason is not None
        text = seams.until_stop(text, self.stop_reason)
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
        self._leave_if_told()

    def _arrived(self) -> None:
        """Note the leg's first token, be it new or said again."""
        if self.first_s is None:
            self.first_s = self._clock.now()
            self._leg_began(self.first_s)

    def _count(self, token_ids: list[int]) -> None:
        """Enter new tokens in the books."""
        now = self._clock.now()
        self.out_ids += token_ids
        story = self._story
        if story.first_token_s is None:
            story.first_token_s = now
        story.last_token_s = now
        if self.decoding:
            self._ledger.tokens(self._call.id, len(token_ids), now)

    def _leg_began(self, now: float) -> None:
        """The leg's first token: a pull it waited for has ended, a colocated prefill has become a decode."""
        if not self._handing_over and self.decode_first_s is None:
            self.decode_first_s = now
        if self.decoding:
            self._ledger.transfer_ended(self._call.id, now)
        elif not self._handing_over and self.upstream is not None:
            self._ledger.prefill_ended(self._call.id, now)
            resident = self.prompt_tokens + len(self.out_ids)
            self._ledger.decode_dispatched(self._call.id, self.upstream.member.instance.id, resident, now)
            self.decoding = True

    def _learn_prompt(self, ids: list[int]) -> None:
        """Take the prompt as the engine tokenised it."""
        self.prompt_ids = ids
        self._estimate.observe(self._call.prompt_chars, len(ids))
        if self.upstream is not None:
            self.settle_limit(len(ids), self.upstream.member.instance.max_model_len)

    # lengths

    def settle_limit(self, prompt: int, context: int) -> None:
        """Fix how many tokens to generate; note the refusal of a request that does not fit."""
        self._limit = limit = self._call.tokens_within(context - prompt)
        if limit < 1 or prompt + limit > context:
            field = "messages" if self._call.chat else "prompt"
            self.refusal = PromptTooLong(
                f"the context is {context} tokens; the prompt has {prompt} and max_tokens is {max(1, limit)}",
                param="max_tokens" if prompt < context else field,
            )

    def raise_refusal(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def remaining(self) -> int | None:
        """Tokens still to generate; None while a prompt of unknown length leaves that open."""
        return None if self._limit is None else self._limit - len(self.out_ids)

    def finish_at_limit(self) -> None:
        """End a request whose last token arrived but whose last leg failed before it said so."""
        self.finish_reason = "length"
        self._answer.tokens(Tokens("", []), "length", self.prompt_ids)

    def request(self) -> Request:
        call = self._call
        return Request(
            id=call.id,
            prompt_tokens=self.prompt_tokens + len(self.out_ids),
            max_tokens=self.remaining() or 1,
            arrival_s=self._story.arrival_s,
            slo=call.slo,
            tenant=call.tenant,
            session=call.session,
        )
