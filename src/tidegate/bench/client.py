"""The load client: in an open loop requests leave on schedule, whatever happened to the earlier ones; in a
closed loop each user's next request leaves when the last one has ended."""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import aiohttp
import numpy as np
import orjson

from tidegate.bench.endpoint import Endpoint
from tidegate.bench.settings import BenchSettings
from tidegate.core.clock import Clock, WallClock
from tidegate.measure.results import RequestResult, Status
from tidegate.protocol.chunks import DONE, SseParser, error_text
from tidegate.workloads.trace import TraceRecord

PREPARED_AHEAD = 64
SLACK_S = 0.005
"""Prompts are made ahead only while the next send is at least this far away."""

_DONE = DONE.removeprefix(b"data:").strip()

OnResult = Callable[[RequestResult, "array[float]"], None]


class BrokenAnswer(Exception):
    """The stream carried an error, was not what it should be, or ended before its end."""


class TimedAnswer:
    """Reads the payloads of a completions or chat stream as they arrive.

    A chunk counts as tokens when it has text, reasoning, tool calls or token ids; in completions
    also when it is empty but not the last (a token that does not complete a character). It counts as
    one, or as many as its usage or its token ids say, which then share the gap. Times are whatever
    clock the caller passes to ``take``.
    """

    __slots__ = (
        "chat", "chunks", "completion_tokens", "finish_reason", "finish_s", "first_s", "gaps_s", "last_s",
        "prompt_tokens",
    )  # fmt: skip

    def __init__(self, *, chat: bool) -> None:
        self.chat = chat
        self.first_s: float | None = None
        self.last_s = 0.0
        self.gaps_s = array("d")
        self.chunks = 0
        self.finish_reason: str | None = None
        self.finish_s = 0.0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None

    def take(self, payload: bytes, at_s: float) -> None:
        """Account for one payload received at ``at_s``; raises BrokenAnswer."""
        if payload == _DONE:
            return
        try:
            chunk = orjson.loads(payload)
            self._take_chunk(chunk, at_s)
        except (orjson.JSONDecodeError, AttributeError, KeyError, IndexError, TypeError):
            raise BrokenAnswer(f"not a completion chunk: {payload[:120].decode(errors='replace')}") from None

    def _take_chunk(self, chunk: dict[str, Any], at_s: float) -> None:
        error = chunk.get("error")
        if error:
            raise BrokenAnswer(error_text(chunk)[:300])
        before, usage = self.completion_tokens or 0, chunk.get("usage")
        if usage:
            self.prompt_tokens = usage.get("prompt_tokens")
            self.completion_tokens = usage.get("completion_tokens")
        choices = chunk.get("choices")
        if not choices:
            return
        choice = choices[0]
        finish_reason = choice.get("finish_reason")
        if self._has_token(choice, finish_reason):
            # Usage that comes with the last event only is that of the whole answer.
            running = usage and before == self.chunks
            told = (self.completion_tokens or 0) - before if running else len(choice.get("token_ids") or ())
            self._token(at_s, max(1, told))
        if finish_reason:
            self.finish_reason, self.finish_s = finish_reason, at_s

    def _has_token(self, choice: dict[str, Any], finish_reason: str | None) -> bool:
        if choice.get("token_ids"):
            return True
        if not self.chat:
            return bool(choice.get("text")) or finish_reason is None
        delta = choice.get("delta") or {}
        return any(delta.get(k) for k in ("content", "reasoning_content", "reasoning", "tool_calls"))

    def _token(self, at_s: float, tokens: int = 1) -> None:
        if self.first_s is None:
            self.first_s = at_s
        else:
            self.gaps_s.extend([(at_s - self.last_s) / tokens] * tokens)
        self.last_s = at_s
        self.chunks += tokens

    def close(self) -> None:
        """Check that the answer is complete, once the stream has ended; raises BrokenAnswer.

        An empty closing chunk stands for a token (the end-of-sequence one) when the server counts
        more tokens than it sent chunks.
        """
        if self.finish_reason is None:
            raise BrokenAnswer("the stream ended without a finish_reason")
        if self.finish_s > self.last_s and (self.completion_tokens or 0) > self.chunks:
            self._token(self.finish_s)
        if self.first_s is None:
            raise BrokenAnswer("the answer holds no token")

    @property
    def output_tokens(self) -> int:
        """Return the server's count of tokens, else the number of chunks that carried some."""
        return self.chunks if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot_s(self) -> float | None:
        """Return (last - first)/(tokens - 1), None for one token or none."""
        tokens = self.output_tokens
        return None if self.first_s is None or tokens < 2 else (self.last_s - self.first_s) / (tokens - 1)


@dataclass(frozen=True, slots=True)
class _Prepared:
    index: int
    record: TraceRecord
    body: bytes
    headers: dict[str, str]


class LoadClient:
    """Sends records and reports every end to ``on_result`` exactly once.

    Each is sent at its ``arrival_s``, without a limit on requests in flight; in a closed loop the time at
    which it is sent is its ``arrival_s``. ``sent`` and ``in_flight`` may be read at any time.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: BenchSettings,
        endpoint: Endpoint,
        on_result: OnResult,
        clock: Clock | None = None,
    ) -> None:
        self.sent = 0
        self._session, self._settings, self._endpoint = session, settings, endpoint
        self._on_result = on_result
        self._clock = clock or WallClock()
        self._start_s = 0.0
        self._tasks: dict[asyncio.Task[tuple[RequestResult, array[float]]], _Prepared] = {}
        self._users = asyncio.Semaphore(settings.concurrency or 0)
        """Those of a closed loop that have no request under way."""
        self._idle = asyncio.Event()
        self._fault: Exception | None = None

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def run(self, records: Sequence[TraceRecord], stop: asyncio.Event) -> None:
        """Send all records and wait for their answers.

        When ``stop`` is set nothing more is sent, and requests in flight end as ``interrupted``.
        """
        pacer = asyncio.create_task(self._drive(records))
        stopper = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((pacer, stopper), return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [pacer, stopper, *self._tasks]
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        if self._fault is not None:
            raise self._fault
        if isinstance(ended[0], Exception):
            raise ended[0]

    async def _drive(self, records: Sequence[TraceRecord]) -> None:
        """Send every record, then wait for the answers."""
        source = map(self._prepare, count(), records)
        if self._settings.concurrency is None:
            await self._send_on_schedule(source)
        else:
            await self._send_in_turn(source)
        while self._tasks and self._fault is None:
            self._idle.clear()
            await self._idle.wait()

    async def _send_on_schedule(self, source: Iterator[_Prepared]) -> None:
        ready = deque(islice(source, PREPARED_AHEAD))
        self._start_s = self._clock.now()
        while ready and self._fault is None:
            due_s = self._start_s + ready[0].record.arrival_s
            while len(ready) < PREPARED_AHEAD and due_s - self._clock.now() > SLACK_S:
                following = next(source, None)
                if following is None:
                    break
                ready.append(following)
                await asyncio.sleep(0)
            # Sleeping for 0 in a burst lets answers be read between two sends.
            await asyncio.sleep(max(0.0, due_s - self._clock.now()))
            self._send(ready.popleft())
            ready.extend(islice(source, 0 if ready else 1))

    async def _send_in_turn(self, source: Iterator[_Prepared]) -> None:
        self._start_s = self._clock.now()
        for item in source:
            await self._users.acquire()
            if self._fault is not None:
                return
            self._send(replace(item, record=item.record._replace(arrival_s=self._now_s())))
            await asyncio.sleep(0)  # it leaves before the next prompt is made

    def _prepare(self, index: int, record: TraceRecord) -> _Prepared:
        prompt = self._endpoint.prompts.prompt(record, index)
        body = self._settings.body(self._endpoint.model, prompt, record.output_tokens, stream=True)
        headers = self._settings.headers(record.slo_class)
        if record.session_id:
            headers["x-session-id"] = record.session_id
        return _Prepared(index, record, orjson.dumps(body), headers)

    def _send(self, item: _Prepared) -> None:
        task = asyncio.create_task(self._exchange(item))
        self._tasks[task] = item
        task.add_done_callback(self._ended)
        self.sent += 1

    def _ended(self, task: asyncio.Task[tuple[RequestResult, array[float]]]) -> None:
        item = self._tasks.pop(task)
        self._users.release()
        try:
            if task.cancelled():
                # Cancelled before its first step: it never left.
                answer = TimedAnswer(chat=self._settings.chat)
                result = self._result(item, self._now_s(), "interrupted", None, "", answer)
                self._on_result(result, answer.gaps_s)
            else:
                self._on_result(*task.result())
        except Exception as fault:
            # The loop would only log what a callback raises; a full disk has to end the run.
            self._fault = self._fault or fault
        if not self._tasks or self._fault is not None:
            self._idle.set()

    async def _exchange(self, item: _Prepared) -> tuple[RequestResult, array[float]]:
        sent_s = self._now_s()
        answer = TimedAnswer(chat=self._settings.chat)
        status: Status = "ok"
        http_status, error = None, ""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                http_status, error = await self._stream(item, answer)
            if http_status != 200:
                status = "http"
            else:
                answer.close()
        except TimeoutError:
            status, error = "timeout", f"no complete answer within {self._settings.timeout_s:g} s"
        except asyncio.CancelledError:
            status = "interrupted"
        except BrokenAnswer as broken:
            status, error = "stream", str(broken)
        except (aiohttp.ClientError, OSError) as broken:
            status = "connection" if answer.first_s is None else "stream"
            error = str(broken) or type(broken).__name__
        return self._result(item, sent_s, status, http_status, error, answer), answer.gaps_s

    async def _stream(self, item: _Prepared, answer: TimedAnswer) -> tuple[int, str]:
        """Read one answer to its end; return the HTTP status and, unless it is 200, the error text."""
        url = self._settings.completion_url
        async with self._session.post(url, data=item.body, headers=item.headers) as response:
            if response.status != 200:
                return response.status, (await response.text(errors="replace"))[:300]
            parser = SseParser()
            async for data in response.content.iter_any():
                at_s = self._now_s()
                for payload in parser.feed(data):
                    answer.take(payload, at_s)
        return 200, ""

    def _result(
        self,
        item: _Prepared,
        sent_s: float,
        status: Status,
        http_status: int | None,
        error: str,
        answer: TimedAnswer,
    ) -> RequestResult:
        record = item.record
        gaps_s = np.array(answer.gaps_s)
        return RequestResult(
            index=item.index,
            scheduled_ms=round(record.arrival_s * 1000.0, 3),
            sent_s=sent_s,
            input_tokens=record.input_tokens,
            max_tokens=record.output_tokens,
            status=status,
            http_status=http_status,
            error=error,
            ttft_s=None if answer.first_s is None else answer.first_s - record.arrival_s,
            tpot_s=answer.tpot_s,
            e2e_s=(answer.last_s if status == "ok" else self._now_s()) - record.arrival_s,
            itl_p99_s=float(np.percentile(gaps_s, 99)) if gaps_s.size else None,
            itl_max_s=float(gaps_s.max()) if gaps_s.size else None,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            counted_tokens=answer.chunks,
            finish_reason=answer.finish_reason,
            session_id=record.session_id,
            turn=record.turn,
            slo_class=record.slo_class,
        )

    def _now_s(self) -> float:
        return self._clock.now() - self._start_s
