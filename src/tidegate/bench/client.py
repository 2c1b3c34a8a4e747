"""The load client: in an open loop requests leave on schedule, whatever happened to the earlier ones; in a
closed loop each user's next request leaves when the last one has ended. Sessions are in between: they begin
on schedule, and each later turn waits for the answer before it."""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import aiohttp
import numpy as np
import orjson

from tidegate.bench.answer import BrokenAnswer, TimedAnswer
from tidegate.bench.dialogue import Dialogue
from tidegate.bench.endpoint import Endpoint
from tidegate.bench.settings import BenchSettings
from tidegate.core.clock import Clock, WallClock
from tidegate.measure.results import RequestResult, Status
from tidegate.protocol.chunks import SseParser
from tidegate.workloads.sessions import followed
from tidegate.workloads.trace import TraceRecord, Workload

PREPARED_AHEAD = 64
SLACK_S = 0.005
"""Prompts are made ahead only while the next send is at least this far away."""

OnResult = Callable[[RequestResult, "array[float]"], None]


@dataclass(frozen=True, slots=True)
class _Prepared:
    index: int
    record: TraceRecord
    body: bytes
    headers: dict[str, str]
    dialogue: Dialogue | None = None


class LoadClient:
    """Sends records and reports every end to ``on_result`` exactly once.

    Each is sent at its ``arrival_s``, without a limit on requests in flight; in a closed loop the time at
    which it is sent is its ``arrival_s``. Where the settings play sessions, a turn above 0 with a pause is
    sent that long after the end of its session's previous request, however that ended, and carries the
    answers that came (``Dialogue``); its ``arrival_s`` is that time. ``sent`` and ``in_flight`` may be
    read at any time.
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
        self._tasks: dict[asyncio.Task[tuple[RequestResult, TimedAnswer]], _Prepared] = {}
        self._follows: dict[int, tuple[int, TraceRecord]] = {}
        """By a request's row, the turn that waits for its end."""
        self._pauses: dict[int, asyncio.TimerHandle] = {}
        """Turns whose client pauses, by their row."""
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
            for pause in self._pauses.values():
                pause.cancel()
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
        follows = followed(Workload.of(records)) if self._settings.sessions else {}
        self._follows = {before: (row, records[row]) for before, row in follows.items()}
        waiting = set(follows.values())
        source = (
            self._prepare(row, record, self._begun(row))
            for row, record in enumerate(records)
            if row not in waiting
        )
        if self._settings.concurrency is None:
            await self._send_on_schedule(source)
        else:
            await self._send_in_turn(source)
        while (self._tasks or self._pauses) and self._fault is None:
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

    def _begun(self, row: int) -> Dialogue | None:
        """Return the dialogue of a request that others follow."""
        return self._dialogue() if row in self._follows else None

    def _dialogue(self) -> Dialogue:
        return Dialogue(self._endpoint.prompts, chat=self._settings.chat)

    def _prepare(self, index: int, record: TraceRecord, dialogue: Dialogue | None) -> _Prepared:
        said = dialogue
        prompt = self._endpoint.prompts.prompt(record, index) if said is None else said.turn(record, index)
        body = self._settings.body(self._endpoint.model, prompt, record.output_tokens, stream=True)
        headers = self._settings.headers(record.slo_class)
        if record.session_id:
            headers["x-session-id"] = record.session_id
        return _Prepared(index, record, orjson.dumps(body), headers, dialogue)

    def _send(self, item: _Prepared) -> None:
        task = asyncio.create_task(self._exchange(item))
        self._tasks[task] = item
        task.add_done_callback(self._ended)
        self.sent += 1

    def _ended(self, task: asyncio.Task[tuple[RequestResult, TimedAnswer]]) -> None:
        item = self._tasks.pop(task)
        self._users.release()
        try:
            if task.cancelled():
                # Cancelled before its first step: it never left.
                answer = TimedAnswer(chat=self._settings.chat)
                result = self._result(item, self._now_s(), "interrupted", None, "", answer)
            else:
                result, answer = task.result()
                self._pause_before_next(item, result, answer)
            self._on_result(result, answer.gaps_s)
        except Exception as fault:
            # The loop would only log what a callback raises; a full disk has to end the run.
            self._fault = self._fault or fault
        if not self._tasks or self._fault is not None:
            self._idle.set()

    def _pause_before_next(self, item: _Prepared, result: RequestResult, answer: TimedAnswer) -> None:
        """Have the turn that waited for this answer leave after its client's pause."""
        following = self._follows.pop(item.index, None)
        if following is None or result.status == "interrupted":
            return
        assert item.dialogue is not None
        row, record = following
        assert record.delay_s is not None
        if result.ok:
            item.dialogue.answered(answer)
        record = record._replace(arrival_s=self._now_s() + record.delay_s)
        self._pauses[row] = asyncio.get_running_loop().call_later(
            record.delay_s or 0.0, self._send_turn, row, record, item.dialogue
        )

    def _send_turn(self, row: int, record: TraceRecord, dialogue: Dialogue) -> None:
        del self._pauses[row]
        try:
            self._send(self._prepare(row, record, dialogue))
        except Exception as fault:
            self._fault = self._fault or fault
            self._idle.set()

    async def _exchange(self, item: _Prepared) -> tuple[RequestResult, TimedAnswer]:
        sent_s = self._now_s()
        answer = TimedAnswer(chat=self._settings.chat, keep=item.dialogue is not None)
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
        return self._result(item, sent_s, status, http_status, error, answer), answer

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
