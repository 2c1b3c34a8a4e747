"""One request on a pair of SGLang servers, from the start of its prefill to the end of its decode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from tidegate.core.errors import EngineError, EngineFault, EngineUnreachable, KvLost
from tidegate.engines.seam import Json, Leg, Tokens, TokensSink
from tidegate.engines.sglang.server import SglangServer
from tidegate.engines.sglang.stream import NativeStream, refusal

HiddenStates = Callable[[str, Any], None]
"""Takes a leg's request id and the hidden states of its prompt, as SGLang sent them (None if it did not)."""


class Room:
    """A ``bootstrap_room``: both servers are asked at once, and the tokens come from the decode server.

    Legs take the tokens with ``deliver``, each of them from the first token on, so what was said is kept
    until the last leg is served. A room that waits for its next leg longer than ``lease_s`` is closed.
    ``ended`` says whether all tokens have come, or the request failed.
    """

    def __init__(self, number: int, prefill: SglangServer, decode: SglangServer, *, lease_s: float) -> None:
        self.number = number
        self.prefill, self.decode = prefill, decode
        self.request_id = ""
        self.prompt_tokens = 0
        self.ended = False
        self._rid = ""
        self._lease_s = lease_s
        self._lease: asyncio.TimerHandle | None = None
        self._work: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._begun = self._ending = False
        self._said: list[Tokens] | None = []
        self._served: _Served | None = None

    def open(
        self,
        leg: Leg,
        body: Json,
        *,
        hidden_states: HiddenStates | None,
        deadline_s: float,
        closed: Callable[[Room], None],
    ) -> None:
        """Send ``body`` to both servers, with this room in it; ``closed`` is called once neither is asked
        any more. Called once.
        """
        self.request_id, self._rid = leg.request_id, body["rid"]
        self.prompt_tokens = len(body["input_ids"])
        met = {
            "bootstrap_host": self.prefill.host,
            "bootstrap_port": self.prefill.facts.bootstrap_port,
            "bootstrap_room": self.number,
        }
        work = self._run(body | met, NativeStream(leg, self._take), hidden_states, deadline_s)
        self._work = asyncio.create_task(work)
        self._work.add_done_callback(lambda _: closed(self))

    async def deliver(self, sink: TokensSink, max_tokens: int | None, *, last: bool) -> None:
        """Hand a leg the tokens from the first on, until the request's end or ``max_tokens`` of them.

        The room is closed behind the ``last`` leg, and when delivering fails or is cancelled.
        """
        self._end_lease()
        served = self._served = _Served(sink, max_tokens)
        said, self._said = self._said, None if last else self._said
        try:
            for tokens in list(said or ()):
                served.take(tokens)
            if self._error is not None and not served.turn.done():
                raise self._error
            await served.turn
        except BaseException:
            self._served = None
            self.close()
            raise
        self._served = None
        if not self.ended:
            if last:
                self.close()
            else:
                self._lease = asyncio.get_running_loop().call_later(self._lease_s, self.close)

    def lost_prefill(self) -> None:
        """Give up if the KV has not come yet: the process that computes it is gone."""
        if not self._begun:
            self._fail(KvLost("the prefill server is gone", instance=self.prefill.instance, stage="prefill"))
            self.close()

    def close(self) -> None:
        """Have both servers end what is not over; idempotent."""
        self._end_lease()
        self._fail(EngineUnreachable("the request was given up", instance=self.decode.instance))
        if self._work is not None and not self._ending:
            self._ending = True
            self._work.cancel()

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None

    def _take(self, tokens: Tokens) -> None:
        """Accept a piece from the decode server."""
        self._begun = True
        self.ended = self.ended or tokens.finish_reason is not None
        if self._said is not None:
            self._said.append(tokens)
        if self._served is not None:
            self._served.take(tokens)

    def _fail(self, error: Exception) -> None:
        """End the request with ``error``, in the leg that is served or the next one."""
        if self._error is None:
            self.ended, self._error = True, error
            if self._served is not None:
                self._served.fail(error)

    async def _run(
        self, body: Json, stream: NativeStream, hidden_states: HiddenStates | None, deadline_s: float
    ) -> None:
        prefilling = asyncio.create_task(self._prefill(body, hidden_states, deadline_s))
        decoding = asyncio.create_task(self._decode(body | {"stream": True}, stream, deadline_s))
        legs, over = (prefilling, decoding), False
        try:
            await asyncio.wait(legs, return_when=asyncio.FIRST_EXCEPTION)
            if prefilling.done() and not self._begun:
                prefilling.result()
            await decoding
            over = True
        except Exception as error:
            self._fail(error)
        finally:
            self._ending = True
            for leg in legs:
                leg.cancel()
            await asyncio.gather(*legs, return_exceptions=True)
            if not over:
                await asyncio.gather(self.prefill.abort(self._rid), self.decode.abort(self._rid))

    async def _prefill(self, body: Json, hidden_states: HiddenStates | None, deadline_s: float) -> None:
        """Have the prompt computed; the answer comes once the KV has left."""
        if hidden_states is not None:
            body = body | {"return_hidden_states": True}
        raw = await _generate(self.prefill, "prefill", body, None, deadline_s)
        try:
            meta = orjson.loads(raw)["meta_info"]
            aborted = (meta.get("finish_reason") or {}).get("type") == "abort"
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
            raise EngineFault(
                "the prefill's answer is malformed", instance=self.prefill.instance, stage="prefill"
            ) from None
        if aborted:
            raise EngineUnreachable(
                "the engine aborted the prefill", instance=self.prefill.instance, stage="prefill"
            )
        if hidden_states is not None:
            hidden_states(self.request_id, meta.get("hidden_states"))

    async def _decode(self, body: Json, stream: NativeStream, deadline_s: float) -> None:
        await _generate(self.decode, "decode", body, stream.feed, deadline_s)
        if not self.ended:
            raise EngineUnreachable(
                "the stream ended without a finish reason", instance=self.decode.instance, stage="decode"
            )


class _Served:
    """The leg that is served: passes tokens on until its end, which ``turn`` tells."""

    def __init__(self, sink: TokensSink, max_tokens: int | None) -> None:
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sink = sink
        self._left = max_tokens
        self._opened = False

    def take(self, tokens: Tokens) -> None:
        """Pass on what the leg may have of a piece."""
        if self.turn.done():
            return
        if self._left is not None:
            if len(tokens.token_ids) > self._left:
                tokens = _first(tokens, self._left)
            self._left -= len(tokens.token_ids)
            if self._left == 0 and tokens.finish_reason is None:
                tokens = replace(tokens, finish_reason="length")
        try:
            if self._opened and tokens.finish_reason is None and tokens.logprobs is None:
                self._sink.plain(tokens.text, tokens.token_ids)
            else:
                self._opened = True
                self._sink.tokens(tokens)
        except Exception as error:
            self.turn.set_exception(error)
            return
        if tokens.finish_reason is not None:
            self.turn.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the leg with ``error``, if it has not ended."""
        if not self.turn.done():
            self.turn.set_exception(error)


def _first(tokens: Tokens, count: int) -> Tokens:
    """Return the first ``count`` tokens of a piece. Which part of its text is theirs cannot be told."""
    logprobs = tokens.logprobs and {name: rows[:count] for name, rows in tokens.logprobs.items()}
    return Tokens("", tokens.token_ids[:count], logprobs)


async def _generate(
    server: SglangServer, stage: str, body: Json, feed: Callable[[bytes], None] | None, deadline_s: float
) -> bytes:
    try:
        answer = await server.wire.exchange(
            "POST", "/generate", orjson.dumps(body), sink=feed, deadline_s=deadline_s
        )
        if answer.status != 200:
            raise refusal(answer.status, answer.body)
        return answer.body
    except EngineError as error:
        error.instance, error.stage = error.instance or server.instance, error.stage or stage
        raise
